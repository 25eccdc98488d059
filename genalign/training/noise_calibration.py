"""Noise levels per step by DenseGRPO's reward-aware calibration (arXiv 2601.20218, algorithm 1).

The paper leaves some choices open. Here the band within which gains and losses count as balanced is in standard
deviations of the difference of the two counts, so it does not shrink as more trajectories are sampled; a level
moves by a fraction of its initial value and stays within ``bounds`` of it; gains of exactly 0 count as neither; and the
result is the mean over the second half of the iterations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from genalign.algorithms.interfaces import RoundScores
from genalign.algorithms.recipe import Recalibration, Recipe
from genalign.diffusion.completion import Completion
from genalign.diffusion.transitions import CalibratedSDE, FlowSDE, Kernel, trainable_steps
from genalign.runtime.files import write_json
from genalign.runtime.state import State
from genalign.runtime.text_files import read_json
from genalign.scoring.score import combine
from genalign.training.sampler import Sampler
from genalign.types import Grid, Prompt


@dataclass(frozen=True)
class Calibration:
    """A calibration of the noise level of every step, which moves after each round of samples.

    Args:
        iterations: Number of rounds of samples.
        step: The change of a level per iteration, as a fraction of its initial value.
        band: A level rises if the numbers of gains and losses differ by less than this many standard deviations, and
            falls otherwise.
        bounds: Smallest and largest level, as multiples of its initial value.
    """

    iterations: int = 20
    step: float = 0.05
    band: float = 1.0
    bounds: tuple[float, float] = (0.2, 3.0)

    def __post_init__(self) -> None:
        if self.iterations < 2 or not 0 < self.step < 1 or self.band <= 0 or not 0 < self.bounds[0] < self.bounds[1]:
            raise ValueError(
                "a calibration needs at least 2 iterations, a step in (0, 1), a positive band and ascending positive"
                f" bounds, not {self}"
            )


def initial_levels(grid: Grid, noise_level: float = 0.7) -> Tensor:
    """Return the noise rates (T,) of ``FlowSDE(noise_level)``, float64."""
    return noise_rates(FlowSDE(noise_level), grid)


def noise_rates(kernel: Kernel, grid: Grid) -> Tensor:
    """Return the noise rates (T,) s / sqrt(D) of a kernel, float64, for a step from sigma to sigma - D."""
    step = grid[torch.arange(len(grid))]
    return kernel(step).s / (step.sigma - step.sigma_next).sqrt()


def calibrate(
    sampler: Sampler,
    recipe: Recipe,
    rounds: Iterator[Sequence[Prompt]],
    settings: Calibration = Calibration(),
) -> Iterator[CalibratedSDE]:
    """Yield the kernel after every iteration; the last is the result.

    Each iteration samples one round of prompts with noise at every trainable step, and counts for each step the
    samples whose completed reward it raised or lowered.

    Args:
        sampler: The sampler of the rounds.
        recipe: The method whose kernel is calibrated.
        rounds: The prompts of each round.
        settings: Iterations, step size and bounds.
    """
    first = initial_levels(sampler.grid)
    levels, seen, weights = first, [], [reward.weight for reward in sampler.rewards]
    names = tuple(reward.name for reward in sampler.rewards if reward.weight)
    sigmas = tuple(sampler.grid.sigma.tolist())
    for iteration, prompts in zip(range(settings.iterations), rounds, strict=False):
        kernel = CalibratedSDE(tuple(levels.tolist()), sigmas, sampler.guidance, names)
        steps = trainable_steps(kernel, sampler.grid)

        # Combined reward gains (N, S) of every sample at every step
        noisy = replace(recipe, kernel=kernel, completion=Completion())
        batches = sampler(noisy, steps, prompts, f"calibration/{iteration}")
        scores = torch.cat([batch.stepwise for batch in batches if batch.stepwise is not None])
        gains = combined_gains(scores, weights)
        levels = moved_levels(levels, first, steps, gains, settings)
        seen.append(levels)
        mean = torch.stack(seen[len(seen) // 2 :]).mean(0)
        yield replace(kernel, levels=tuple(mean.tolist()))


def combined_gains(stepwise: Tensor, weights: Sequence[float]) -> Tensor:
    """Return the gain (N, S) of the combined reward by every step, from scores (N, S + 1, K) of completed states."""
    return combine(stepwise.flatten(0, 1), weights).view(stepwise.shape[:2]).diff(dim=1)


def moved_levels(
    levels: Tensor, first: Tensor, steps: Sequence[int], gains: Tensor, settings: Calibration = Calibration()
) -> Tensor:
    """Move the levels of some steps after a round: up if gains and losses balance, else down; unchanged without any.

    Args:
        levels: The levels (T,) of all steps.
        first: Their initial values (T,), to which step size and bounds are relative.
        steps: The S steps that were sampled with noise.
        gains: The gain (N, S) of the completed reward by every step.
        settings: Step size, band and bounds.
    """
    up, down = (gains > 0).sum(0).double(), (gains < 0).sum(0).double()
    balanced = (up - down).abs() < settings.band * (up + down).sqrt()
    direction = torch.where(balanced, 1.0, -1.0).double() * (up + down > 0)
    moved = levels.clone()
    moved[list(steps)] += settings.step * first[list(steps)] * direction
    return moved.clamp(first * settings.bounds[0], first * settings.bounds[1])


class MovingNoise:
    """The kernel of a run that is recalibrated, see ``recipe.Recalibration``; the same on all ranks.

    Args:
        settings: When the levels move, and how far.
        kernel: The initial kernel.
        grid: The grid of the rollouts.
        guidance: Their guidance scale.
        rewards: The names of the rewards of non-zero weight.

    Raises:
        ValueError: The kernel has no adjustable noise rate.
    """

    def __init__(
        self, settings: Recalibration, kernel: Kernel, grid: Grid, guidance: float, rewards: Sequence[str]
    ) -> None:
        self.settings, self.grid, self.kernel = settings, grid, kernel
        self.circumstances = tuple(grid.sigma.tolist()), guidance, tuple(rewards)
        self.first = self.levels = noise_rates(kernel, grid)
        step = grid[torch.arange(len(grid))]
        if not torch.allclose(self._kernel(self.first)(step).c, kernel(step).c):
            raise ValueError(
                f"{kernel} has no noise rate to recalibrate: choose FlowSDE, DanceSDE or a calibrated kernel, or leave"
                " the recalibration out"
            )

    def after_round(self, index: int, steps: Sequence[int], scores: RoundScores) -> dict[str, float]:
        """Move the levels if due after round ``index``; return the levels of the stored ``steps`` as metrics.

        A level never rises so far that its step can no longer be trained.
        """
        if (index + 1) % self.settings.every == 0 and scores.stepwise is not None:
            gains = combined_gains(scores.stepwise, scores.weights)
            moved = moved_levels(self.levels, self.first, steps, gains, Calibration(step=self.settings.step))
            lost = list(set(steps).difference(trainable_steps(self._kernel(moved), self.grid)))
            moved[lost] = self.levels[lost]
            self.levels, self.kernel = moved, self._kernel(moved)
        return {f"noise_level/{step}": float(self.levels[step]) for step in steps}

    def _kernel(self, levels: Tensor) -> CalibratedSDE:
        return CalibratedSDE(tuple(levels.tolist()), *self.circumstances)

    def state(self) -> State:
        """Return the current levels (T,)."""
        return State({"levels": self.levels}, {"moved": self.kernel == self._kernel(self.levels)})

    def restore(self, state: State) -> None:
        """Restore the levels and their kernel, which is the recipe's own before the first move."""
        self.levels = state.tensors["levels"]
        if state.numbers["moved"]:
            self.kernel = self._kernel(self.levels)


def save_kernel(kernel: CalibratedSDE, path: Path) -> None:
    """Write the levels as JSON, with the grid, guidance and rewards that they hold for."""
    write_json(path, asdict(kernel))


def calibrated(path: str) -> CalibratedSDE:
    """Read the kernel that ``genalign calibrate`` wrote to ``path``."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no calibration in {path}: write one with genalign calibrate --output {path}")
    stored = read_json(Path(path))
    try:
        return CalibratedSDE(
            tuple(stored["levels"]), tuple(stored["sigmas"]), float(stored["guidance"]), tuple(stored["rewards"])
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a calibration: write one with genalign calibrate") from error
