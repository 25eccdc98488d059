"""What several commands are made of: models, rewards and prompts by configuration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from diffusers.utils.logging import disable_progress_bar as disable_diffusers_bars
from transformers.utils.logging import disable_progress_bar as disable_transformers_bars

from genalign import assets, config
from genalign.prompts import load_prompts
from genalign.scoring import NamedReward
from genalign.types import PromptSet
from genalign.worlds import shapes
from pipelines import SD3


def named_rewards(chosen: Mapping[str, config.RewardChoice]) -> list[NamedReward]:
    """The rewards of a configuration."""
    return [NamedReward(name, choice.function, choice.weight) for name, choice in chosen.items()]


def load_model(model: config.Model) -> SD3:
    """The pipeline that a configuration names, opened without the libraries' own progress bars."""
    disable_diffusers_bars()
    disable_transformers_bars()
    return SD3.load(
        assets.resolve(model.path),
        dtype=config.dtype(model.dtype),
        device=model.device,
        autocast=config.dtype(model.autocast) if model.autocast else None,
        height=model.height,
        width=model.width,
        max_sequence_length=model.max_sequence_length,
        offload=model.offload,
    )


def prompt_set(source: str) -> PromptSet:
    """A split of a world, as in "shapes:train", some of its tasks, as in "shapes:train:counting,colors", or a prompt
    file."""
    world, *rest = source.split(":")
    if world != "shapes" or len(rest) not in (1, 2):
        return load_prompts(Path(source))
    found = shapes.prompts(rest[0])
    return found if len(rest) == 1 else found.of_tasks(rest[1].split(","))
