"""Step schedules: which steps a round samples with noise, stores and trains."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args


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
    """No step: the method learns only from final samples, and sampling is deterministic."""

    def __call__(self, usable: Sequence[int], total: int, round_index: int, seed: int) -> tuple[int, ...]:
        return ()


@dataclass(frozen=True)
class AllSteps:
    """Every trainable step of the grid."""

    def __call__(self, usable: Sequence[int], total: int, round_index: int, seed: int) -> tuple[int, ...]:
        return _require_some(usable)


@dataclass(frozen=True)
class LastSteps:
    """The last steps of the grid, with noise or without.

    Args:
        size: The number of steps, or the fraction of the grid's in (0, 1), rounded up; None takes all steps.
        least: The smallest number of steps that the grid must have.
    """

    size: int | float | None = None
    least: int = 1

    def __post_init__(self) -> None:
        if self.size is not None and not (0 < self.size < 1 or (self.size >= 1 and self.size == int(self.size))):
            raise ValueError(f"the last steps must be a number of at least 1, or a fraction in (0, 1), not {self.size}")

    def __call__(self, usable: Sequence[int], total: int, round_index: int, seed: int) -> tuple[int, ...]:
        size = total if self.size is None else math.ceil(self.size * total) if self.size < 1 else int(self.size)
        if max(size, self.least) > total:
            needed = f"trains the last {size} steps" if size > total else f"needs {self.least} active steps or more"
            raise ValueError(f"the recipe {needed}, but there are only {total}: lower its steps, or raise num_steps")
        return tuple(range(total - size, total))


@dataclass(frozen=True)
class RandomLastSteps:
    """A random number of last steps, drawn once per round, as in AlignProp (arXiv 2310.03739).

    The fraction of the grid's steps is normally distributed. It is rounded up to a number of steps, as in the published
    code, and drawn again until that is at least one and fewer than all.

    Args:
        mean: The mean of the fraction.
        std: Its standard deviation.
    """

    mean: float = 0.16
    std: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.mean < 1 or not 0 < self.std <= 1:
            raise ValueError(f"mean and std must be fractions of the steps in (0, 1), not {self.mean} and {self.std}")

    def __call__(self, usable: Sequence[int], total: int, round_index: int, seed: int) -> tuple[int, ...]:
        if total < 2:
            raise ValueError("a random number of last steps needs at least 2 sampling steps")
        generator, size = random.Random(f"{seed}/{round_index}"), 0
        while not 1 <= size < total:
            size = math.ceil(total * generator.gauss(self.mean, self.std))
        return tuple(range(total - size, total))


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
            raise ValueError(f"recipe.window_reach must be a fraction of the steps in (0, 1], not {self.reach}")

    def __call__(self, usable: Sequence[int], total: int, round_index: int, seed: int) -> tuple[int, ...]:
        limit = max(1, round(self.reach * total))
        windows = [window for window in _windows(usable, self.size, total) if window[0] < limit]
        return random.Random(f"{seed}/{round_index}").choice(windows)


Pace = Literal["progressive", "decay", "exp_decay"]
"""How long a sliding window stays, by the names of MixGRPO's code."""


@dataclass(frozen=True)
class SlidingWindow:
    """A window of ``size`` consecutive steps that slides over the grid (MixGRPO, arXiv 2507.21802, section 3.3).

    The window moves by ``stride`` steps after a number of rounds that depends on its first step t, by ``pace``, one of
    the strategies of the published code:

    progressive  rounds_each
    decay        falls linearly in t from rounds_each to a quarter of it, at step T - 2
    exp_decay    ceil(rounds_each exp(-decay_rate max(0, t - decay_after)))

    At the end of the grid the window starts over, as with the published ``roll_back``, where it first shrinks step by
    step to nothing; here it keeps its size.

    Args:
        size: The number of steps.
        rounds_each: The rounds at the first position.
        stride: The number of steps by which the window moves.
        pace: How the number of rounds depends on the position.
        decay_rate: The decay per step, for "exp_decay".
        decay_after: The first step from which the number of rounds falls, for "exp_decay".

    Raises:
        ValueError: A number is out of range, or the pace is unknown.
    """

    size: int
    rounds_each: int = 25
    stride: int = 1
    pace: Pace = "progressive"
    decay_rate: float = 0.1
    decay_after: int = 13

    def __post_init__(self) -> None:
        if min(self.size, self.rounds_each, self.stride) < 1 or self.decay_rate < 0:
            raise ValueError(
                "a sliding window needs size, rounds_each and stride of at least 1, and a decay_rate of at least 0"
            )
        if self.pace not in get_args(Pace):
            raise ValueError(f"recipe.pace must be one of {', '.join(get_args(Pace))}, not {self.pace!r}")

    def rounds_at(self, step: int, total: int) -> int:
        """Return the number of rounds in which the window begins at ``step`` of ``total`` steps."""
        if self.pace == "exp_decay":
            return math.ceil(self.rounds_each * math.exp(-self.decay_rate * max(0, step - self.decay_after)))
        if self.pace == "progressive":
            return self.rounds_each
        least, progress = max(1, self.rounds_each // 4), min(1.0, step / max(1, total - 2))
        return max(least, int(self.rounds_each * (1 - progress) + least * progress))

    def __call__(self, usable: Sequence[int], total: int, round_index: int, seed: int) -> tuple[int, ...]:
        windows = _windows(usable, self.size, total)[:: self.stride]
        cycle = [window for window in windows for _ in range(self.rounds_at(window[0], total))]
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
