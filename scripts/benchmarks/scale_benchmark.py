"""What a round costs as its numbers grow: group size, steps, resolution, rewards. Of benchmark.py.

Everything else stays at 12 prompts of 8 samples, T = 10 with two steps trained, 64 x 64 pixels and one reward. The
network is the embedded one with room for larger images and random weights, which cost the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from genalign import assets
from genalign.algorithms.recipes import flow_grpo
from genalign.diffusion.policy import Lora, Policy
from genalign.diffusion.transitions import FlowSDE
from genalign.scoring.score import NamedReward
from genalign.training.settings import TrainerSettings
from genalign.training.trainer import Trainer
from genalign.types import Prompt
from genalign.worlds import shapes
from pipelines import SD3
from scripts.benchmarks.published_results import Measurement
from scripts.benchmarks.shapes_sampling import shapes_sampling

PROMPTS = 12


@dataclass(frozen=True)
class Size:
    """The geometry of one training round."""

    group_size: int = 8
    steps: int = 10
    pixels: int = 64
    rewards: int = 1


GROWN: dict[str, Sequence[int]] = {
    "group_size": (4, 8, 16, 24),
    "steps": (5, 10, 20, 40),
    "pixels": (32, 64, 96, 128),
    "rewards": (1, 2, 4, 8),
}


def benchmark_scale(repeats: int) -> list[Measurement]:
    """Seconds of a round, each number grown alone."""
    measurements: list[Measurement] = []
    for name, values in GROWN.items():
        for value in values:
            size = replace(Size(), **{name: value})
            measurements += [
                Measurement(f"{name}.{value}", "seconds a round", seconds)
                for seconds in round_seconds(size, min(repeats, 5))
            ]
    return measurements


def round_seconds(size: Size, repeats: int) -> list[float]:
    """Of ``repeats`` rounds after one."""
    pipeline = roomy(size.pixels)
    samples = PROMPTS * size.group_size
    settings = TrainerSettings(
        rounds=repeats + 1,
        prompts_per_round=PROMPTS,
        group_size=size.group_size,
        batch_size=samples,
        updates_per_round=1,
        learning_rate=1e-12,
    )
    rewards = [NamedReward(f"reward_{number}", statistics_of_rows) for number in range(size.rewards)]
    sampling = shapes_sampling(size.steps)
    recipe = flow_grpo(FlowSDE(0.9), window=2)
    policy = Policy(pipeline.denoiser, Lora(rank=16, alpha=32))
    trainer = Trainer(pipeline, policy, rewards, shapes.prompts("train"), recipe, settings, sampling)
    ends = [result.seconds for result in trainer.rounds()]
    return [after - before for before, after in pairwise(ends)]


def roomy(pixels: int) -> SD3:
    """The embedded pipeline with a random network for images of so many pixels a side."""
    pipe = SD3.load(assets.resolve("shapes-sd3")).pipe
    config: dict[str, Any] = {**pipe.transformer.config, "pos_embed_max_size": 32}
    torch.manual_seed(0)
    pipe.register_modules(transformer=type(pipe.transformer).from_config(config))
    return SD3(pipe, height=pixels, width=pixels, autocast=torch.bfloat16)


def statistics_of_rows(samples: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
    """A reward that costs about as much as an image statistic."""
    return torch.fft.fft2(samples).abs().flatten(1).mean(1)
