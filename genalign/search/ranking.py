"""Orders within prompts, for one reward or several."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def merit(scores: Tensor, prompt: Tensor) -> Tensor:
    """One figure (N,) float64 for scores (N, K) of candidates of prompts (N,): the score itself, or of several rewards
    the sum of their ranks within the prompt, 0 for the worst, ties sharing their mean rank. A failed score (NaN) is
    -inf, and ranks as the worst.
    """
    known = torch.where(scores.isnan(), -math.inf, scores.double())
    if scores.shape[1] == 1:
        return known[:, 0]
    total = torch.zeros(len(scores), dtype=torch.float64)
    for key in torch.unique(prompt):
        members = (prompt == key).nonzero()[:, 0]
        total[members] = sum(
            (_ranks(column) for column in known[members].unbind(1)), torch.zeros(len(members)).double()
        )
    return total


def _ranks(values: Tensor) -> Tensor:
    below = (values[:, None] > values[None, :]).sum(1)
    ties = (values[:, None] == values[None, :]).sum(1) - 1
    return below.double() + ties.double() / 2


def best(merits: Tensor, prompt: Tensor, count: int) -> Tensor:
    """The ``count`` best candidates of every prompt, prompts ascending, best first, the earlier of equals first."""
    falling = torch.sort(merits, descending=True, stable=True).indices
    order = falling[torch.sort(prompt[falling], stable=True).indices]
    sizes = torch.unique(prompt, return_counts=True)[1]
    place = torch.arange(len(order)) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    return order[place < count]


def top(scores: Tensor, prompt: Tensor, count: int) -> Tensor:
    """``best`` by the ``merit`` of scores (N, K)."""
    return best(merit(scores, prompt), prompt, count)
