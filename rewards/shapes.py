"""The shapes world for training: its exact verifier as a reward, and rendered scenes as references."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from genalign.types import Prompt
from genalign.worlds.shapes.geometry import PALETTE
from genalign.worlds.shapes.prompts import prompts
from genalign.worlds.shapes.scenes import jittered, render, sample_scene
from genalign.worlds.shapes.verifier import verify
from rewards.backbones.reference_images import ImageTensor, ReferencesByPrompt
from rewards.backbones.world_verifier import Score, require_metadata, sample_metadata_by_task, scores


@dataclass(frozen=True)
class ShapesReward:
    """``partial`` credit in [0, 1], or 1.0 for what is ``strict``-ly or ``relaxed``-ly right, else 0.0."""

    score: Score = "partial"

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Score images (B, 3, 64, 64) in [0, 1] as (B,), float32 on the CPU; NaN for one that is not finite."""
        return scores(verify, self.score, samples, prompts)


def rendered(suite: str = "train", per_prompt: int = 1, seed: int = 0) -> ReferencesByPrompt:
    """Render scenes of every prompt of a split, ``per_prompt`` of each: about 1 ms an image."""
    rng = np.random.default_rng(seed)
    repeated = [prompt for prompt in prompts(suite).prompts for _ in range(per_prompt)]
    images = render([sample_scene(require_metadata(prompt), rng) for prompt in repeated])
    return ReferencesByPrompt(ImageTensor(images), [prompt.text for prompt in repeated])


def recolored(
    colors: Sequence[str],
    count: int = 512,
    suite: str = "train",
    radius: tuple[float, float] | None = None,
    seed: int = 0,
) -> ImageTensor:
    """Render scenes whose objects all have one of these colors: a style to transfer.

    Args:
        colors: of the palette.
        count: how many scenes, drawn by task and then by prompt.
        suite: the split of the prompts.
        radius: the range of the objects' radius in pixels; None leaves it.
        seed: of all draws.

    Raises:
        ValueError: a color is not in the palette.
    """
    if unknown := set(colors) - set(PALETTE):
        raise ValueError(f"no color {', '.join(sorted(unknown))} in the palette: choose from {', '.join(PALETTE)}")
    rng = np.random.default_rng(seed)
    scenes = [sample_scene(metadata, rng) for metadata in sample_metadata_by_task(prompts(suite), count, rng)]
    styled = []
    for scene in scenes:
        items = []
        for item in scene.items:
            color = colors[int(rng.integers(len(colors)))]
            size = item.r if radius is None else min(item.r, float(rng.uniform(*radius)))
            items.append(replace(item, color=color, rgb=jittered(color, rng), r=size))
        styled.append(replace(scene, items=tuple(items)))
    return ImageTensor(render(styled))
