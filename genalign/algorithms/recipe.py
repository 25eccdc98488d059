"""Recipes: a kernel, a step schedule, a credit and an objective, and what may change during training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from genalign.algorithms.gradient_balance import GradientBalance
from genalign.algorithms.interfaces import Companion, Credit, Objective
from genalign.algorithms.redraws import RedrawRule
from genalign.algorithms.step_schedules import StepSchedule
from genalign.diffusion.completion import Completion
from genalign.diffusion.policy import Policy
from genalign.diffusion.transitions import Kernel, default_kernel, trainable_steps
from genalign.types import FeatureFunction, Grid, Path, Pipeline


@dataclass(frozen=True)
class Lag:
    """An exponential moving average of weights, whose decay after round i is min(first + slope (i - start), limit).

    Args:
        slope: The growth of the decay per round.
        limit: The largest decay.
        start: The first round with a decay; until then the average equals the trained weights.
        first: The decay after that round.
    """

    slope: float = 0.001
    limit: float = 0.5
    start: int = 0
    first: float = 0.0

    def decay(self, round_index: int) -> float:
        """Return the decay after a round: the fraction of the old weights that is kept."""
        if round_index < self.start:
            return 0.0
        return min(self.first + self.slope * (round_index - self.start), self.limit)


@dataclass(frozen=True)
class Recalibration:
    """Recalibration of the noise levels during training (DenseGRPO's calibration, arXiv 2601.20218, algorithm 1).

    After every ``every``-th round the levels move according to the gains of that round's samples, which the credit per
    step has already scored, see ``genalign.training.noise_calibration.moved_levels``. The paper calibrates before
    training; the schedule is our choice.

    Args:
        every: The number of rounds between two recalibrations.
        step: The change of a level, as a fraction of its initial value.
    """

    every: int = 1
    step: float = 0.05

    def __post_init__(self) -> None:
        if self.every < 1 or not 0 < self.step < 1:
            raise ValueError(f"a recalibration needs every of at least 1 and a step in (0, 1), not {self}")


@dataclass(frozen=True)
class ElasticReset:
    """Elastic Reset (arXiv 2312.07551): the policy is reset to an average of its weights, and the average to the start.

    Every ``every`` rounds the weights are set to an exponential moving average of themselves (not the one that is
    evaluated and saved), and that average is set to the initial weights. The optimizer's moments are kept, as in the
    published code, which resets about every 1.3 time constants of an average with decay 0.995; the defaults have the
    same ratio for runs of about a hundred updates, which is our choice.

    Args:
        every: The number of rounds between two resets.
        decay: The decay of the average, per optimizer step.
    """

    every: int = 15
    decay: float = 0.95

    def __post_init__(self) -> None:
        if self.every < 1 or not 0 <= self.decay < 1:
            raise ValueError(f"an elastic reset needs every of at least 1 and a decay in [0, 1), not {self}")


@dataclass(frozen=True)
class Recipe:
    """A training method.

    Attributes:
        kernel: The stochastic sampler of the scheduled steps; all other steps follow that of the sampling settings, by
            default the ODE. None takes the published one of the model's path: ``FlowSDE(0.7)`` on a flow, ``DDIM(1.0)``
            on a variance-preserving path, ``DPMSDE`` on any other.
        schedule: The choice of the steps that a round samples with ``kernel``, stores and trains.
        shared_noise: Whether all samples of a group start from the same initial noise.
        credit: The rule from the scores of a round to advantages of samples (B,) or steps (B, S).
        objective: The rule from advantages to gradients.
        completion: How stored states are completed to clean samples and scored, for credit per step; None for no
            scores per step.
        features: The feature function of the samples, for credit from set rewards; None for no features.
        lag: The averaging of the sampling weights; None samples with the trained weights.
        memory: The averaging of another copy of the weights, which does not sample: a loss compares with it, or an
            anchor keeps the policy near it. None for no copy.
        recalibration: When the kernel's noise levels are recalibrated; None never changes them.
        reset: When the weights are reset to their average; None never resets them.
        balance: How rewards are weighted by their gradients; None weighs them as the credit does.
        redraw: What is drawn in place of zero-variance groups; None trains a round as it was drawn.
        companion: Builds a network that learns beside the policy, from the model, the policy and a seed; None for none.
        shifts_noise: Whether the adapter shifts the initial noise, and is off in all later steps (noise hypernetworks).
    """

    kernel: Kernel | None
    schedule: StepSchedule
    shared_noise: bool
    credit: Credit
    objective: Objective
    completion: Completion | None = None
    features: FeatureFunction | None = None
    lag: Lag | None = None
    memory: Lag | None = None
    recalibration: Recalibration | None = None
    reset: ElasticReset | None = None
    balance: GradientBalance | None = None
    redraw: RedrawRule | None = None
    companion: Callable[[Pipeline, Policy, int], Companion] | None = None
    shifts_noise: bool = False

    def __post_init__(self) -> None:
        if self.recalibration and self.completion is None:
            raise ValueError(
                "a recalibration of the noise levels needs scores of every stored state: choose a recipe with a"
                " completion, such as dense_grpo"
            )
        if self.redraw and not self.redraw.whole_groups and self.objective.unit != "sample":
            raise ValueError(
                f"the loss of this recipe couples all samples of a {self.objective.unit}, which unequal groups do not"
                " allow: choose with_dynamic_sampling, or a recipe such as flow_grpo"
            )

    def kernel_on(self, path: Path) -> Kernel:
        """Return the kernel for a model on ``path``."""
        return default_kernel(path) if self.kernel is None else self.kernel

    def steps(self, path: Path, grid: Grid, round_index: int, seed: int) -> tuple[int, ...]:
        """Choose the grid indices of the steps to train in a round, for a model on ``path``.

        Raises ValueError if the grid has too few steps that the kernel can train.
        """
        kernel = self.kernel_on(path)
        try:
            steps = self.schedule(trainable_steps(kernel, grid), len(grid), round_index, seed)
        except ValueError as error:
            raise ValueError(f"{kernel}: {error}") from error
        if len(grid) - 1 in steps and bool(kernel(grid[len(grid) - 1]).s > 0):
            raise ValueError(f"{kernel} ends in noise, which a gradient cannot remove: choose ODE, CPS, DDIM or DPMSDE")
        return steps
