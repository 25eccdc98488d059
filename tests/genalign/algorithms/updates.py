"""An update on the tiny pipeline: its context, and a batch of four samples of two prompts; and seeded numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from genalign.algorithms.interfaces import MetricSums, TermScales, UpdateBatch, UpdateContext
from genalign.diffusion.policy import Lora, Policy, WeightSnapshot
from genalign.diffusion.rollout import RolloutInputs, kernel_per_step, rollout
from genalign.diffusion.transitions import Kernel
from genalign.scoring.budget import Ledger, Metered
from pipelines import SD3

SUMS = TermScales(1.0, 1.0)
"""The scales of plain sums."""


def update_context(tiny: SD3, kernel: Kernel, lagging: bool = False) -> UpdateContext:
    policy = Policy(tiny.denoiser, Lora(rank=2, alpha=4))
    old = WeightSnapshot(policy.parameters) if lagging else None
    for parameter in policy.parameters:  # B starts at zero, where the current policy would be the reference
        torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(parameter.numel()))
    grid = tiny.grid(4, [1.0, 0.75, 0.5, 0.25])
    return UpdateContext(Metered(tiny, Ledger()), policy, grid, kernel, 1.0, old, MetricSums())


def flat_gradient(context: UpdateContext) -> Tensor:
    """Return the gradient of all trained weights as one vector, and clear it."""
    gradients = [parameter.grad.flatten() for parameter in context.policy.parameters if parameter.grad is not None]
    for parameter in context.policy.parameters:
        parameter.grad = None
    return torch.cat(gradients)


def update_batch(context: UpdateContext, steps: Sequence[int] = (), on_policy: bool = True) -> UpdateBatch:
    conditioning = context.pipeline.encode(["a circle", "two squares"])
    start = RolloutInputs(conditioning, torch.tensor([0, 0, 1, 1]), (1, 2, 3, 4), (5, 6, 7, 8))
    kernels = kernel_per_step(context.kernel, steps, 4)
    sampled = rollout(context.pipeline.pipeline, start, context.grid, kernels, 1.0, steps)
    return UpdateBatch(sampled, torch.tensor([1.0, -1.0, 0.5, 0.0]), start.prompt, on_policy)


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
