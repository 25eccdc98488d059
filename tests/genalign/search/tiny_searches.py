"""What the tests of searches share: a run on the tiny pipeline, and Gaussian data with its exact network."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from genalign.diffusion.paths import FlowPath
from genalign.diffusion.sampling import Sampling
from genalign.diffusion.transitions import DDIM, transition
from genalign.scoring.budget import Budget, Ledger
from genalign.scoring.score import NamedReward
from genalign.search.engine import SearchRun
from genalign.search.strategy import Strategy, count_calls
from genalign.types import Conditioning, Grid, NoiseLevel, Pipeline, Prompt

SAMPLING = Sampling(num_steps=5, sigmas=(1.0, 0.8, 0.6, 0.4, 0.2), guidance=1.0)
PROMPTS = ("a circle", "two squares")


def redness(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return samples[:, 0].flatten(1).mean(1) - samples[:, 1:].flatten(1).mean(1)


def search_run(pipeline: Pipeline, guidance: float = 1.0) -> SearchRun:
    prompts, rewards = [Prompt(text) for text in PROMPTS], [NamedReward("red", redness)]
    return SearchRun(pipeline, prompts, rewards, SAMPLING.grid(pipeline), guidance, 4, "0")


class Gauss:
    """Data N(0, 1) in one dimension, its exact network on a flow of shift 3, and nothing to decode."""

    path, denoiser, compute_dtype = FlowPath(), nn.Identity(), torch.float32

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        return Conditioning({"none": torch.zeros(len(prompts), 1)})

    def grid(self, num_steps: int, sigmas: Sequence[float] | None = None) -> Grid:
        uniform = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
        sigma = 3 * uniform / (1 + 2 * uniform)
        return Grid(sigma[:-1], 1 - sigma, sigma)

    def level(self, u: Tensor) -> NoiseLevel:
        return NoiseLevel(u, 1 - u, u)

    def guidance_scale(self, guidance: float | None) -> float:
        return 1.0 if guidance is None else guidance

    def initial_noise(self, seeds: Sequence[int]) -> Tensor:
        return torch.randn(len(seeds), 1, generator=torch.Generator().manual_seed(seeds[0]))

    def predict(self, x: Tensor, level: NoiseLevel, conditioning: Conditioning | None, guidance: float = 1.0) -> Tensor:
        """E[eps - x0 | x]."""
        alpha, sigma = float(level.alpha), float(level.sigma)
        return (sigma - alpha) / (alpha * alpha + sigma * sigma) * x

    def decode(self, latents: Tensor) -> Tensor:
        return latents


def exact_spread(grid: Grid) -> float:
    """The deviation of unsteered samples by DDIM(1): every move is x -> a x + s noise."""
    variance, one = 1.0, torch.ones(1, 1, dtype=torch.float64)
    for index in range(len(grid)):
        step = grid[index]
        move = transition(Gauss.path, DDIM(1.0), one, Gauss().predict(one, step, None), step)
        variance = float(move.mean) ** 2 * variance + float(move.std) ** 2
    return math.sqrt(variance)


def plan(pipeline: Pipeline, strategy: Strategy, budget: Budget) -> Ledger:
    """The calls of a strategy within a budget, counted without making them."""
    rewards = [NamedReward("x", lambda samples, prompts: samples[:, 0])]
    run = SearchRun(pipeline, [Prompt("")], rewards, pipeline.grid(6), 1.0, 4, "0")
    return count_calls(run, strategy, budget)
