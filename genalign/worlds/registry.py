"""The worlds by name, as in the prompt sources "shapes:train" and "tones:comp" of configurations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from torch import Tensor

from genalign.runtime.media import read_image
from genalign.types import Metadata, Prompt, PromptSet
from genalign.worlds import shapes, tones
from genalign.worlds.grammar import SUITES
from genalign.worlds.shapes.diversity import evaluation_diversity
from genalign.worlds.tones.recordings import read_clip


@dataclass(frozen=True)
class World:
    """A synthetic world.

    ``prompts`` gives the prompts of a split, ``render`` samples (B, ...) that match their metadata, ``read`` a sample
    (...) from a file. ``verifier`` is the version of its verifier, ``sample_rate`` that of its clips in Hz, None for
    images. ``diversity`` measures the samples of an evaluation's folder; None where the world has no such measure.
    """

    name: str
    verifier: str
    sample_rate: int | None
    prompts: Callable[[str], PromptSet]
    render: Callable[[Sequence[Metadata], np.random.Generator], Tensor]
    read: Callable[[Path], Tensor]
    diversity: Callable[[Path], dict[str, float]] | None = None

    def prompt(self, text: str) -> Prompt:
        """Look up the prompt of any split with this text. Raises ValueError if there is none."""
        if text not in _by_text(self):
            raise ValueError(
                f"{text!r} is not a prompt of the {self.name} world: use the exact text of one of its prompts"
            )
        return _by_text(self)[text]


@cache
def _by_text(world: World) -> Mapping[str, Prompt]:
    return {prompt.text: prompt for suite in SUITES for prompt in world.prompts(suite).prompts}


WORLDS: Mapping[str, World] = {
    "shapes": World(
        "shapes",
        shapes.VERIFIER_VERSION,
        None,
        shapes.prompts,
        shapes.render_metadata,
        read_image,
        evaluation_diversity,
    ),
    "tones": World("tones", tones.VERIFIER_VERSION, tones.SAMPLE_RATE, tones.prompts, tones.render_metadata, read_clip),
}


def diversity_of(folder: Path) -> dict[str, float]:
    """Measure the diversity of an evaluation's samples by the world that they are of; empty where none measures it."""
    measures = (world.diversity(folder) for world in WORLDS.values() if world.diversity)
    return next((measure for measure in measures if measure), {})


def world_of(source: str) -> World | None:
    """The world of a source such as "shapes:train"; None for a file."""
    name, colon, _ = source.partition(":")
    return WORLDS.get(name) if colon else None
