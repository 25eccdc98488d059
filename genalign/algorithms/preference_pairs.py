"""Positive and negative demonstrations from on-policy samples (DRAGON, arXiv 2504.15217).

For a reward of single samples the better of two is positive. A reward of a whole set has no better one: there, two sets
of samples with the same prompts exchange members as long as that makes one of them better.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from genalign.types import SetReward

Criterion = Literal["plus", "gap"]

_TIE = 1e-9  # set rewards that differ by less than this fraction of their value are tied


@dataclass(frozen=True)
class PreferencePairs:
    """M pairs of samples of one prompt each, as indices (M,) long into a batch: ``winners`` form D+, ``losers`` D-."""

    winners: Tensor
    losers: Tensor

    def __post_init__(self) -> None:
        _require_indices(self.winners, self.losers)

    def __len__(self) -> int:
        return len(self.winners)

    def signs(self, samples: int) -> Tensor:
        """+1 for winners, -1 for losers and 0 for the rest of the batch, (samples,) float32."""
        signs = torch.zeros(samples)
        signs[self.winners] = 1.0
        signs[self.losers] = -1.0
        return signs


@dataclass(frozen=True)
class MatchedHalves:
    """Two disjoint sets of samples, as indices (n,) long into a batch, with the same prompt at every position."""

    first: Tensor
    second: Tensor

    def __post_init__(self) -> None:
        _require_indices(self.first, self.second)

    def __len__(self) -> int:
        return len(self.first)

    def where(self, usable: Tensor) -> MatchedHalves:
        """The pairs whose two samples are ``usable`` (B,) bool."""
        both = usable[self.first] & usable[self.second]
        return MatchedHalves(self.first[both], self.second[both])


def best_and_worst_pairs(scores: Tensor, group: Tensor, tolerance: float = 0.0, pairs: int = 1) -> PreferencePairs:
    """Pair the best with the worst sample of every prompt, the second best with the second worst, and so on.

    NaN scores are left out, so M may be 0. Of equal scores the first counts.

    Args:
        scores: (B,).
        group: (B,) long, prompt indices.
        tolerance: A pair that differs by no more is left out.
        pairs: The number of pairs per prompt.
    """
    if scores.shape != group.shape:
        raise ValueError(f"scores and group must both be (B,), not {tuple(scores.shape)} and {tuple(group.shape)}")
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


def paired_halves(group: Tensor) -> MatchedHalves:
    """Split every prompt's samples into a first and a second half, for prompt indices ``group`` (B,) long.

    A prompt's samples keep their order; of an odd number, the last is left out. ValueError where no prompt has two.
    """
    first, second = [], []
    for members in _members(group):
        half = len(members) // 2
        first.append(members[:half])
        second.append(members[half : 2 * half])
    if not any(len(part) for part in first):
        raise ValueError("no prompt has two samples: sample groups of 2 or more")
    return MatchedHalves(torch.cat(first), torch.cat(second))


@dataclass(frozen=True)
class SetSplit:
    """A division of n pairs: D+ holds the second of pair i where ``from_second[i]`` (n,), else the first.

    ``first`` and ``second`` are the rewards of the two sets before any swap, ``plus`` and ``minus`` those of D+ and D-.
    """

    from_second: Tensor
    first: float
    second: float
    plus: float
    minus: float

    def pairs(self, halves: MatchedHalves) -> PreferencePairs:
        """The pairs as indices into the batch that ``halves`` indexes."""
        if len(halves) != len(self.from_second):
            raise ValueError(f"divided {len(self.from_second)} pairs, got indices of {len(halves)}")
        swap = self.from_second.to(halves.first.device)
        first, second = halves.first, halves.second
        return PreferencePairs(torch.where(swap, second, first), torch.where(swap, first, second))


def greedy_swap(
    first: Tensor, second: Tensor, set_reward: SetReward, criterion: Criterion = "plus", passes: int = 1, seed: int = 0
) -> SetSplit:
    """Divide n pairs of samples into a set D+ of high and a set D- of low ``set_reward``.

    Starts with the better of the two sets as D+, visits the pairs in random order, and swaps the two samples of a pair
    where that raises the reward of D+ ("plus") or its lead over D- ("gap"); never at a tie. Stops after ``passes``, or
    after one without a swap. Every prompt stays once in either set. The published account of DRAGON that was available
    does not state its criterion; this greedy rule gives the order of its Table 5.

    Every swap that is tried scores whole sets anew: n calls of ``set_reward`` a pass, twice as many for "gap".

    Args:
        first: features (n, d) of one sample of every pair.
        second: features (n, d) of the other one.
        set_reward: score of a set's features (n, d), float64 on the CPU.
        criterion: what a swap must raise.
        passes: visits of every pair at most.
        seed: of the order of the visits.

    Raises:
        ValueError: fewer than 2 pairs, or a reward of the two sets that is not finite.
    """
    if first.ndim != 2 or first.shape != second.shape:
        shapes = f"{tuple(first.shape)} and {tuple(second.shape)}"
        raise ValueError(f"features must be (n, d) of paired samples, not {shapes}")
    if len(first) < 2:
        raise ValueError(f"a set reward needs 2 pairs of samples or more, got {len(first)}: sample more prompts")
    if criterion not in ("plus", "gap") or passes < 1:
        raise ValueError(f'criterion must be "plus" or "gap" and passes 1 or more, not {criterion!r} and {passes}')
    sets = torch.stack([first.detach().cpu().double(), second.detach().cpu().double()])
    start = [float(set_reward(features)) for features in sets]
    if not math.isfinite(start[0] + start[1]):
        raise ValueError(f"the set reward is not finite: {start[0]} and {start[1]} for the two sets")
    second_is_better = start[1] > start[0]
    from_second = torch.full((len(first),), second_is_better)
    sets = sets.roll(int(second_is_better), 0)
    rewards = sorted(start, reverse=True)  # of D+ and D-, which are sets[0] and sets[1]
    scored = 1 if criterion == "plus" else 2  # how many of the two decide
    generator = torch.Generator().manual_seed(seed)
    for _ in range(passes):
        before = from_second.clone()
        for pair in torch.randperm(len(first), generator=generator).tolist():
            sets[:, pair] = sets[:, pair].flip(0)
            tried = [float(set_reward(features)) for features in sets[:scored]]
            gains = [new - old for new, old in zip(tried, rewards, strict=False)]
            round_off = _TIE * (abs(rewards[0]) + (scored - 1) * abs(rewards[1]))
            if gains[0] - sum(gains[1:]) > round_off:
                rewards[:scored] = tried
                from_second[pair] = ~from_second[pair]
            else:
                sets[:, pair] = sets[:, pair].flip(0)
        if torch.equal(from_second, before):
            break
    if criterion == "plus":
        rewards[1] = float(set_reward(sets[1]))
    return SetSplit(from_second, *start, *rewards)


def _members(group: Tensor) -> list[Tensor]:
    """Indices of the samples of every prompt, prompts ascending, samples in their order."""
    if group.ndim != 1 or group.dtype != torch.long:
        raise TypeError(f"group must hold prompt indices (B,) of torch.long, not {tuple(group.shape)} {group.dtype}")
    sizes = torch.unique(group, return_counts=True)[1]
    return list(torch.split(torch.argsort(group, stable=True), sizes.tolist()))


def _require_indices(one: Tensor, other: Tensor) -> None:
    if one.ndim != 1 or one.shape != other.shape or one.dtype != torch.long or other.dtype != torch.long:
        raise ValueError(f"indices must be two (M,) tensors of torch.long, not {one.shape} and {other.shape}")
