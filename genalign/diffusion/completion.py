"""Clean samples from the states of a trajectory, by the deterministic sampler: what DenseGRPO scores."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from genalign.diffusion.rollout import Rollout, distinct
from genalign.diffusion.transitions import ODE, transition
from genalign.types import Grid, NoiseStep, Pipeline

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Completion:
    """``steps`` deterministic moves from each state to the clean latent; None takes all that the grid has left."""

    steps: int | None = None

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"completion steps must be at least 1, not {self.steps}; null takes all that are left")
        if self.steps == 1:
            logger.warning(
                "completions of one step are blurry at high noise: DenseGRPO with them was worse than Flow-GRPO"
                " (arXiv 2601.20218, ablation of n); null takes all remaining steps"
            )

    def stops(self, first: int, total: int) -> tuple[int, ...]:
        """The grid indices at which moves begin, for a state at ``first``; the last move ends at sigma = 0."""
        left = total - first
        count = left if self.steps is None else min(self.steps, left)
        return tuple(first + left * k // count for k in range(count))


@torch.no_grad()
def complete(
    pipeline: Pipeline,
    sampled: Rollout,
    grid: Grid,
    guidance: float,
    completion: Completion = Completion(),
) -> Tensor:
    """The clean latents (B, S, ...) of the states before each stored step of a rollout. The first move takes the
    rollout's own prediction, and states that a group shares are completed once.

    Moves that begin at one grid index go through the network together, in batches no larger than the rollout's.
    """
    size = len(sampled.final)
    jobs = _jobs(pipeline, sampled, grid, completion)
    rows = torch.cat([job.rows for job in jobs])
    x = torch.cat([job.x for job in jobs])
    active = [job.stops for job in jobs for _ in job.rows.tolist()]
    conditioning = sampled.inputs.conditioning[sampled.inputs.prompt[rows]]
    for index in range(min(sampled.steps) + 1, len(grid)):
        for part in _moving(active, index, size):
            step = _step(grid, index, [active[i] for i in part.tolist()])
            prediction = pipeline.predict(x[part], step, conditioning[part], guidance)
            x[part] = transition(pipeline.path, ODE(), x[part], prediction, step).mean
    done = torch.split(x, [len(job.rows) for job in jobs])
    return torch.stack([latents[job.origin] for latents, job in zip(done, jobs, strict=True)], 1)


def _moving(active: Sequence[tuple[int, ...]], index: int, size: int) -> Sequence[Tensor]:
    """Batches of the states that move on from grid ``index``."""
    moving = torch.tensor([i for i, stops in enumerate(active) if index in stops[1:]])
    return torch.split(moving, size) if len(moving) else ()


@dataclass(frozen=True)
class _Job:
    """States of one stored step after their first move: distinct ``rows`` (U,) of the batch, their latents ``x``
    (U, ...), the place (B,) of every sample among them, and where the moves begin."""

    rows: Tensor
    x: Tensor
    origin: Tensor
    stops: tuple[int, ...]


def _jobs(pipeline: Pipeline, sampled: Rollout, grid: Grid, completion: Completion) -> list[_Job]:
    jobs = []
    every = torch.arange(len(sampled.final))
    for stored, index in enumerate(sampled.steps):
        stops = completion.stops(index, len(grid))
        rows, origin = distinct(sampled.inputs) if stored == 0 else (every, every)
        x, prediction = sampled.x[rows, stored], sampled.prediction[rows, stored]
        moved = transition(pipeline.path, ODE(), x, prediction, _step(grid, index, [stops] * len(rows))).mean
        jobs.append(_Job(rows, moved, origin, stops))
    return jobs


def _step(grid: Grid, index: int, stops: Sequence[tuple[int, ...]]) -> NoiseStep:
    """The moves from ``index`` to the next stop of each sample, or to the end."""
    following = [tuple(stop for stop in sample if stop > index) for sample in stops]
    after = torch.tensor([stop[0] if stop else len(grid) for stop in following])
    here = grid[torch.full_like(after, index)]
    return NoiseStep(here.timestep, here.alpha, here.sigma, here.index, grid.alpha[after], grid.sigma[after])
