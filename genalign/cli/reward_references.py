"""``genalign reward references``: scores of samples before training, for rewards that compare with them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from genalign.cli import parsing
from genalign.cli.base_samples import base_identity, base_model, base_samples, referenced
from genalign.cli.context import CommandContext, named_rewards
from genalign.cli.generation_settings import RewardChoice, require_positive
from genalign.cli.run_prompts import RunPrompts
from genalign.cli.train_settings import Train
from genalign.runtime.progress import Progress
from genalign.scoring.descriptions import describe
from genalign.scoring.reference_scores import ReferenceScores, RewardScores, scores_by_prompt
from genalign.scoring.score import NamedReward, probe, score
from genalign.types import Prompt


@dataclass(frozen=True, kw_only=True)
class RewardReferences(Train):
    """A training configuration whose model is sampled and scored before training.

    The scores are for rewards that compare with them, such as rewards.shaped.PreferenceAsReward: the file has the
    scores by the inner reward of each reward that names such a file, or by all rewards if none does. It records the
    model, prompts and rewards, and a run with others refuses it.

    Args:
        output: JSON file to write.
        samples: Number of samples of each prompt, of training and of the evaluations.
    """

    samples: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "samples")


def reward_references_command(context: CommandContext, arguments: Sequence[str]) -> int:
    """Run ``genalign reward references``: score samples of the model before training, and write the scores as JSON."""
    settings, _ = parsing.parse(RewardReferences, arguments, "reward references")
    prompts, rewards, progress = RunPrompts.read(settings), _rewards_to_score(settings.rewards), Progress()
    with progress.phase(f"loading {settings.model.path}"):
        pipeline = base_model(context, settings)

    table, scored = list[Tensor](), list[Prompt]()
    with progress.phase("sampling", settings.samples * len(prompts.texts())) as advance:
        for samples, batch in base_samples(pipeline, settings, settings.samples):
            if not scored:
                probe(rewards, samples, batch)
            table.append(score(rewards, samples, batch))
            scored += batch
            advance(len(batch))

    by_reward = []
    for reward, column in zip(rewards, torch.cat(table).unbind(1), strict=True):
        by_reward.append(RewardScores(describe(reward.function), scores_by_prompt(column, scored)))
        values = column[column.isfinite()]
        print(f"{reward.name}: mean {float(values.mean()):.4g}, deviation {float(values.std(correction=0)):.4g}")
    identity = base_identity(pipeline, settings)
    ReferenceScores(identity, prompts.training.name, tuple(by_reward)).save(Path(settings.output))
    print(f"references: {settings.output}")
    return 0


def _rewards_to_score(choices: Mapping[str, RewardChoice]) -> list[NamedReward]:
    """Select the distinct inner rewards of those that name a file of reference scores; all rewards if none does."""
    rewards = named_rewards(choices)
    inner = [
        replace(outer, function=part.reward)
        for outer, choice in zip(rewards, choices.values(), strict=True)
        for part in referenced(choice)
    ]
    different: dict[str, NamedReward] = {}
    for reward in inner or rewards:
        different.setdefault(json.dumps(describe(reward.function), default=str), reward)
    return list(different.values())
