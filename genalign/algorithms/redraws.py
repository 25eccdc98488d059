"""Rules that draw other samples in place of zero-variance groups, which give no gradient.

B samples of a round, P prompts. A round keeps its size: each further sample takes the place of one that is dropped.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from genalign.algorithms.advantages import group_spread
from genalign.algorithms.interfaces import RoundScores
from genalign.types import Prompt

Member = tuple[int, int]
"""A sample of a round: the index of its prompt, and its number in the prompt's group."""


@dataclass(frozen=True)
class Redraw:
    """Samples that take the places of others in a round.

    Attributes:
        prompts: The prompts of the round so far, and then any further ones.
        members: For each of the round's B samples the one that replaces it; None keeps it.
    """

    prompts: tuple[Prompt, ...]
    members: tuple[Member | None, ...]

    @property
    def rows(self) -> Tensor:
        """Mask (B,) bool of the samples that are replaced."""
        return torch.tensor([member is not None for member in self.members])

    def group(self, group: Tensor) -> Tensor:
        """Return the prompt index (B,) of each sample after the redraw, from the index before it."""
        drawn = torch.tensor([-1 if member is None else member[0] for member in self.members])
        return torch.where(drawn < 0, group, drawn)


class RedrawRule(Protocol):
    """A rule for what to draw after a round was scored; it is called again until it returns None.

    ``whole_groups`` says that groups keep their size and order. ``extra`` is the largest number of further samples, as
    a multiple of the round's size.
    """

    @property
    def whole_groups(self) -> bool: ...

    @property
    def extra(self) -> float: ...

    def __call__(
        self, prompts: Sequence[Prompt], scores: RoundScores, further: Sequence[Prompt], limit: int
    ) -> Redraw | None:
        """Choose what to draw, or nothing.

        Args:
            prompts: The prompts of the round so far, at the indices of ``scores.group``.
            scores: The scores of its samples.
            further: Other prompts, in the order in which to take them.
            limit: The largest number of samples to draw.
        """


@dataclass(frozen=True)
class DynamicSampling:
    """DAPO's dynamic sampling (arXiv 2503.14476, section 3.2): further prompts in place of zero-variance groups.

    The published rule samples until a batch is full. Here a round draws at most ``extra`` times its size again;
    zero-variance groups that remain then are kept, and give no gradient.
    """

    whole_groups: ClassVar[bool] = True
    extra: float = 1.0

    def __post_init__(self) -> None:
        _require_extra(self.extra)

    def __call__(
        self, prompts: Sequence[Prompt], scores: RoundScores, further: Sequence[Prompt], limit: int
    ) -> Redraw | None:
        keys, std = group_spread(scores.combined, scores.group)
        size = len(scores.group) // len(keys)
        zero_variance = keys[std == 0].tolist()[: min(len(further), limit // size)]
        if not zero_variance:
            return None
        place = {group: len(prompts) + number for number, group in enumerate(zero_variance)}
        members = [
            (place[group], row % size) if group in place else None for row, group in enumerate(scores.group.tolist())
        ]
        return Redraw((*prompts, *further[: len(zero_variance)]), tuple(members))


@dataclass(frozen=True)
class AdaptiveGroupSize:
    """More samples of groups whose scores vary, in place of zero-variance groups, after the idea of Knapsack RL.

    That paper divides a budget of samples among prompts by their success rates in earlier rounds. Here the places of
    the round's own zero-variance groups are divided by Neyman's allocation (``allocation``), which needs no rates and
    takes scores of any scale. Groups become unequal, so the loss must not couple their samples.
    """

    whole_groups: ClassVar[bool] = False
    extra: float = 1.0

    def __post_init__(self) -> None:
        _require_extra(self.extra)

    def __call__(
        self, prompts: Sequence[Prompt], scores: RoundScores, further: Sequence[Prompt], limit: int
    ) -> Redraw | None:
        keys, std = group_spread(scores.combined, scores.group)
        free = torch.isin(scores.group, keys[std == 0]).nonzero()[:limit, 0].tolist()
        live = std > 0
        if not free or not bool(live.any()):
            return None
        counts = torch.bincount(scores.group)[keys[live]]
        added = allocation(std[live], counts, len(free)).tolist()
        drawn = [
            (group, count + number)
            for group, count, more in zip(keys[live].tolist(), counts.tolist(), added, strict=True)
            for number in range(more)
        ]
        place = dict(zip(free, drawn, strict=True))
        return Redraw(tuple(prompts), tuple(place.get(row) for row in range(len(scores.group))))


def allocation(std: Tensor, counts: Tensor, extra: int) -> Tensor:
    """Divide ``extra`` samples among groups so that the sum of std^2 / count is least (Neyman, 1934), (P,) long.

    Each goes where it lowers the sum most, by std^2 / (n (n + 1)) for a group of n; ties go to the first group.

    Args:
        std: The standard deviations (P,) of the groups' scores.
        counts: The numbers (P,) of samples that the groups have.
        extra: The number of samples to divide.
    """
    added = torch.zeros_like(counts)
    pairs = zip(std.tolist(), counts.tolist(), strict=True)
    gains = [(-(s**2) / (n * (n + 1)), place) for place, (s, n) in enumerate(pairs)]
    heapq.heapify(gains)
    for _ in range(extra):
        _, place = gains[0]
        added[place] += 1
        n = int(counts[place] + added[place])
        heapq.heapreplace(gains, (-(float(std[place]) ** 2) / (n * (n + 1)), place))
    return added


def _require_extra(extra: float) -> None:
    if not 0 < extra < float("inf"):
        raise ValueError(f"extra must be a positive, finite multiple of a round's size, not {extra}")
