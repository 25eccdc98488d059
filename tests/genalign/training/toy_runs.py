"""Small training runs on the tiny pipeline: rewards, settings, and a trainer of them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from genalign.algorithms.recipes import Recipe
from genalign.diffusion.policy import Lora, Policy
from genalign.diffusion.sampling import Sampling
from genalign.scoring.score import NamedReward
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


def channels(samples: Tensor) -> Tensor:
    return samples.flatten(2).mean(2)


def adversary(pool: ReferencePool, batch_size: int) -> AdversarialReward:
    learning = DiscriminatorSettings(steps_per_update=2, batch_size=batch_size, replay=6, learning_rate=1e-2)
    return AdversarialReward(channels, pool, weights=PatchWeights(1.0, 0.0), learning=learning)


def toy_trainer(
    tiny: SD3,
    recipe: Recipe,
    reward: RewardFunction = redness,
    settings: TrainerSettings = SETTINGS,
    prompts: PromptSet = PROMPTS,
) -> Trainer:
    policy = Policy(tiny.denoiser, Lora(rank=4, alpha=8), seed=settings.seed)
    return Trainer(tiny, policy, [NamedReward("red", reward)], prompts, recipe, settings, SAMPLING)


def weights(trainer: Trainer) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in trainer.policy.parameters]
