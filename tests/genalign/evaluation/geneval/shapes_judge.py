"""GenEval in the shapes world: an exact detector, exact colours, and a generator that draws what it is asked for."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from genalign.diffusion.paths import FlowPath
from genalign.evaluation.evaluate import noise_seed
from genalign.evaluation.geneval.scoring import Detection, Thresholds
from genalign.types import Conditioning, Grid, Prompt
from genalign.worlds.shapes.geometry import PALETTE, SHAPES
from genalign.worlds.shapes.scenes import render, sample_scene
from genalign.worlds.shapes.verifier import detect
from rewards.backbones.detectors import Instance, describe

SIGMAS = (1.0, 0.5, 0.0)


@dataclass(frozen=True)
class ShapesDetector:
    """The world's own detector, whose score is the fit of the best template; masks are what is not background. It
    takes ``seconds`` for a batch."""

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
        return [
            [Instance(Detection(item.shape, item.box, item.iou), _foreground(image)) for item in found]
            for image, found in zip(images, detect(images), strict=True)
        ]


def _foreground(image: Tensor) -> Tensor:
    background = image[:, 0].median(1).values[:, None, None]
    return (image - background).abs().amax(0) > 0.1


@dataclass(frozen=True)
class PaletteColours:
    """The palette's colour nearest to the median of what is not grey."""

    @property
    def description(self) -> Mapping[str, Any]:
        return describe(self)

    def __call__(self, crops: Sequence[Tensor], names: Sequence[str]) -> list[str]:
        palette = torch.tensor(list(PALETTE.values())) / 255
        medians = [crop[:, (crop != 153 / 255).any(0)].median(1).values for crop in crops]
        nearest = [int((palette - median).square().sum(1).argmin()) for median in medians]
        return [list(PALETTE)[index] for index in nearest]


class DrawingPipeline:
    """A flow that never moves: the image of a noise is a scene of its prompt, or, for the share 1 - ``skill`` of all
    noises, one of another prompt."""

    def __init__(self, prompts: Sequence[Prompt], seeds: int, skill: float = 1.0, broken: int | None = None) -> None:
        self.path, self.denoiser, self.drawn = FlowPath(), nn.Identity(), 0
        self.asked = [(p, noise_seed(prompt.text, s)) for p, prompt in enumerate(prompts) for s in range(seeds)]
        self.prompts, self.skill, self.broken = prompts, skill, broken
        self.encoded: list[list[str]] = []

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        self.encoded.append(list(prompts))
        return Conditioning({"length": torch.tensor([len(text) for text in prompts])})

    def grid(self, num_steps: int, sigmas: Sequence[float] | None = None) -> Grid:
        sigma = torch.tensor(SIGMAS, dtype=torch.float64)
        return Grid(sigma[:-1] * 1000, 1 - sigma, sigma)

    def level(self, u: Tensor) -> Any:
        raise NotImplementedError

    def initial_noise(self, seeds: Sequence[int]) -> Tensor:
        place = {seed: number for number, (_, seed) in enumerate(self.asked)}
        return torch.tensor([float(place[seed]) for seed in seeds])[:, None]

    def predict(self, x: Tensor, level: Any, conditioning: Conditioning, guidance: float) -> Tensor:
        return torch.zeros_like(x)

    def decode(self, latents: Tensor) -> Tensor:
        self.drawn += len(latents)
        scenes = []
        for number in latents[:, 0].long().tolist():
            index, seed = self.asked[number]
            other = seed % 1000 >= 1000 * self.skill
            prompt = self.prompts[(index + other * 7) % len(self.prompts)]
            scenes.append(sample_scene(prompt.metadata, np.random.default_rng(seed)))
        images = render(scenes)
        if self.broken is not None:
            images[latents[:, 0].long() == self.broken] = torch.nan
        return images
