"""Rollouts of six samples of two prompts on the tiny SD3 pipeline, over five steps."""

from __future__ import annotations

import torch

from genalign.diffusion.rollout import Rollout, RolloutInputs, kernel_per_step, rollout
from genalign.diffusion.transitions import FlowSDE, Kernel
from genalign.scoring.budget import Metered
from genalign.types import Grid
from pipelines import SD3


def five_steps(pipeline: SD3) -> Grid:
    return pipeline.grid(5, [1.0, 0.8, 0.6, 0.4, 0.2])


def inputs(pipeline: SD3, shared: bool) -> RolloutInputs:
    """Three samples of each prompt, which share their initial noise or not."""
    conditioning = pipeline.encode(["a circle", "two squares"])
    noise = (1, 1, 1, 2, 2, 2) if shared else (1, 2, 3, 4, 5, 6)
    return RolloutInputs(conditioning, torch.tensor([0, 0, 0, 1, 1, 1]), noise, tuple(range(10, 16)))


def sample(
    pipeline: SD3,
    store: tuple[int, ...],
    shared: bool = False,
    guidance: float = 1.0,
    kernel: Kernel = FlowSDE(0.7),  # noqa: B008  # frozen
    metered: Metered | None = None,
) -> Rollout:
    """Sample with ``kernel`` at the stored steps, and with the ODE elsewhere; ``metered`` counts the calls."""
    kernels = kernel_per_step(kernel, store, 5)
    return rollout(metered or pipeline, inputs(pipeline, shared), five_steps(pipeline), kernels, guidance, store)
