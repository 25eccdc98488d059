"""``genalign reward direction``: D2-Align's direction, learned from samples of the model before training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from torch import Tensor

from genalign.cli import parsing
from genalign.cli.base_samples import base_model, base_samples
from genalign.cli.context import CommandContext
from genalign.cli.generation_settings import require_positive
from genalign.cli.train_settings import Train
from genalign.runtime.progress import Progress
from genalign.scoring.score import parts
from genalign.types import Prompt


@dataclass(frozen=True, kw_only=True)
class RewardDirection(Train):
    """A training configuration with a rewards.combine.DirectionalCorrection, whose direction is learned beforehand.

    Args:
        output: File to write, as in direction.safetensors.
        samples: Number of samples of each prompt, of training and of the evaluations.
    """

    samples: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "samples")


@runtime_checkable
class DirectedReward(Protocol):
    """A reward with a direction that is learned before training, such as ``rewards.combine.DirectionalCorrection``."""

    def learn_direction(self, batches: Iterable[tuple[Tensor, Sequence[Prompt]]], path: Path, seed: int) -> None:
        """Learn the direction from batches of samples before training, with their prompts, and write it to a file."""


def reward_direction_command(context: CommandContext, arguments: Sequence[str]) -> int:
    """Run ``genalign reward direction``: learn D2-Align's direction from samples of the model before training."""
    settings, _ = parsing.parse(RewardDirection, arguments, "reward direction")
    directed = [part for _, part in parts(settings.rewards) if isinstance(part, DirectedReward)]
    if len(directed) != 1:
        raise ValueError(
            f"a direction is learned for exactly one reward, but {len(directed)} in this configuration need one"
            " rewards.combine.DirectionalCorrection"
        )
    progress = Progress()
    with progress.phase(f"loading {settings.model.path}"):
        pipeline = base_model(context, settings)
    with progress.phase("sampling, then learning"):
        batches = base_samples(pipeline, settings, settings.samples)
        directed[0].learn_direction(batches, Path(settings.output), settings.training.seed)
    print(f"direction: {settings.output}")
    return 0
