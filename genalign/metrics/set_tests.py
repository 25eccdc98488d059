"""Comparison of two models by a reward of whole sets, on parts of equal size."""

from __future__ import annotations

import torch
from torch import Tensor

from genalign.types import SetReward


def compare_parts(
    reward: SetReward, before: Tensor, after: Tensor, size: int, seed: int = 0
) -> list[tuple[float, float]]:
    """Score disjoint random parts of two sets of features, both (n, d), of the same prompts in the same order.

    Distances and diversities depend on the size of a set, so only parts of one size are comparable. Disjoint parts
    are independent trials, as tests of win rates need them (``genalign.metrics.intervals.win_test``).

    Args:
        reward: Any set reward; higher is better.
        before: Features (n, d) of the first model's samples.
        after: Features (n, d) of the second model's samples.
        size: The number of samples of a part; the n % size samples that remain are left out.
        seed: The seed of the division into parts.

    Returns:
        The rewards of each part, before and after.

    Raises:
        ValueError: The sets differ in shape, or ``size`` is below 2 or above n.
    """
    if before.shape != after.shape or not 2 <= size <= len(before):
        shapes = f"{tuple(before.shape)} and {tuple(after.shape)}"
        raise ValueError(f"sets of {shapes} have no common parts of {size}: give equal ones, and 2 to their size")
    order = torch.randperm(len(before), generator=torch.Generator().manual_seed(seed))
    parts = order[: len(order) // size * size].view(-1, size)
    return [(reward(before[part]), reward(after[part])) for part in parts]
