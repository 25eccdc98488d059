"""Rewards of whole sets of samples, from their features (n, d) in one embedding; higher is better.

They are ``genalign.types.SetReward``s that also know their change when one member is replaced
(``genalign.demonstrations.IncrementalReward``). Compare their values at equal n only: all but KID depend on it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from genalign.demonstrations import Rescored, SetStatistic, set_statistic
from genalign.divergences import (
    FrechetStatistic,
    Gaussian,
    MMDReference,
    MMDStatistic,
    VendiStatistic,
    gaussian_distance,
    polynomial_kernel,
    vendi,
)
from genalign.types import SetReward


@dataclass(frozen=True, eq=False)
class FrechetTo:
    """-Frechet distance (FID, FAD) to a reference set of features (m, d). ValueError for a set or m below 2: one sample
    has no covariance."""

    reference: Tensor
    gaussian: Gaussian = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "gaussian", Gaussian.of(self.reference))

    def __call__(self, features: Tensor) -> float:
        return -gaussian_distance(Gaussian.of(features), self.gaussian)

    def statistic(self, features: Tensor) -> SetStatistic:
        """For changes of one member."""
        return FrechetStatistic(features, self.gaussian)


@dataclass(frozen=True, eq=False)
class KIDTo:
    """-KID to a reference set of features (m, d), all of it at once: memory for (m, m). ValueError for a set or m below
    2."""

    reference: Tensor
    prepared: MMDReference = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "prepared", MMDReference.of(self.reference, polynomial_kernel))

    def __call__(self, features: Tensor) -> float:
        return MMDStatistic(features, self.prepared).value

    def statistic(self, features: Tensor) -> SetStatistic:
        """For changes of one member."""
        return MMDStatistic(features, self.prepared)


@dataclass(frozen=True)
class Vendi:
    """The Vendi score of ``order``: how many different samples there are, by their directions alone.

    It has no notion of quality: mix it with a reward that does. For an order other than 1, every change of a member
    costs a whole score.
    """

    order: float = 1.0

    def __post_init__(self) -> None:
        if not self.order >= 0:
            raise ValueError(f"order must be 0 or more, not {self.order}")

    def __call__(self, features: Tensor) -> float:
        return vendi(features, self.order)

    def statistic(self, features: Tensor) -> SetStatistic:
        """For changes of one member."""
        return VendiStatistic(features) if self.order == 1 else Rescored(self, features)


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


def per_sample_frechet(tokens: Tensor, reference: Gaussian) -> Tensor:
    """-Frechet distance of each sample's own tokens to a reference: (B,) float32 for tokens (B, n, d).

    DRAGON's instance-to-distribution reward (arXiv 2504.15217), there of a song's frames and here as well of an image's
    patches: ``tokens`` are n of them per sample, ``reference`` the statistics of tokens of many samples. NaN for a
    sample with a token that is not finite; ValueError for n < 2. Many tokens are needed: the distance has a bias of
    about 1 / n.
    """
    if tokens.ndim != 3:
        raise ValueError(f"tokens must be (B, n, d), not {tuple(tokens.shape)}")
    rewards = [
        -gaussian_distance(Gaussian.of(sample), reference) if bool(sample.isfinite().all()) else math.nan
        for sample in tokens
    ]
    return torch.tensor(rewards, dtype=torch.float32, device=tokens.device)


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
