"""A sampler whose reward gradient is known in closed form: Gaussian data, an affine network, a quadratic reward.

Data N(m, s^2) with m = 0.5 and s = 0.8; the reward is -(k / 2) (x - tau)^2 with k = 2 and tau = 1. The network is the
exact one plus ``bias`` + ``slope`` x, its two weights. Since everything is quadratic, the two initial noises -1 and 1
give the expectations over N(0, 1) exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from genalign.algorithms.interfaces import MetricSums, TermScales, UpdateBatch, UpdateContext
from genalign.algorithms.pathwise import PathwiseObjective
from genalign.diffusion.paths import FlowPath, VPPath
from genalign.diffusion.policy import Policy
from genalign.diffusion.rollout import RolloutInputs, kernel_per_step, rollout
from genalign.diffusion.transitions import ODE, Kernel
from genalign.scoring.score import NamedReward
from genalign.types import Conditioning, Grid, NoiseLevel, Path, Prompt

MEAN, SPREAD, CURVATURE, TARGET = 0.5, 0.8, 2.0, 1.0
BIAS, SLOPE = 0.1, -0.05  # the weights at which gradients are taken
_ODE = ODE()


class Weights(nn.Module):
    """The bias and the slope that are trained, float64."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.slope = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def float(self) -> Weights:
        """Stay in float64, whatever trains it."""
        return self


class GaussianChain:
    """The pipeline of the toy, on a flow or on a variance-preserving path.

    Args:
        path: A flow, or ``VPPath``.
        levels: The levels of the grid without the last: sigma on a flow, the angle over pi / 2 on a VP path.
    """

    compute_dtype = torch.float64

    def __init__(self, path: Path, levels: Sequence[float]) -> None:
        self.path, self.levels = path, torch.tensor([*levels, 0.0], dtype=torch.float64)
        self.denoiser = Weights()

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        return Conditioning({"none": torch.zeros(len(prompts), 1)})

    def grid(self, num_steps: int, sigmas: Sequence[float] | None = None) -> Grid:
        level = self.level(self.levels)
        return Grid(level.timestep[:-1], level.alpha, level.sigma)

    def level(self, u: Tensor) -> NoiseLevel:
        u = u.double()
        if isinstance(self.path, VPPath):
            alpha, sigma = (u * math.pi / 2).cos(), (u * math.pi / 2).sin()
            return NoiseLevel(u, torch.where(u == 0, 1.0, alpha), torch.where(u == 0, 0.0, sigma))
        return NoiseLevel(u, 1 - u, u)

    def guidance_scale(self, guidance: float | None) -> float:
        return 1.0

    def initial_noise(self, seeds: Sequence[int]) -> Tensor:
        """Noise -1 for odd seeds, 1 for even ones."""
        return torch.tensor([[1.0 - 2.0 * (seed % 2)] for seed in seeds], dtype=torch.float64)

    def predict(self, x: Tensor, level: NoiseLevel, conditioning: Conditioning | None, guidance: float = 1.0) -> Tensor:
        alpha, sigma = (value.reshape(-1, 1) for value in (level.alpha, level.sigma))
        variance = alpha**2 * SPREAD**2 + sigma**2
        if isinstance(self.path, VPPath):
            exact = sigma / variance * (x - alpha * MEAN)
        else:
            exact = (sigma - alpha * SPREAD**2) / variance * (x - alpha * MEAN) - MEAN
        return exact + self.denoiser.bias + self.denoiser.slope * x

    def decode(self, latents: Tensor) -> Tensor:
        return latents


def reward(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """-(k / 2) (x - tau)^2."""
    return -0.5 * CURVATURE * (samples[:, 0] - TARGET).square()


def gaussian_flow() -> GaussianChain:
    """The flow at sigma = 1, 0.75, 0.5, 0.25."""
    return GaussianChain(FlowPath(), (1.0, 0.75, 0.5, 0.25))


def gaussian_vp() -> GaussianChain:
    """The VP path with a predicted noise, at the angles 0.99, 0.7 and 0.35 of pi / 2."""
    return GaussianChain(VPPath(), (0.99, 0.7, 0.35))


def gradient_of(
    objective: PathwiseObjective,
    pipeline: GaussianChain,
    steps: Sequence[int],
    kernel: Kernel = _ODE,
    noises: Sequence[int] = (1, 2),
) -> tuple[list[float], MetricSums]:
    """Return the ascent direction of both weights, of the mean over samples, and the metrics.

    Args:
        objective: What is tested.
        pipeline: The toy.
        steps: The steps to store.
        kernel: The kernel at these steps.
        noises: The seeds of the samples' initial noises.
    """
    policy = Policy(pipeline.denoiser, None)  # its reference is the exact network
    with torch.no_grad():
        pipeline.denoiser.bias.fill_(BIAS)
        pipeline.denoiser.slope.fill_(SLOPE)
    grid, count = pipeline.grid(4), len(noises)
    inputs = RolloutInputs(pipeline.encode(["a"]), torch.zeros(count, dtype=torch.long), tuple(noises), (0,) * count)
    sampled = rollout(pipeline, inputs, grid, kernel_per_step(kernel, steps, len(grid)), 1.0, steps)
    prompts, rewards = [Prompt("a")], [NamedReward("r", reward)]
    context = UpdateContext(pipeline, policy, grid, kernel, 1.0, None, MetricSums(), prompts, rewards)
    batch = UpdateBatch(sampled, torch.ones(count), inputs.prompt, on_policy=True)
    objective.backward(context, batch, TermScales.of_means(objective.terms(batch)), seed=0)
    weights = pipeline.denoiser.bias, pipeline.denoiser.slope
    return [-float(weight.grad) for weight in weights], context.metrics
