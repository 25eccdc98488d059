"""Clean samples from the intermediate states of a trajectory, by the deterministic sampler: what DenseGRPO scores."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from genalign.diffusion.rollout import Rollout, unique_starts
from genalign.diffusion.transitions import ODE, transition
from genalign.types import Grid, NoiseStep, Pipeline

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Completion:
    """ODE completion in ``steps`` moves from each state to the clean latent; None takes every remaining grid step."""

    steps: int | None = None

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise ValueError(
                f"completion steps must be at least 1, not {self.steps}; null takes every remaining step of the grid"
            )
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
    pipeline: Pipeline, sampled: Rollout, grid: Grid, guidance: float, completion: Completion = Completion()
) -> Tensor:
    """Complete the state before each stored step of a rollout to a clean latent, by the ODE.

    The first move reuses the prediction of the rollout, and a state that a group shares is completed once. Moves that
    begin at the same grid index go through the network together, in batches no larger than the rollout's.

    Args:
        pipeline: The model that sampled the rollout.
        sampled: B trajectories with S stored steps.
        grid: The sampling grid of the rollout, T steps.
        guidance: The guidance scale of the rollout.
        completion: The number of moves per state.

    Returns:
        Clean latents (B, S, ...).
    """
    size, total = len(sampled.final), len(grid)
    every = torch.arange(size)
    # First moves, from the stored states
    row_parts, x_parts, origins = list[Tensor](), list[Tensor](), list[Tensor]()
    stops_of: list[tuple[int, ...]] = []
    for stored, index in enumerate(sampled.steps):
        stops = completion.stops(index, total)
        rows, origin = unique_starts(sampled.inputs) if stored == 0 else (every, every)
        step = _moves(grid, index, [stops] * len(rows))
        place = rows.to(sampled.states.device, non_blocking=True)
        x = sampled.states[place, int(sampled.before[stored])]
        move = transition(pipeline.path, ODE(), x, sampled.prediction[place, stored], step)
        row_parts.append(rows)
        x_parts.append(move.mean)
        origins.append(origin)  # the index (B,) of each sample's state
        stops_of += [stops] * len(rows)

    # Further moves, of the states of all stored steps together
    x = torch.cat(x_parts)
    inputs = sampled.inputs.to(x.device)
    conditioning = inputs.conditioning[inputs.prompt[torch.cat(row_parts)]]
    for index in range(min(sampled.steps) + 1, total):
        moving = torch.tensor([i for i, stops in enumerate(stops_of) if index in stops[1:]], dtype=torch.long)
        for part in torch.split(moving, size)[: len(moving)]:  # an empty tensor would be split into one empty part
            step = _moves(grid, index, [stops_of[i] for i in part.tolist()])
            place = part.to(x.device, non_blocking=True)
            prediction = pipeline.predict(x[place], step, conditioning[part], guidance)
            x[place] = transition(pipeline.path, ODE(), x[place], prediction, step).mean
    clean = torch.split(x, [len(part) for part in x_parts])
    places = [origin.to(x.device, non_blocking=True) for origin in origins]
    return torch.stack([latents[place] for latents, place in zip(clean, places, strict=True)], 1)


def _moves(grid: Grid, index: int, stops: list[tuple[int, ...]]) -> NoiseStep:
    """Return the moves (N,) from grid ``index`` to the next of each sample's ``stops``, or to the end of the grid."""
    after = torch.tensor([next((stop for stop in sample if stop > index), len(grid)) for sample in stops])
    here = grid[torch.full_like(after, index)]
    return NoiseStep(here.timestep, here.alpha, here.sigma, here.index, grid.alpha[after], grid.sigma[after])
