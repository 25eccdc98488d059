"""The worlds by name, as commands and configurations take them: "shapes:train", "tones:comp"."""

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
from genalign.worlds.tones.recordings import read_clip


@dataclass(frozen=True)
class World:
    """``prompts`` of a split; ``rendered``, samples that show their metadata; ``read``, a sample (...) from a file; the
    version of its ``verifier``, and the ``sample_rate`` in Hz that it hears, None for images."""

    name: str
    verifier: str
    sample_rate: int | None
    prompts: Callable[[str], PromptSet]
    rendered: Callable[[Sequence[Metadata], np.random.Generator], Tensor]
    read: Callable[[Path], Tensor]

    def prompt(self, text: str) -> Prompt:
        """The prompt of any split with this text. Raises ValueError where there is none."""
        if text not in _by_text(self):
            raise ValueError(f"{text!r} is no prompt of the {self.name} world: write it as its grammar does")
        return _by_text(self)[text]


@cache
def _by_text(world: World) -> Mapping[str, Prompt]:
    return {prompt.text: prompt for suite in SUITES for prompt in world.prompts(suite).prompts}


def _scenes(metadata: Sequence[Metadata], rng: np.random.Generator) -> Tensor:
    return shapes.render([shapes.sample_scene(item, rng) for item in metadata])


def _clips(metadata: Sequence[Metadata], rng: np.random.Generator) -> Tensor:
    return tones.render([tones.sample_clip(item, rng) for item in metadata])


WORLDS: Mapping[str, World] = {
    "shapes": World("shapes", shapes.VERIFIER_VERSION, None, shapes.prompts, _scenes, read_image),
    "tones": World("tones", tones.VERIFIER_VERSION, tones.SAMPLE_RATE, tones.prompts, _clips, read_clip),
}


def world_of(source: str) -> World | None:
    """The world that "shapes:train" names; None for a file."""
    name, colon, _ = source.partition(":")
    return WORLDS.get(name) if colon else None
