"""A search run that counts the calls of a strategy without making them."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from genalign.scoring.budget import Ledger, Metered, metered_reward
from genalign.scoring.score import NamedReward
from genalign.search.engine import SearchRun
from genalign.types import Conditioning, NoiseLevel, Pipeline, Prompt, RewardFunction


class CountingRun(SearchRun):
    """A twin of ``run`` for one of its prompts, with an empty ledger of its own.

    Latents and samples have the shape (N, 0), the network and the decoder copy their inputs, and all scores are 0.
    Gradients flow as in the real run, so that backward passes are counted too.
    """

    def __init__(self, run: SearchRun) -> None:
        pipeline = Metered(_WithoutValues(run.pipeline), Ledger())
        super().__init__(pipeline, run.prompts[:1], (), run.grid, run.guidance, sys.maxsize, run.seed)
        self.rewards = tuple(NamedReward(r.name, self.metered(r.name, r.function), r.weight) for r in run.rewards)

    def metered(self, name: str, function: RewardFunction) -> RewardFunction:
        return metered_reward(name, _zero_scores, self.pipeline.ledger)


class _WithoutValues:
    """A pipeline of latents (N, 0) whose network and decoder copy their inputs."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.path, self.denoiser = pipeline.path, pipeline.denoiser
        self.grid, self.level = pipeline.grid, pipeline.level

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        return Conditioning({"text": torch.zeros(len(prompts), 0)})

    def initial_noise(self, seeds: Sequence[int]) -> Tensor:
        return torch.zeros(len(seeds), 0)

    def predict(self, x: Tensor, level: NoiseLevel, conditioning: Conditioning, guidance: float) -> Tensor:
        return x.clone()

    def decode(self, latents: Tensor) -> Tensor:
        return latents.clone()


def _zero_scores(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return samples.flatten(1).sum(1)
