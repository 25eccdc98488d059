"""Weighted sums of rewards."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def combine(scores_BK: Tensor, weights: Sequence[float]) -> Tensor:
    """Compute the weighted sum (B,) of K rewards; NaN where a reward of non-zero weight is NaN.

    A reward of weight 0 is only reported: it changes nothing, NaN or not.
    """
    weight = weights_of_columns(scores_BK, weights)
    used = weight != 0
    return (scores_BK.double()[:, used] * weight[used]).sum(1).float()


def weights_of_columns(scores_BK: Tensor, weights: Sequence[float]) -> Tensor:
    """Return the weights (K,) of K rewards in float64. Raises ValueError unless there is a finite one for each."""
    if scores_BK.ndim != 2 or scores_BK.shape[1] != len(weights):
        raise ValueError(f"scores must be (B, K) with one weight per column, not {tuple(scores_BK.shape)}, {weights}")
    weight = torch.tensor(weights, dtype=torch.float64, device=scores_BK.device)
    if not bool(weight.isfinite().all()):
        raise ValueError(f"weights must be finite, not {weights}")
    return weight
