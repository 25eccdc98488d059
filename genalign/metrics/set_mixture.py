"""Sums of set rewards, in units that make their weights comparable."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from genalign.metrics.set_metric import SetStatistic, set_statistic
from genalign.types import SetReward


@dataclass(frozen=True)
class WeightedSum:
    """The sum of K set rewards of the same features with these coefficients."""

    rewards: tuple[SetReward, ...]
    coefficients: tuple[float, ...]

    def __post_init__(self) -> None:
        _require_weights(self.rewards, self.coefficients)

    def __call__(self, features: Tensor) -> float:
        return sum(c * reward(features) for reward, c in zip(self.rewards, self.coefficients, strict=True))

    def statistic(self, features: Tensor) -> SetStatistic:
        """For changes of one member."""
        return _SumStatistic([set_statistic(reward, features) for reward in self.rewards], self.coefficients)


class _SumStatistic:
    def __init__(self, parts: Sequence[SetStatistic], coefficients: Sequence[float]) -> None:
        self._parts, self._coefficients = parts, coefficients

    @property
    def value(self) -> float:
        return self._sum([part.value for part in self._parts])

    @property
    def resolution(self) -> float:
        return sum(abs(c) * part.resolution for c, part in zip(self._coefficients, self._parts, strict=True))

    def swapped(self, index: int, new: Tensor) -> float:
        return self._sum([part.swapped(index, new) for part in self._parts])

    def swap(self, index: int, new: Tensor) -> None:
        for part in self._parts:
            part.swap(index, new)

    def settle(self) -> None:
        for part in self._parts:
            part.settle()

    def _sum(self, values: Sequence[float]) -> float:
        return sum(c * value for c, value in zip(self._coefficients, values, strict=True))


def standardised(
    rewards: Sequence[SetReward],
    weights: Sequence[float],
    first: Tensor,
    second: Tensor,
    draws: int = 16,
    seed: int = 0,
) -> WeightedSum:
    """The mix sum_k w_k R_k / s_k for n pairs of samples with features (n, d) each.

    s_k is the standard deviation of R_k over ``draws`` sets that take one sample of every pair at random, so that the
    weights compare what the choice of samples can change and not the units. A reward that it cannot change is left out
    (coefficient 0). ValueError for fewer than 2 draws, and for a reward that is not finite.
    """
    _require_weights(rewards, weights)
    if first.ndim != 2 or first.shape != second.shape:
        raise ValueError(f"features must be (n, d) of paired samples, not {first.shape} and {second.shape}")
    if draws < 2:
        raise ValueError(f"draws must be 2 or more, not {draws}")
    generator = torch.Generator().manual_seed(seed)
    sides = torch.stack([torch.randint(2, (len(first), 1), generator=generator) for _ in range(draws)]).bool()
    sets = [torch.where(side.to(first.device), second, first) for side in sides]
    return WeightedSum(
        tuple(rewards),
        tuple(w * _inverse_spread([reward(one) for one in sets]) for reward, w in zip(rewards, weights, strict=True)),
    )


@dataclass(frozen=True)
class OfColumns:
    """``reward`` of the features' columns from ``start`` to ``stop`` alone."""

    reward: SetReward
    start: int
    stop: int

    def __call__(self, features: Tensor) -> float:
        return self.reward(features[:, self.start : self.stop])

    def statistic(self, features: Tensor) -> SetStatistic:
        """For changes of one member."""
        inner = set_statistic(self.reward, features[:, self.start : self.stop])
        return _ColumnStatistic(inner, slice(self.start, self.stop))


class _ColumnStatistic:
    def __init__(self, inner: SetStatistic, columns: slice) -> None:
        self._inner, self._columns = inner, columns

    @property
    def value(self) -> float:
        return self._inner.value

    @property
    def resolution(self) -> float:
        return self._inner.resolution

    def swapped(self, index: int, new: Tensor) -> float:
        return self._inner.swapped(index, new[self._columns])

    def swap(self, index: int, new: Tensor) -> None:
        self._inner.swap(index, new[self._columns])

    def settle(self) -> None:
        self._inner.settle()


def mean_of_all(features: Tensor) -> float:
    """The mean of all values: the quality of a set whose features are its members' own rewards."""
    return float(features.mean())


def with_quality(
    reward: SetReward, weight: float, first: Tensor, second: Tensor, quality_first: Tensor, quality_second: Tensor
) -> tuple[SetReward, Tensor, Tensor]:
    """A set reward of n pairs' features (n, d) plus ``weight`` times the mean of their members' own rewards (n,), both
    ``standardised``; and the features (n, d + 1) to give it."""
    width = first.shape[1]
    one, other = (
        torch.cat([features, own[:, None]], 1) for features, own in ((first, quality_first), (second, quality_second))
    )
    parts = (OfColumns(reward, 0, width), OfColumns(mean_of_all, width, width + 1))
    return standardised(parts, (1.0, weight), one, other), one, other


def _inverse_spread(values: Sequence[float]) -> float:
    """1 / standard deviation, or 0 where the values differ by round-off only."""
    if not all(math.isfinite(value) for value in values):
        raise ValueError(f"a set reward is not finite on some of the sets: {values}")
    spread = float(torch.tensor(values, dtype=torch.float64).std())
    return 1 / spread if spread > 1e-9 * max(abs(value) for value in values) else 0.0


def _require_weights(rewards: Sequence[SetReward], weights: Sequence[float]) -> None:
    if not rewards or len(rewards) != len(weights):
        raise ValueError(f"expected one weight per reward, got {len(weights)} for {len(rewards)}")
    if not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"weights must be finite, not {tuple(weights)}")
