"""The order of candidates within their prompts, for one reward or several."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def ranking_values(scores: Tensor, prompt: Tensor, weights: Sequence[float] | None = None) -> Tensor:
    """Reduce scores (N, K) of candidates of prompts (N,) to one value each (N,) float64, the larger the better.

    Of one reward it is the score; of several, the sum of the ranks within the prompt, 0 for the worst, where ties share
    their mean rank. A failed score (NaN) counts as -inf. Of ``weights`` (K,) the signs count: a reward of weight 0 is
    only reported, and one of a negative weight should be low. Without weights, all rewards count.
    """
    signs = torch.ones(scores.shape[1]) if weights is None else torch.tensor(weights).sign()
    values = torch.where(scores.isnan(), -math.inf, scores.double() * signs)[:, signs != 0]
    if values.shape[1] == 1:
        return values[:, 0]
    total = torch.zeros(len(scores), dtype=torch.float64)
    for key in torch.unique(prompt):
        members = (prompt == key).nonzero()[:, 0]
        ours, others = values[members][:, None], values[members][None, :]
        ranks = (ours > others).sum(1).double() + ((ours == others).sum(1) - 1).double() / 2
        total[members] = ranks.sum(1)
    return total


def largest_per_prompt(values: Tensor, prompt: Tensor, count: int) -> Tensor:
    """Return the rows of the ``count`` largest values (N,) of every prompt, best first, the earlier of equals first."""
    falling = torch.sort(values, descending=True, stable=True).indices
    order = falling[torch.sort(prompt[falling], stable=True).indices]
    sizes = torch.unique(prompt, return_counts=True)[1]
    place = torch.arange(len(order)) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    return order[place < count]


def best_per_prompt(scores: Tensor, prompt: Tensor, count: int, weights: Sequence[float] | None = None) -> Tensor:
    """Return the rows of the ``count`` candidates of every prompt with the best scores (N, K), best first.

    The rewards' ``weights`` are as in ``ranking_values``.
    """
    return largest_per_prompt(ranking_values(scores, prompt, weights), prompt, count)
