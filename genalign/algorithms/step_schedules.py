"""Step schedules: which steps a round samples with noise, stores and trains."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class StepSchedule(Protocol):
    """A rule that chooses the steps of a round, the same on every rank, from the trainable steps of a grid."""

    def __call__(self, usable: Sequence[int], total: int, round_index: int, seed: int) -> tuple[int, ...]:
        """Choose the steps.

        Args:
            usable: The grid indices of the steps that can be trained.
            total: The number of steps T of the grid.
            round_index: The number of the round, from 0.
            seed: The seed of the run.

        Raises:
            ValueError: Too few steps can be trained.
        """
        ...


@dataclass(frozen=True)
class NoSteps:
    """No step: the method learns from final samples alone, and sampling is deterministic."""

    def __call__(self, usable: Sequence[int], total: int, round_index: int, seed: int) -> tuple[int, ...]:
        return ()


@dataclass(frozen=True)
class AllSteps:
    """Every trainable step of the grid."""

    def __call__(self, usable: Sequence[int], total: int, round_index: int, seed: int) -> tuple[int, ...]:
        return _require_some(usable)


@dataclass(frozen=True)
class RandomWindow:
    """A window of ``size`` consecutive steps at random, as in Flow-GRPO-Fast and MixGRPO's "random" strategy.

    It is drawn once per round and begins within the fraction ``reach`` of the grid's steps.
    """

    size: int
    reach: float = 0.5

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"recipe.window must be at least 1 step, not {self.size}; null trains every step")
        if not 0 < self.reach <= 1:
            raise ValueError(f"recipe.window_reach is a fraction of the steps in (0, 1], not {self.reach}")

    def __call__(self, usable: Sequence[int], total: int, round_index: int, seed: int) -> tuple[int, ...]:
        limit = max(1, round(self.reach * total))
        windows = [window for window in _windows(usable, self.size, total) if window[0] < limit]
        return random.Random(f"{seed}/{round_index}").choice(windows)


@dataclass(frozen=True)
class SlidingWindow:
    """A window of ``size`` consecutive steps that slides over the grid, MixGRPO's "progressive" strategy.

    See arXiv 2507.21802, section 3.3. The window moves by ``stride`` steps every ``rounds_each`` rounds and starts over
    at the end. With ``decay`` > 0, MixGRPO's "decay" strategy, it stays ceil(rounds_each exp(-decay n)) rounds at its
    n-th position, since early steps decide more than late steps.
    """

    size: int
    rounds_each: int = 25
    stride: int = 1
    decay: float = 0.0

    def __post_init__(self) -> None:
        if min(self.size, self.rounds_each, self.stride) < 1 or self.decay < 0:
            raise ValueError(
                "a sliding window needs size, rounds_each and stride of at least 1, and decay of at least 0"
            )

    def __call__(self, usable: Sequence[int], total: int, round_index: int, seed: int) -> tuple[int, ...]:
        windows = _windows(usable, self.size, total)[:: self.stride]
        rounds = [max(1, math.ceil(self.rounds_each * math.exp(-self.decay * n))) for n in range(len(windows))]
        cycle = [window for window, count in zip(windows, rounds, strict=True) for _ in range(count)]
        return cycle[round_index % len(cycle)]


def _require_some(usable: Sequence[int]) -> tuple[int, ...]:
    if not usable:
        raise ValueError(
            "the kernel has no trainable step on this grid: a trajectory objective needs a stochastic kernel, such as"
            " FlowSDE, CPS or DPMSDE, and more than one step"
        )
    return tuple(usable)


def _windows(usable: Sequence[int], size: int, total: int) -> list[tuple[int, ...]]:
    """Return all windows of ``size`` consecutive trainable steps."""
    runs = [tuple(range(i, i + size)) for i in _require_some(usable)]
    windows = [run for run in runs if set(run) <= set(usable)]
    if not windows:
        raise ValueError(
            f"recipe.window is {size} steps, but only steps {list(usable)} of {total} can be trained: use a smaller"
            " window or more sampling steps"
        )
    return windows
