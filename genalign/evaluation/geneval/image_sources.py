"""Where the images of a GenEval evaluation come from: a pipeline, or a folder that another program filled."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from genalign.diffusion.rollout import generate
from genalign.evaluation.evaluate import noise_seed
from genalign.evaluation.geneval.result_files import Sample, write_samples
from genalign.runtime.media import read_image
from genalign.types import Grid, Pipeline, Prompt

_IMAGES = "images"


@dataclass(frozen=True)
class Shots:
    """Images (n, 3, H, W) in [0, 1] of one prompt, their files relative to the evaluation's folder, and the seeds of
    their noises.
    """

    files: Sequence[str]
    seeds: Sequence[int]
    images: Tensor


class Source(Protocol):
    """The images of every prompt."""

    def warm_up(self, prompt: Prompt) -> None:
        """Called once, with the first prompt of all, before images are asked for."""

    def __call__(self, index: int, prompt: Prompt) -> Iterator[Shots]:
        """All images of prompt number ``index``, in parts; those that are given lie on the disk."""


@dataclass(frozen=True)
class Generated:
    """Images that a pipeline makes of ``seeds`` noises of each prompt, in the evaluation's ``folder``."""

    pipeline: Pipeline
    grid: Grid
    guidance: float
    seeds: int
    batch_size: int
    folder: Path

    def warm_up(self, prompt: Prompt) -> None:
        """What a pipeline encodes along with its first prompt, such as the empty one, is then alike everywhere."""
        self.pipeline.encode([prompt.text])

    def __call__(self, index: int, prompt: Prompt) -> Iterator[Shots]:
        seeds = [noise_seed(prompt.text, sample) for sample in range(self.seeds)]
        texts, first = [prompt.text] * self.seeds, 0
        for images in generate(self.pipeline, texts, seeds, self.grid, self.guidance, self.batch_size):
            names = write_samples(self.folder / _IMAGES, index, prompt, images, first)
            yield Shots([f"{_IMAGES}/{name}" for name in names], seeds[first : first + len(images)], images)
            first += len(images)


@dataclass(frozen=True)
class Existing:
    """Images that were made elsewhere, by prompt; the number of one stands for its noise, which is unknown.

    ``folder`` is the evaluation's. Images of one prompt that differ in size are judged apart.
    """

    samples: Sequence[Sequence[Sample]]
    folder: Path
    device: str

    def warm_up(self, prompt: Prompt) -> None:
        """There is nothing to do."""

    def __call__(self, index: int, prompt: Prompt) -> Iterator[Shots]:
        """Raises ValueError for a damaged image."""
        read = [(sample, read_image(sample.path)) for sample in self.samples[index]]
        for _, alike in groupby(read, key=lambda pair: pair[1].shape):
            samples, images = zip(*alike, strict=True)
            files = [os.path.relpath(sample.path, self.folder) for sample in samples]
            yield Shots(files, [sample.number for sample in samples], torch.stack(images).to(self.device))
