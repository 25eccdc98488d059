"""Named algorithms: each a short composition of a kernel, the steps it trains, a credit and an objective."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

from torch import Tensor

from genalign.advantages import group_advantages
from genalign.dynamics import FlowSDE, Kernel, trainable_steps
from genalign.objectives import KLForm
from genalign.types import Grid


class Credit(Protocol):
    """From scores (B,) and prompt indices (B,) to advantages (B,)."""

    def __call__(self, scores: Tensor, group: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Window:
    """``size`` consecutive trainable steps, beginning anywhere in the first ``reach`` of the grid's steps (a fraction
    of T); drawn once per round, the same for every sample and process."""

    size: int
    reach: float = 0.5

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"recipe.window must be at least 1 step, not {self.size}; null trains every step")
        if not 0 < self.reach <= 1:
            raise ValueError(f"recipe.window_reach is a fraction of the steps in (0, 1], not {self.reach}")


@dataclass(frozen=True)
class ClippedSurrogate:
    """PPO's clipped surrogate on each stored transition, plus ``kl`` times a distance from the reference policy."""

    clip_range: float
    kl: float
    kl_form: KLForm


@dataclass(frozen=True)
class Recipe:
    """A training method of the trajectory family. ``shared_noise``: one initial noise per group of samples."""

    kernel: Kernel
    window: Window | None
    shared_noise: bool
    credit: Credit
    objective: ClippedSurrogate

    def steps(self, grid: Grid, round_index: int, seed: int) -> tuple[int, ...]:
        """The steps that this round samples with noise and trains.

        Raises ValueError where the kernel has no trainable step on the grid, or fewer in a row than the window.
        """
        usable = trainable_steps(self.kernel, grid)
        if not usable:
            raise ValueError(
                f"{self.kernel} has no trainable step on this grid: a trajectory objective needs a stochastic kernel,"
                " such as FlowSDE, CPS or DPMSDE, and more than one step"
            )
        if self.window is None:
            return usable
        limit = max(1, round(self.window.reach * len(grid)))
        windows = [tuple(range(i, i + self.window.size)) for i in usable if i < limit]
        windows = [window for window in windows if set(window) <= set(usable)]
        if not windows:
            raise ValueError(
                f"recipe.window is {self.window.size} steps, but only steps {list(usable)} of {len(grid)} can be"
                " trained: use a smaller window or more sampling steps"
            )
        return random.Random(f"{seed}/{round_index}").choice(windows)


def flow_grpo(
    kernel: Kernel = FlowSDE(0.7),  # noqa: B008  # kernels are frozen
    window: int | None = None,
    window_reach: float = 0.5,
    clip_range: float = 1e-4,
    kl: float = 0.0,
    kl_form: KLForm = "exact",
    std: Literal["group", "global"] = "group",
    shared_noise: bool = True,
) -> Recipe:
    """Flow-GRPO (arXiv 2505.05470, sections 4.1-4.2): group-normalised rewards, a clipped surrogate on SDE steps.

    ``window`` None trains every trainable step; a number trains that many and samples the others by the ODE
    (Flow-GRPO-Fast). ``std`` "global" is the published default. Left out: rewards per step.
    """
    return Recipe(
        kernel=kernel,
        window=None if window is None else Window(window, window_reach),
        shared_noise=shared_noise,
        credit=partial(group_advantages, std=std),
        objective=ClippedSurrogate(clip_range, kl, kl_form),
    )
