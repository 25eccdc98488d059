"""Consistency distillation: a student with the same clean estimate at every level of its teacher's path.

N counts samples times draws, T the steps of the teacher's grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from genalign.algorithms.interfaces import (
    ObjectiveTraits,
    TermCounts,
    TermScales,
    Unit,
    UpdateBatch,
    UpdateContext,
)
from genalign.algorithms.losses import mean_square, require_per_sample
from genalign.algorithms.tails import Mover
from genalign.diffusion.noise import seeded_noise
from genalign.diffusion.paths import VPPath, expand
from genalign.diffusion.transitions import ODE, transition
from genalign.types import Grid, NoiseLevel, NoiseStep, Path

_SIGMA_DATA, _TIMESTEP_SCALE = 0.5, 10.0  # of latent consistency models


def consistency_function(path: Path, x: Tensor, prediction: Tensor, level: NoiseLevel) -> Tensor:
    """Compute f(x, level) = c_skip x + c_out x0_hat (N, ...), which is x itself where no noise is left.

    On a flow, and on a variance-exploding path with preconditioning, the clean estimate x0_hat is x at sigma = 0. On a
    variance-preserving path the first timestep still has noise, and c_skip and c_out make f the identity there
    (arXiv 2303.01469, eq. 5; their values are those of latent consistency models, arXiv 2310.04378).
    """
    x0 = path.x0(x, prediction, level)
    if not isinstance(path, VPPath):
        return x0
    skip, out = boundary_weights(level.timestep)
    return expand(skip, x0) * x + expand(out, x0) * x0


def boundary_weights(timestep: Tensor) -> tuple[Tensor, Tensor]:
    """Return c_skip = s^2 / (u^2 + s^2) and c_out = u / sqrt(u^2 + s^2) for u = 10 timesteps and s = 0.5."""
    scaled = _TIMESTEP_SCALE * timestep
    total = scaled.square() + _SIGMA_DATA**2
    return _SIGMA_DATA**2 / total, scaled / total.sqrt()


def pseudo_huber(difference: Tensor, threshold: float) -> Tensor:
    """Compute the mean of sqrt(d^2 + c^2) - c over all values d of a difference (N, ...), as (N,)."""
    distance: Tensor = (difference.square() + threshold**2).sqrt() - threshold
    return distance.flatten(1).mean(1)


def long_step(grid: Grid, index: Tensor, skip: int) -> NoiseStep:
    """Return the steps (N,) from grid indices (N,) over ``skip`` moves, at most to the end of the grid."""
    here, after = grid[index], (index + skip).clamp(max=len(grid))
    return NoiseStep(here.timestep, here.alpha, here.sigma, here.index, grid.alpha[after], grid.sigma[after])


@dataclass(frozen=True)
class ConsistencyObjective:
    """Predictions from two levels of the teacher's path must imply one clean sample (arXiv 2303.01469; 2310.04378).

    A sample is noised to a level of the teacher's grid; the teacher, which is the reference policy with guidance, moves
    it down by the ODE. The student's f at the first level regresses on the f of its target, the recipe's ``memory``, at
    the second. At the end of the grid the target is the moved sample itself. The published models read the guidance
    scale from an embedding; here the student learns a single scale.

    Attributes:
        steps: The number of steps T of the teacher's grid.
        skip: The number of grid steps in one move of the teacher.
        guidance: The teacher's guidance scale, LCM's w + 1.
        huber: The threshold c of the pseudo-Huber loss.
        draws: The number of levels per sample and update.
    """

    unit: ClassVar[Unit] = "sample"
    clip_range: ClassVar[float | None] = None
    steps: int = 50
    skip: int = 1
    guidance: float = 1.0
    huber: float = 1e-3
    draws: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.skip < self.steps or self.draws < 1:
            raise ValueError(
                f"skip must be at least 1 and below steps, and draws at least 1, not {self.skip} of {self.steps} and"
                f" {self.draws}"
            )
        if not self.huber > 0 or not self.guidance >= 1:
            raise ValueError(
                f"huber must be positive and guidance 1 for none, or more, not {self.huber} and {self.guidance}"
            )

    @property
    def traits(self) -> ObjectiveTraits:
        return ObjectiveTraits(student_guidance=self.guidance)

    def terms(self, batch: UpdateBatch) -> TermCounts:
        """Count the samples with credit, over all draws. Raises ValueError for credit per step."""
        require_per_sample(len(batch.group), credit=batch.credit)
        return TermCounts(self.draws * int((batch.credit != 0).sum()), 0)

    def backward(self, context: UpdateContext, batch: UpdateBatch, scales: TermScales, seed: int) -> None:
        """Accumulate the gradients of the samples with credit, each times its credit.

        Args:
            context: The model, the target's weights and the metrics.
            batch: B samples with credit (B,).
            scales: The factor of the summed losses.
            seed: The seed of levels and noises.

        Raises:
            ValueError: The recipe has no ``memory`` that would hold the target's weights.
        """
        if context.memory is None:
            raise ValueError("consistency needs the weights of a target: give the recipe a memory")
        # All ranks run a sharded network together: they take every sample, with a weight of 0 for those without credit
        rows = torch.arange(len(batch)) if context.policy.sharded else batch.credit.nonzero()[:, 0]
        grid = context.pipeline.grid(self.steps)
        for draw in range(self.draws if len(rows) else 0):
            mover = Mover.of(context, batch, rows)
            index = torch.tensor([drawn % len(grid) for drawn in mover.seeds(seed, f"level {draw}")])
            losses, distance = self._losses(mover, long_step(grid, index, self.skip), grid, seed, draw)
            weights = batch.credit[rows].to(losses.device, losses.dtype, non_blocking=True)
            context.metrics.add("loss", losses)
            context.metrics.add("kl", distance)
            torch.autograd.backward(scales.losses * (weights * losses).sum())

    def _losses(self, mover: Mover, step: NoiseStep, grid: Grid, seed: int, draw: int) -> tuple[Tensor, Tensor]:
        """Return the losses (N,) of the moves ``step`` (N,), and the student's distances (N,) from the teacher."""
        context, path = mover.context, mover.context.pipeline.path
        x0 = mover.batch.rollout.final[mover.on_device]
        x = path.add_noise(x0, seeded_noise(mover.seeds(seed, f"noise {draw}"), x0), step)
        with torch.no_grad(), context.policy.reference():
            teacher = context.pipeline.predict(x, step, mover.conditioning, self.guidance)
        moved = transition(path, ODE(), x, teacher, step).mean
        at_end = step.index + self.skip >= len(grid)
        timestep = grid.timestep[(step.index + self.skip).clamp(max=len(grid) - 1)]
        after = NoiseLevel(timestep, step.alpha_next, step.sigma_next)
        assert context.memory is not None, "it was checked"
        with torch.no_grad(), context.policy.using(context.memory):
            target = consistency_function(path, moved, self._predict(mover, moved, after), after)
        shape = (-1, *[1] * (x.ndim - 1))
        target = torch.where(at_end.to(x.device, non_blocking=True).view(shape), moved, target)
        prediction = self._predict(mover, x, step)
        estimate = consistency_function(path, x, prediction, step)
        return pseudo_huber(estimate - target, self.huber), mean_square(prediction.detach(), teacher)

    @staticmethod
    def _predict(mover: Mover, x: Tensor, level: NoiseLevel) -> Tensor:
        """Call the student's network, which takes no guidance."""
        return mover.context.pipeline.predict(x, level, mover.conditioning, 1.0)
