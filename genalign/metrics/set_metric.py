"""A reward of whole sets next to the samples' own scores, in units that make a weight meaningful."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from genalign.types import SetReward

_RANDOM_SETS = 16


def with_quality(reward: SetReward, weight: float, first: Tensor, second: Tensor) -> SetReward:
    """Add ``weight`` times the mean quality to ``reward``, for n pairs of samples with rows (n, d + 1) each.

    A row holds a sample's features and, last, its quality; the result is a reward of sets of such rows.
    Both terms are divided by their standard deviation over random sets that take one sample of every pair, so
    ``weight`` compares what the choice of samples can change, and not units. A term that it cannot change is left out.
    Raises ValueError for a weight or a reward that is not finite.
    """
    if not math.isfinite(weight):
        raise ValueError(f"the weight of the samples' quality must be finite, not {weight}")
    generator = torch.Generator().manual_seed(0)
    sides = torch.stack([torch.randint(2, (len(first), 1), generator=generator) for _ in range(_RANDOM_SETS)]).bool()
    sets = [torch.where(side.to(first.device), second, first) for side in sides]
    reward_weight = _inverse_deviation([reward(rows[:, :-1]) for rows in sets])
    quality_weight = weight * _inverse_deviation([_mean_quality(rows) for rows in sets])
    return lambda rows: reward_weight * reward(rows[:, :-1]) + quality_weight * _mean_quality(rows)


def _mean_quality(rows: Tensor) -> float:
    return float(rows[:, -1].mean())


def _inverse_deviation(values: list[float]) -> float:
    """Return 1 / standard deviation, or 0 where the values differ by round-off only."""
    if not all(math.isfinite(value) for value in values):
        raise ValueError(f"a set reward is not finite on random sets of this round's samples: {values}")
    deviation = float(torch.tensor(values, dtype=torch.float64).std())
    return 1 / deviation if deviation > 1e-9 * max(abs(value) for value in values) else 0.0
