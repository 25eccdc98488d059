"""Small training runs on the tiny pipeline: rewards, settings, trainers, and sessions that can be resumed."""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genalign.algorithms.recipe import Recipe
from genalign.cli.resume import EncoderCache
from genalign.diffusion.policy import Lora, Policy
from genalign.diffusion.sampling import Sampling
from genalign.runtime.files import load_state
from genalign.runtime.state import Generators, PerRankState, Stateful
from genalign.scoring.score import NamedReward
from genalign.scoring.score_log import ScoreLog
from genalign.training.checkpointing import Checkpoints, CheckpointWriter
from genalign.training.pools import PoolInfo, PoolSample, write_part
from genalign.training.settings import TrainerSettings
from genalign.training.trainer import Trainer
from genalign.types import Prompt, PromptSet, RewardFunction
from pipelines import SD3
from rewards.adversarial import AdversarialReward, DiscriminatorSettings, PatchWeights
from rewards.backbones.reference_images import ReferencePool

PROMPTS = PromptSet("two", (Prompt("a circle"), Prompt("two squares")))
SETTINGS = TrainerSettings(
    rounds=2, prompts_per_round=2, group_size=4, batch_size=4, updates_per_round=2, learning_rate=1e-2, weight_decay=0.0
)
SAMPLING = Sampling(num_steps=4, sigmas=(1.0, 0.75, 0.5, 0.25))


def redness(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return samples[:, 0].flatten(1).mean(1) - samples[:, 1:].flatten(1).mean(1)


def constant(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """A reward from which no sample has credit."""
    return torch.zeros(len(samples))


signals: list[int] = []  # that the reward below sends to its own process


def signaling(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """A reward during whose calls after the first, which is a trial, the process receives the ``signals``."""
    if len(samples) > 2:
        while signals:
            os.kill(os.getpid(), signals.pop())
    return redness(samples, prompts)


def channels(samples: Tensor) -> Tensor:
    return samples.flatten(2).mean(2)


def careless(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """A reward that draws from the global generators, above 0 as VGPO needs it."""
    noise = torch.rand(len(samples)) + random.gauss(0, 1) + float(np.random.standard_normal())
    return 3 + redness(samples, prompts) + 0.01 * noise


def seed_generators(seed: int) -> None:
    """Seed the global generators, which differ between processes."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


class ReferenceSamples:
    """Four random images or clips."""

    def __init__(self, shape: Sequence[int]) -> None:
        self.samples = torch.rand(4, *shape, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.samples)

    def load(self, rows: Sequence[int]) -> Tensor:
        return self.samples[list(rows)]


def adversary(shape: Sequence[int], batch_size: int) -> AdversarialReward:
    learning = DiscriminatorSettings(steps_per_update=2, batch_size=batch_size, replay=6, learning_rate=1e-2)
    pool = ReferencePool(ReferenceSamples(shape))
    return AdversarialReward(channels, pool, weights=PatchWeights(1.0, 0.0), learning=learning)


def write_pool(
    pipeline: SD3, folder: Path, prompts: Sequence[Prompt], group_size: int = 4, scores: Sequence[str] = ("human",)
) -> Path:
    """Write a pool of random latents in parts of five; the first score counts the samples of a group, others are NaN.

    Return ``folder``.
    """
    generator, first, rest = torch.Generator().manual_seed(0), scores[0], dict.fromkeys(scores[1:], math.nan)
    PoolInfo(pipeline.autoencoder, tuple(pipeline.latent_shape), tuple(scores), {"by": "a test"}).write(folder)
    samples = [PoolSample(prompt, {first: float(number), **rest}) for prompt in prompts for number in range(group_size)]
    for part, start in enumerate(range(0, len(samples), 5)):
        own = samples[start : start + 5]
        write_part(folder, part, torch.randn(len(own), *pipeline.latent_shape, generator=generator), own)
    return folder


class Session:
    """A run's objects in one process, and its checkpoints in ``folder``."""

    def __init__(self, folder: Path, trainer: Trainer, score_log: ScoreLog) -> None:
        self.trainer = trainer
        parts: dict[str, Stateful] = {
            "trainer": trainer,
            "texts": EncoderCache(trainer.pipeline.pipeline),
            "generators": PerRankState(Generators(), trainer.processes),
        }
        self.writer = CheckpointWriter(Checkpoints(folder, processes=trainer.processes), parts, score_log)

    def go(self, until: int, raise_kl: float | None = None) -> list[dict[str, Any]]:
        """Train until round ``until``, with a checkpoint after each round; return the rows of metrics."""
        rows = []
        for result in self.trainer.rounds():
            rows.append(result.as_dict())
            del rows[-1]["machine"]
            if raise_kl is not None and self.trainer.rounds_done == 1:
                self.trainer.learner.raise_kl(raise_kl)
            self.writer.after(self.trainer.rounds_done, last=False)
            if self.trainer.rounds_done == until:
                break
        return rows

    def resume(self) -> None:
        """Restore the checkpoint after the first round, which must be the newest."""
        checkpoint = self.writer.checkpoints.latest()
        assert checkpoint is not None and checkpoint.rounds == 1
        self.writer.resume(checkpoint)


def require_same_checkpoints(one: Path, other: Path) -> None:
    """Require two equal checkpoints, except for the seconds."""
    first, second = (load_state(path / "state.safetensors")[0] for path in (one, other))
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    numbers = [json.loads((path / "state.json").read_text()) for path in (one, other)]
    for number in numbers:
        del number["parts"]["trainer"]["seconds"]
    assert numbers[0] == numbers[1]


def write_config(path: Path, model: Path, reward: str, training: Mapping[str, Any], **sections: Any) -> Path:
    """Write the configuration of a run into the folder that is named like the file ``path``."""
    size = {"prompts_per_round": 2, "group_size": 2, "batch_size": 2, "learning_rate": 0.01}
    settings = {
        "output": str(path.with_suffix("")),
        "model": {"path": str(model)},
        "prompts": "shapes:train",
        "recipe": {"class_path": "genalign.algorithms.recipes.flow_grpo", "init_args": {"window": 1}},
        "rewards": {"red": {"function": reward}},
        "sampling": {"num_steps": 2, "sigmas": [1.0, 0.5]},
        "training": {**size, **training},
        "lora": {"rank": 2},
        "held_out": {"every": 2, "prompts": "shapes:val", "samples_per_task": 1},
    }
    path.write_text(json.dumps(settings | sections))
    return path


def toy_trainer(
    tiny: SD3,
    recipe: Recipe,
    reward: RewardFunction = redness,
    settings: TrainerSettings = SETTINGS,
    prompts: PromptSet = PROMPTS,
) -> Trainer:
    """A trainer on the tiny pipeline, from here on for images of 32 x 32, which cost half as much."""
    tiny.height = tiny.width = 8
    policy = Policy(tiny.denoiser, Lora(rank=4, alpha=8), seed=settings.seed)
    return Trainer(tiny, policy, [NamedReward("red", reward)], prompts, recipe, settings, SAMPLING)


def weights(trainer: Trainer) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in trainer.policy.parameters]
