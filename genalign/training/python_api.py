"""Training in one call, offered as ``genalign.train``; use ``Trainer`` for control over the loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from genalign.algorithms.recipe import Recipe
from genalign.algorithms.recipes import flow_grpo
from genalign.diffusion.policy import Lora, Policy
from genalign.diffusion.sampling import Sampling
from genalign.runtime.progress import Progress
from genalign.scoring.score import NamedReward
from genalign.training.round_log import RoundDisplay
from genalign.training.round_result import RoundResult
from genalign.training.settings import TrainerSettings
from genalign.training.trainer import Trainer
from genalign.types import Pipeline, PromptSet, RewardFunction


def train(
    pipeline: Pipeline,
    rewards: RewardFunction | NamedReward | Mapping[str, RewardFunction] | Sequence[NamedReward],
    prompts: PromptSet | str | Sequence[str],
    recipe: Recipe | None = None,
    settings: TrainerSettings = TrainerSettings(),
    sampling: Sampling = Sampling(),
    lora: Lora | None = Lora(),
    output: str | Path | None = None,
) -> list[RoundResult]:
    """Fine-tune ``pipeline`` on a reward; afterwards it samples with the moving average of the trained weights.

    Args:
        pipeline: The model.
        rewards: A reward function, functions by name, or rewards with weights; weight 0 only reports.
        prompts: The prompts to train on, as a set or a list of texts.
        recipe: The method; None is ``flow_grpo()``.
        settings: Size of a round, optimization, limits.
        sampling: Steps and guidance of the rollouts, and the kernel of the steps that the recipe does not train.
        lora: The adapter to train; None trains the whole network.
        output: A folder for the weights: lora/ for diffusers, peft/, or denoiser/ of a whole network; None saves none.

    Returns:
        The metrics of every round.

    Raises:
        ValueError: The recipe, the rewards and the settings do not fit together.
        RewardError: A reward failed too often.
        DivergedError: Too many updates in a row were not finite.
    """
    policy = Policy(pipeline.denoiser, lora, seed=settings.seed)
    trainer = Trainer(pipeline, policy, rewards, prompts, recipe or flow_grpo(), settings, sampling)
    progress, results = Progress(), list[RoundResult]()
    with progress.phase("training", trainer.settings.rounds, "rounds") as rounds:
        display = RoundDisplay(trainer.settings, rounds)
        for result in trainer.rounds(progress):
            display.show(result, {})
            results.append(result)
    if output is not None:
        trainer.save(output)
    with torch.no_grad():
        for parameter, average in zip(policy.parameters, policy.average.tensors, strict=True):
            parameter.copy_(average)
    return results
