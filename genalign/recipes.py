"""Named algorithms: each a short composition of a kernel, the steps it trains, a credit and an objective."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from genalign.advantages import group_advantages
from genalign.completion import Completion
from genalign.dynamics import FlowSDE, Kernel, trainable_steps
from genalign.learning import Credit, Objective, Outcome
from genalign.objectives import KLForm
from genalign.schedules import AllSteps, StepSchedule, Window
from genalign.trajectory import Clipped, Surrogate
from genalign.types import FeatureFunction, Grid


@dataclass(frozen=True)
class Recipe:
    """A training method.

    ``schedule`` chooses the steps that a round samples by ``kernel`` and stores; the others are deterministic.
    ``shared_noise``: one initial noise per group of samples. ``completion`` asks for scores of every stored state's
    ODE completion, ``features`` for those of the samples, for credit that needs them. ``lag`` lets the policy that
    samples trail the one that is trained.
    """

    kernel: Kernel
    schedule: StepSchedule
    shared_noise: bool
    credit: Credit
    objective: Objective
    completion: Completion | None = None
    features: FeatureFunction | None = None
    lag: Lag | None = None

    def steps(self, grid: Grid, round_index: int, seed: int) -> tuple[int, ...]:
        """The steps that a round trains. Raises ValueError where the kernel or the schedule finds none on the grid."""
        try:
            return self.schedule(trainable_steps(self.kernel, grid), len(grid), round_index, seed)
        except ValueError as error:
            raise ValueError(f"{self.kernel}: {error}") from error


@dataclass(frozen=True)
class Lag:
    """The sampling policy's decay towards the trained one after round i: min(``slope`` i, ``limit``)."""

    slope: float = 0.001
    limit: float = 0.5

    def decay(self, round_index: int) -> float:
        """How much of the old weights is kept after a round."""
        return min(self.slope * round_index, self.limit)


@dataclass(frozen=True)
class GroupRelative:
    """Weighted sum of rewards, normalised within the group: GRPO's advantages."""

    std: Literal["group", "global"]

    def __call__(self, outcome: Outcome) -> Tensor:
        return group_advantages(outcome.combined, outcome.group, std=self.std)


def window_of(size: int | None, reach: float) -> StepSchedule:
    """A random window of ``size`` steps, or every trainable step for None."""
    return AllSteps() if size is None else Window(size, reach)


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
        schedule=window_of(window, window_reach),
        shared_noise=shared_noise,
        credit=GroupRelative(std),
        objective=Surrogate(Clipped(clip_range), kl, kl_form),
    )
