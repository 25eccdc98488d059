"""Two models by a reward of whole sets, at equal size: how often random parts of one set beat those of the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from genalign.types import SetReward


@dataclass(frozen=True)
class SetComparison:
    """The rewards of parts of ``size`` members of two sets, drawn together."""

    size: int
    before: tuple[float, ...]
    after: tuple[float, ...]

    @property
    def win_rate(self) -> float:
        """The share of draws where ``after`` is the better one; a tie is half."""
        return sum((a > b) + (a == b) / 2 for b, a in zip(self.before, self.after, strict=True)) / len(self.before)


def compare_sets(
    reward: SetReward, before: Tensor, after: Tensor, size: int | None = None, draws: int = 1000, seed: int = 0
) -> SetComparison:
    """``reward`` of random parts of two sets of features, (n, d) and (m, d), always of one size: distances and
    diversities of sets that differ in size are not comparable. Parts overlap, so their spread is no confidence interval
    of the sets' difference: for that take ``compare_parts``.

    Sets of n = m members are of the same prompts in the same order, and parts hold the same prompts of both; of others
    each part is drawn by itself. ``size`` is half of the smaller set by default; parts have no member twice, which
    would depress diversity.

    Raises:
        ValueError: ``draws`` below 1, or a ``size`` below 2 or above that of a set.
    """
    smaller = min(len(before), len(after))
    size = smaller // 2 if size is None else size
    if draws < 1 or not 2 <= size <= smaller:
        raise ValueError(
            f"parts of {size} members in {draws} draws cannot be taken of sets of {smaller}: give 2 to that"
        )
    generator = torch.Generator().manual_seed(seed)
    rewards: list[tuple[float, float]] = []
    for _ in range(draws):
        first = torch.randperm(len(before), generator=generator)[:size]
        second = first if len(before) == len(after) else torch.randperm(len(after), generator=generator)[:size]
        rewards.append((reward(before[first]), reward(after[second])))
    return SetComparison(size, tuple(pair[0] for pair in rewards), tuple(pair[1] for pair in rewards))


def compare_parts(reward: SetReward, before: Tensor, after: Tensor, size: int, seed: int = 0) -> SetComparison:
    """``reward`` of disjoint random parts of ``size`` members of two sets of features, both (n, d), of the same prompts
    in the same order: trials that are independent of each other, as tests of win rates need them. The n % size members
    that are left over are left out.

    Raises ValueError for sets of different shapes, or a ``size`` below 2 or above n.
    """
    if before.shape != after.shape or not 2 <= size <= len(before):
        shapes = f"{tuple(before.shape)} and {tuple(after.shape)}"
        raise ValueError(f"sets of {shapes} have no common parts of {size}: give equal ones, and 2 to their size")
    order = torch.randperm(len(before), generator=torch.Generator().manual_seed(seed))
    parts = order[: len(order) // size * size].view(-1, size)
    return SetComparison(
        size, tuple(reward(before[part]) for part in parts), tuple(reward(after[part]) for part in parts)
    )


@dataclass(frozen=True)
class Extrapolation:
    """``value`` + ``slope`` / n, fitted by least squares to the ``distances`` of sets of the ``sizes`` n; ``r_squared``
    of the fit."""

    value: float
    slope: float
    r_squared: float
    sizes: tuple[int, ...]
    distances: tuple[float, ...]


def at_infinite_size(
    distance: Callable[[Tensor], float], features: Tensor, smallest: int = 500, points: int = 25, seed: int = 0
) -> Extrapolation:
    """``distance`` of features (n, d) to a reference, freed of its bias of about 1 / n (arXiv 1911.07023, 2311.01616).

    Takes ``points`` sizes evenly from ``smallest`` to n, and of each a random part of the set, without replacement, as
    FID-infinity does. (Parts with replacement, which fadtk takes, are of an endless population with the covariance of
    this very set: their limit keeps its bias.) The distance of the reference set from the truth remains: take a large
    one.

    Raises:
        ValueError: fewer than 2 points, or a ``smallest`` size that is below 2 or not below n.
    """
    if points < 2 or not 2 <= smallest < len(features):
        raise ValueError(
            f"extrapolation needs 2 sizes or more between smallest and {len(features)} features, not {points} from"
            f" {smallest}: lower smallest, or take more samples"
        )
    sizes = torch.linspace(smallest, len(features), points).round().long().tolist()
    generator = torch.Generator().manual_seed(seed)
    parts = [features[torch.randperm(len(features), generator=generator)[:size]] for size in sizes]
    return _fitted(sizes, [distance(part) for part in parts])


def _fitted(sizes: list[int], distances: list[float]) -> Extrapolation:
    x, y = 1 / torch.tensor(sizes, dtype=torch.float64), torch.tensor(distances, dtype=torch.float64)
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    value = y.mean() - slope * x.mean()
    unexplained, spread = (y - value - slope * x).square().sum(), (y - y.mean()).square().sum()
    r_squared = 1 - float(unexplained / spread) if float(spread) > 0 else 1.0
    return Extrapolation(float(value), float(slope), r_squared, tuple(sizes), tuple(distances))
