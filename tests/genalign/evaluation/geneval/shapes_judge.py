"""GenEval in the shapes world: an exact detector, exact colors, and a pipeline that draws scenes of its prompts."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genalign.evaluation.evaluate import noise_seed
from genalign.evaluation.geneval.scoring import Detection, Thresholds
from genalign.types import Prompt
from genalign.worlds.shapes.geometry import PALETTE, SHAPES
from genalign.worlds.shapes.scenes import render, sample_scene
from genalign.worlds.shapes.verifier import detect
from rewards.backbones.detectors import Instance, describe
from tests.genalign.evaluation.still_pipeline import StillPipeline


@dataclass(frozen=True)
class ShapesDetector:
    """The shapes world's detector, with template fit as score and the foreground as mask; a batch takes ``seconds``."""

    thresholds: Thresholds = field(default_factory=lambda: Thresholds(counting=0.3))
    seconds: float = 0.0

    @property
    def classes(self) -> Sequence[str] | None:
        return tuple(SHAPES)

    @property
    def description(self) -> Mapping[str, Any]:
        return describe(self)

    def __call__(self, images: Tensor, names: Sequence[Sequence[str]]) -> list[list[Instance]]:
        time.sleep(self.seconds)
        background = images[:, :, 0].median(2).values[:, :, None, None]
        masks = (images - background).abs().amax(1) > 0.1
        return [
            [Instance(Detection(item.shape, item.box, item.iou), mask) for item in objects]
            for mask, objects in zip(masks, detect(images), strict=True)
        ]


@dataclass(frozen=True)
class PaletteColors:
    """Classifies a crop as the palette's color nearest to the median of its pixels that are not gray."""

    @property
    def description(self) -> Mapping[str, Any]:
        return describe(self)

    def __call__(self, crops: Sequence[Tensor], names: Sequence[str]) -> list[str]:
        palette = torch.tensor(list(PALETTE.values())) / 255
        medians = [crop[:, (crop != 153 / 255).any(0)].median(1).values for crop in crops]
        nearest = [int((palette - median).square().sum(1).argmin()) for median in medians]
        return [list(PALETTE)[index] for index in nearest]


class DrawingPipeline(StillPipeline):
    """A pipeline whose images are scenes of their prompts or, with probability 1 - ``skill``, of another prompt.

    The image of noise number ``broken`` is NaN.
    """

    def __init__(self, prompts: Sequence[Prompt], seeds: int, skill: float = 1.0, broken: int | None = None) -> None:
        super().__init__()
        self.noises = [(p, noise_seed(prompt.text, s)) for p, prompt in enumerate(prompts) for s in range(seeds)]
        self.prompts, self.skill, self.broken, self.num_drawn = prompts, skill, broken, 0

    def initial_noise(self, seeds: Sequence[int]) -> Tensor:
        place = {seed: number for number, (_, seed) in enumerate(self.noises)}
        return torch.tensor([float(place[seed]) for seed in seeds])[:, None]

    def decode(self, latents: Tensor) -> Tensor:
        self.num_drawn += len(latents)
        scenes = []
        for number in latents[:, 0].long().tolist():
            index, seed = self.noises[number]
            other = seed % 1000 >= 1000 * self.skill
            prompt = self.prompts[(index + other * 7) % len(self.prompts)]
            scenes.append(sample_scene(prompt.metadata, np.random.default_rng(seed)))
        images = render(scenes)
        if self.broken is not None:
            images[latents[:, 0].long() == self.broken] = torch.nan
        return images
