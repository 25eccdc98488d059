"""Pretraining data: captioned scenes of the train split, some captions wrong on purpose."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from genalign.evaluation.geneval.grammar import color_attr, colors, counting, position
from genalign.evaluation.geneval.vocabulary import RELATIONS
from genalign.types import Prompt
from genalign.worlds.shapes.geometry import PALETTE
from genalign.worlds.shapes.prompts import prompts
from genalign.worlds.shapes.scenes import render, sample_scene
from scripts.pretrain.captions import Job, Part, draw_prompts, in_chunks, one_of, require_metadata, seen_texts

TASK_WEIGHTS = {
    "single_object": 0.1,
    "two_object": 0.15,
    "counting": 0.2,
    "colors": 0.15,
    "position": 0.2,
    "color_attr": 0.2,
}
_OPPOSITE = dict(zip(RELATIONS, ("right of", "left of", "below", "above"), strict=True))
_NUMBER_WORDS = {2: "two", 3: "three", 4: "four"}


@dataclass(frozen=True)
class CaptionedScenes:
    """N images, uint8 (N, 3, 64, 64), and the prompts they are truly described by."""

    images: Tensor
    prompts: tuple[Prompt, ...]


def captioned_scenes(count: int, seed: int, workers: int = 2) -> CaptionedScenes:
    """Sample and render ``count`` scenes of seen prompts, with tasks drawn by ``TASK_WEIGHTS``.

    The result is the same for any number of workers.
    """
    return CaptionedScenes(*in_chunks(_chunk, count, seed, workers))


def _chunk(job: Job) -> Part:
    start, count, seed = job
    rng = np.random.default_rng((seed, start))
    drawn = draw_prompts(prompts("iid"), TASK_WEIGHTS, count, rng)
    scenes = [sample_scene(require_metadata(prompt), rng) for prompt in drawn]
    return (render(scenes) * 255).round().byte().numpy(), drawn


def corrupted(prompt: Prompt, rng: np.random.Generator) -> Prompt:
    """Write a prompt with one mistake: colors swapped or replaced, relation mirrored, or count off by one.

    The prompt itself is returned if it offers no mistake, or if the mistake would be a held-out composition, since held
    out compositions must not be learned wrong either.
    """
    return one_of(_mistakes(prompt), seen_texts(prompts), prompt, rng)


def _mistakes(prompt: Prompt) -> list[Prompt]:
    include = require_metadata(prompt)["include"]
    shape = include[0]["class"]
    match prompt.task:
        case "counting":
            n = include[0]["count"]
            return [counting(shape, _NUMBER_WORDS[m]) for m in (n - 1, n + 1) if m in _NUMBER_WORDS]
        case "colors":
            return [colors(shape, color) for color in PALETTE if color != include[0]["color"]]
        case "position":
            return [position(include[1]["class"], _OPPOSITE[include[1]["position"][0]], shape)]
        case "color_attr":
            return [color_attr(shape, include[1]["color"], include[1]["class"], include[0]["color"])]
        case _:
            return []
