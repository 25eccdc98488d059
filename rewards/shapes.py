"""The shapes world for training: its exact verifier as a reward, and rendered scenes as references."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from genalign.types import Metadata, Prompt
from genalign.worlds.shapes.geometry import PALETTE, SHAPES, SIZE
from genalign.worlds.shapes.prompts import prompts
from genalign.worlds.shapes.scenes import Item, Scene, jittered, render, sample_scene
from genalign.worlds.shapes.verifier import verify
from rewards.references import ByPrompt, ImageTensor


@dataclass(frozen=True)
class ShapesReward:
    """``partial`` credit in [0, 1], or 1.0 for what is ``strict``-ly or ``relaxed``-ly right, else 0.0."""

    score: Literal["partial", "strict", "relaxed"] = "partial"

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores (B,), float32 on the CPU, of images (B, 3, 64, 64) in [0, 1]; NaN for an image with NaN pixels."""
        metadata = [_metadata(prompt) for prompt in prompts]
        failed = samples.isnan().flatten(1).any(1).cpu()
        verdicts = verify(samples.nan_to_num(), metadata)
        match self.score:
            case "partial":
                scores = [verdict.partial for verdict in verdicts]
            case "strict":
                scores = [float(verdict.strict) for verdict in verdicts]
            case "relaxed":
                scores = [float(verdict.relaxed) for verdict in verdicts]
        return torch.tensor(scores, dtype=torch.float32).masked_fill(failed, torch.nan)


def rendered(suite: str = "train", per_prompt: int = 1, seed: int = 0) -> ByPrompt:
    """Rendered scenes of every prompt of a split, ``per_prompt`` of each: about 1 ms an image."""
    rng = np.random.default_rng(seed)
    asked = [prompt for prompt in prompts(suite).prompts for _ in range(per_prompt)]
    images = render([sample_scene(_metadata(prompt), rng) for prompt in asked])
    return ByPrompt(ImageTensor(images), [prompt.text for prompt in asked])


def recoloured(colors: Sequence[str], count: int = 512, suite: str = "train", seed: int = 0) -> ImageTensor:
    """``count`` rendered scenes of a split's prompts, drawn by task and then by prompt, whose objects all have one of
    these ``colors``: a style to transfer. ValueError for a colour that is not in the palette."""
    if unknown := set(colors) - set(PALETTE):
        raise ValueError(f"no colour {', '.join(sorted(unknown))} in the palette: choose from {', '.join(PALETTE)}")
    rng = np.random.default_rng(seed)
    tasks = list(prompts(suite).by_task().values())
    chosen = [tasks[i % len(tasks)][rng.integers(len(tasks[i % len(tasks)]))] for i in range(count)]
    scenes = [sample_scene(_metadata(prompt), rng) for prompt in chosen]
    return ImageTensor(render([_painted(scene, colors, rng) for scene in scenes]))


def cornered(
    color: str = "purple", radius: tuple[float, float] = (5.5, 7.5), count: int = 512, seed: int = 0
) -> ImageTensor:
    """``count`` rendered scenes of one or two small objects of ``color``, each in a corner of its own; ``radius`` in
    pixels. The embedded model seldom makes such."""
    rng = np.random.default_rng(seed)
    return ImageTensor(render([_cornered(color, radius, rng) for _ in range(count)]))


def _cornered(color: str, radius: tuple[float, float], rng: np.random.Generator) -> Scene:
    corners = rng.choice(4, size=rng.integers(1, 3), replace=False)
    return Scene(tuple(_small(color, divmod(int(corner), 2), radius, rng) for corner in corners))


def _small(color: str, corner: tuple[int, int], radius: tuple[float, float], rng: np.random.Generator) -> Item:
    """An object that nearly touches the two edges of ``corner`` (right?, bottom?)."""
    r = rng.uniform(*radius)
    edge = 1.2 * r + rng.uniform(1, 4)
    x, y = (SIZE - edge if far else edge for far in corner)
    return Item(str(rng.choice(list(SHAPES))), color, x, y, r, jittered(color, rng))


def _painted(scene: Scene, colors: Sequence[str], rng: np.random.Generator) -> Scene:
    drawn = [colors[int(rng.integers(len(colors)))] for _ in scene.items]
    painted = [
        replace(item, color=color, rgb=jittered(color, rng)) for item, color in zip(scene.items, drawn, strict=True)
    ]
    return replace(scene, items=tuple(painted))


def _metadata(prompt: Prompt) -> Metadata:
    if prompt.metadata is None:
        raise ValueError(f"the prompt {prompt.text!r} has no metadata: this reward needs GenEval metadata")
    return prompt.metadata
