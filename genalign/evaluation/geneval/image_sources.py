"""Sources of the images of a GenEval evaluation: a pipeline, or a folder that another program filled."""

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
from genalign.evaluation.geneval.result_files import SampleFile, write_samples
from genalign.runtime.media import read_image
from genalign.types import Grid, Pipeline, Prompt


@dataclass(frozen=True)
class PromptImages:
    """Images (n, 3, H, W) in [0, 1] of one prompt, with n seeds and n ``files`` relative to the evaluation's folder."""

    files: Sequence[str]
    seeds: Sequence[int]
    images: Tensor


class ImageSource(Protocol):
    """A source of all images of each prompt."""

    def warm_up(self, prompt: Prompt) -> None:
        """Prepare the source with the first prompt of the whole set, on every process, before the first image."""

    def __call__(self, index: int, prompt: Prompt) -> Iterator[PromptImages]:
        """Yield all images of prompt number ``index`` in batches, each after its files are written."""


@dataclass(frozen=True)
class PipelineImages:
    """Images from a pipeline for ``seeds`` noises of each prompt, written into the evaluation's ``folder``."""

    pipeline: Pipeline
    grid: Grid
    guidance: float
    seeds: int
    batch_size: int
    folder: Path

    def warm_up(self, prompt: Prompt) -> None:
        """Encode the first prompt, so that every process encodes the empty prompt in the same batch with it."""
        self.pipeline.encode([prompt.text])

    def __call__(self, index: int, prompt: Prompt) -> Iterator[PromptImages]:
        seeds = [noise_seed(prompt.text, sample) for sample in range(self.seeds)]
        texts, first = [prompt.text] * self.seeds, 0
        for images in generate(self.pipeline, texts, seeds, self.grid, self.guidance, self.batch_size):
            names = write_samples(self.folder / "images", index, prompt, images, first)
            yield PromptImages([f"images/{name}" for name in names], seeds[first : first + len(images)], images)
            first += len(images)


@dataclass(frozen=True)
class FolderImages:
    """Images from another program, listed by prompt; an image's number stands for its unknown seed.

    ``folder`` is the evaluation's. Images of one prompt that differ in size are judged in separate batches.
    """

    samples: Sequence[Sequence[SampleFile]]
    folder: Path
    device: str

    def warm_up(self, prompt: Prompt) -> None:
        """Do nothing, since no network runs."""

    def __call__(self, index: int, prompt: Prompt) -> Iterator[PromptImages]:
        """Read the images of a prompt. Raises ValueError for a damaged file."""
        images_by_file = [(sample, read_image(sample.path)) for sample in self.samples[index]]
        for _, group in groupby(images_by_file, key=lambda item: item[1].shape):
            samples, images = zip(*group, strict=True)
            files = [os.path.relpath(sample.path, self.folder) for sample in samples]
            yield PromptImages(files, [sample.number for sample in samples], torch.stack(images).to(self.device))
