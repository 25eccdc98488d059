"""Two models by a reward of whole sets, at equal size: how often random parts of one set beat those of the other."""

from __future__ import annotations

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
