"""Positive and negative demonstrations from on-policy samples (DRAGON, arXiv 2504.15217).

A reward of single samples compares two samples of a prompt. A reward of whole sets cannot: there, two sets of samples
with the same prompts swap members as long as a swap improves one of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from genalign.types import SetReward

Criterion = Literal["plus", "gap"]
"""The quantity that a swap must raise: the reward of D+, or its lead over D-."""

_TIE = 1e-9  # set rewards that differ by less than this fraction of their value are tied


@dataclass(frozen=True)
class PreferencePairs:
    """M pairs of samples of a prompt, as indices (M,) long into a batch: ``winners`` form D+, ``losers`` D-."""

    winners: Tensor
    losers: Tensor

    def __len__(self) -> int:
        return len(self.winners)

    def signs(self, samples: int) -> Tensor:
        """Return +1 for winners, -1 for losers and 0 for the rest of the batch, (samples,) float32."""
        signs = torch.zeros(samples)
        signs[self.winners] = 1.0
        signs[self.losers] = -1.0
        return signs


def best_and_worst_pairs(scores: Tensor, group: Tensor, tolerance: float = 0.0, pairs: int = 1) -> PreferencePairs:
    """Pair the best with the worst sample of every prompt, the second best with the second worst, and so on.

    NaN scores are left out, so there may be no pair. Ties go to the first sample.

    Args:
        scores: Scores (B,).
        group: Prompt indices (B,) long.
        tolerance: The largest score difference at which a pair counts as tied and is left out.
        pairs: The largest number of pairs per prompt.
    """
    if not tolerance >= 0 or pairs < 1:
        raise ValueError(f"tolerance must be 0 or more and pairs 1 or more, not {tolerance} and {pairs}")
    if bool(scores.isinf().any()):
        raise ValueError("scores must not be infinite; a reward that failed is NaN")
    valid = ~scores.isnan()
    winners, losers = [group.new_zeros(0)], [group.new_zeros(0)]
    for members in _members(group):
        members = members[valid[members]]
        best = members[torch.sort(scores[members], descending=True, stable=True).indices]
        worst = members[torch.sort(scores[members], stable=True).indices]
        count = min(pairs, len(members) // 2)
        apart = scores[best[:count]] - scores[worst[:count]] > tolerance
        winners.append(best[:count][apart])
        losers.append(worst[:count][apart])
    return PreferencePairs(torch.cat(winners), torch.cat(losers))


def paired_halves(group: Tensor) -> tuple[Tensor, Tensor]:
    """Split the samples of every prompt into a first and a second half, from prompt indices ``group`` (B,) long.

    The samples of a prompt keep their order; of an odd number, the last is left out.

    Returns:
        Indices (n,) long of the two halves, with the same prompt at every position.
    """
    halves = [members[: len(members) // 2 * 2].view(2, len(members) // 2) for members in _members(group)]
    first, second = torch.cat(halves, dim=1)
    return first, second


def greedy_swap(
    first: Tensor, second: Tensor, set_reward: SetReward, criterion: Criterion = "plus", seed: int = 0
) -> Tensor:
    """Divide n pairs of samples into a set D+ with a high ``set_reward`` and a set D- with a low one.

    Start with the better of the two sets as D+, visit the pairs once, in random order, and swap the two samples of a
    pair where that raises the reward of D+ ("plus") or its lead over D- ("gap"), but not at a tie. Both sets keep one
    sample of every pair. DRAGON's paper does not state its criterion; this greedy rule reproduces the order of its
    Table 5.

    It scores n whole sets, or 2 n with "gap".

    Args:
        first: Features (n, d) of one sample of every pair.
        second: Features (n, d) of the other sample of every pair.
        set_reward: The score of the features (n, d) of a set, in float64 on the CPU.
        criterion: The quantity that a swap must raise.
        seed: The seed of the order of the visits.

    Returns:
        Whether D+ contains the second sample of each pair, (n,) bool.

    Raises:
        ValueError: There are fewer than 2 pairs, or the reward of one of the two sets is not finite.
    """
    if first.ndim != 2 or first.shape != second.shape:
        shapes = f"{tuple(first.shape)} and {tuple(second.shape)}"
        raise ValueError(f"features must be (n, d) of paired samples, not {shapes}")
    if len(first) < 2:
        raise ValueError(f"a set reward needs 2 pairs of samples or more, got {len(first)}: sample more prompts")
    if criterion not in ("plus", "gap"):
        raise ValueError(f'criterion must be "plus" or "gap", not {criterion!r}')
    sets = torch.stack([first.detach().cpu().double(), second.detach().cpu().double()])
    start = [float(set_reward(features)) for features in sets]
    if not math.isfinite(sum(start)):
        raise ValueError(f"the set reward is not finite: {start[0]} and {start[1]} for the two sets")
    second_is_better = start[1] > start[0]
    from_second = torch.full((len(first),), second_is_better)
    sets = sets.roll(int(second_is_better), 0)  # D+ and D-
    rewards = sorted(start, reverse=True)
    scored = 1 if criterion == "plus" else 2  # how many of the two rewards decide
    for pair in torch.randperm(len(first), generator=torch.Generator().manual_seed(seed)).tolist():
        sets[:, pair] = sets[:, pair].flip(0)
        swapped = [float(set_reward(features)) for features in sets[:scored]]
        gains = [new - old for new, old in zip(swapped, rewards, strict=False)]
        round_off = _TIE * (abs(rewards[0]) + (scored - 1) * abs(rewards[1]))
        if gains[0] - sum(gains[1:]) > round_off:
            rewards[:scored] = swapped
            from_second[pair] = ~from_second[pair]
        else:
            sets[:, pair] = sets[:, pair].flip(0)
    return from_second


def _members(group: Tensor) -> list[Tensor]:
    """Return the indices of the samples of every prompt: prompts ascending, samples in their order."""
    sizes = torch.unique(group, return_counts=True)[1]
    return list(torch.split(torch.argsort(group, stable=True), sizes.tolist()))
