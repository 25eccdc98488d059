"""Pretraining data: captioned clips of the train split, some captions wrong on purpose."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from genalign.types import Prompt
from genalign.worlds.tones.instruments import NOTES
from genalign.worlds.tones.prompts import LOUDNESS, RELATIONS, attribution, counting, loudness, pitch, prompts, relation
from genalign.worlds.tones.scenes import render, sample_clip
from scripts.pretrain.captions import Job, Part, draw_prompts, in_chunks, one_of, require_metadata, seen_texts

FULL_SCALE = 32767
TASK_WEIGHTS = {
    "single_tone": 0.1,
    "two_tone": 0.15,
    "counting": 0.15,
    "pitch": 0.2,
    "relation": 0.1,
    "attribution": 0.2,
    "loudness": 0.1,
}
_NUMBER_WORDS = {2: "two", 3: "three", 4: "four", 5: "five"}


@dataclass(frozen=True)
class CaptionedClips:
    """N clips, int16 (N, 1, 12000), and the prompts they are truly described by."""

    waveforms: Tensor
    prompts: tuple[Prompt, ...]

    def floats(self, index: Tensor) -> Tensor:
        """The clips of ``index`` in [-1, 1]."""
        return self.waveforms[index].float() / FULL_SCALE


def captioned_clips(count: int, seed: int, workers: int = 2) -> CaptionedClips:
    """Sample and render ``count`` clips of seen prompts, with tasks drawn by ``TASK_WEIGHTS``.

    The result is the same for any number of workers.
    """
    return CaptionedClips(*in_chunks(_chunk, count, seed, workers))


def _chunk(job: Job) -> Part:
    start, count, seed = job
    rng = np.random.default_rng((seed, start))
    drawn = draw_prompts(prompts("iid"), TASK_WEIGHTS, count, rng)
    clips = [sample_clip(require_metadata(prompt), rng) for prompt in drawn]
    return (render(clips) * FULL_SCALE).round().short().numpy(), drawn


def corrupted(prompt: Prompt, rng: np.random.Generator) -> Prompt:
    """Write a prompt with one mistake: notes swapped or replaced, relation or loudness reversed, or count off by one.

    The prompt itself is returned if it offers no mistake, or if the mistake would be a held-out composition.
    """
    return one_of(_mistakes(prompt), seen_texts(prompts), prompt, rng)


def _mistakes(prompt: Prompt) -> list[Prompt]:
    metadata = require_metadata(prompt)
    events = metadata["events"]
    first, last = events[0], events[-1]
    match prompt.task:
        case "counting":
            n = first["count"]
            return [counting(first["class"], _NUMBER_WORDS[m]) for m in (n - 1, n + 1) if m in _NUMBER_WORDS]
        case "pitch":
            return [pitch(first["class"], note) for note in NOTES if note != first["pitch"]]
        case "relation":
            turned = RELATIONS[1 - RELATIONS.index(metadata["relation"])]
            return [relation(first["class"], turned, last["class"])]
        case "attribution":
            return [attribution(first["class"], last["pitch"], last["class"], first["pitch"])]
        case "loudness":
            return [loudness(first["class"], c, last["class"]) for c in LOUDNESS if c != metadata["loudness"]]
        case _:
            return []
