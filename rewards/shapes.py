"""The shapes world for training: its exact verifier as a reward and as a judge, and rendered scenes as references."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from genalign.evaluation.geneval.grammar import NUMBERS, plural
from genalign.evaluation.geneval.vocabulary import RELATIONS
from genalign.types import Metadata, Prompt
from genalign.worlds.shapes.geometry import PALETTE, SHAPES
from genalign.worlds.shapes.prompts import prompts
from genalign.worlds.shapes.scenes import jittered, render, sample_scene
from genalign.worlds.shapes.verifier import verify
from rewards.backbones.image_features import extract_text_features
from rewards.backbones.reference_images import ImageTensor, ReferencesByPrompt
from rewards.backbones.world_verifier import Score, require_metadata, sample_metadata_by_task, scores

ShapesScore = Score | Literal["count", "color", "position", "clean"]


@dataclass(frozen=True)
class ShapesReward:
    """The score of an image by the exact verifier of the shapes world, in [0, 1].

    Several of these rewards verify a batch once.

    Args:
        score: "partial" credit; "strict" or "relaxed", 1.0 for an image that is right by this rule and else 0.0; or
            "count", "color", "position" or "clean", the mean over the clauses of a prompt that have such a criterion,
            and 1.0 without any.
    """

    score: ShapesScore = "partial"

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Score images (B, 3, 64, 64) in [0, 1] as (B,), float32 on the CPU; NaN for one that is not finite."""
        return scores(verify, self.score, samples, prompts)


_COUNTS = {"a": 1, "an": 1, **NUMBERS}
_NAMES = {form: shape for shape in SHAPES for form in (shape, plural(shape))}
_OBJECT = rf"(?:{'|'.join(_COUNTS)}) (?:{'|'.join(_NAMES)})"
_SHAPE, _PLACE = "|".join(SHAPES), "|".join(RELATIONS)
_QUESTIONS = {  # a verifier's criterion by the question about it
    "count": re.compile(rf"(?:Is there|Are there exactly) ({_OBJECT}) in the image\?"),
    "color": re.compile(rf"Is the ({_SHAPE}) ({'|'.join(PALETTE)})\?"),
    "position": re.compile(rf"Is the ({_SHAPE}) (?:to the )?({_PLACE}) the ({_SHAPE})\?"),
    "clean": re.compile(rf"Is there nothing but ({_OBJECT}(?: and {_OBJECT})*) in the image\?"),
}


@dataclass(frozen=True)
class ShapesQuestions:
    """A judge of questions about the shapes world, to try a benchmark without a vision-language model.

    It understands "Is there a circle in the image?", "Are there exactly two rings in the image?", "Is the moon red?",
    "Is the circle to the left of the cross?" and "Is there nothing but a circle and a ring in the image?". An answer is
    the verifier's criterion, in [0, 1]; NaN for another question and for an image that is not finite.
    """

    def __call__(self, images: Tensor, questions: Sequence[str]) -> Tensor:
        """Answer questions (n) about images (n, 3, 64, 64) in [0, 1] as (n,), float32 on the CPU."""
        answers = torch.full((len(questions),), torch.nan)
        parsed = {
            row: question for row, text in enumerate(questions) if (question := _parse_question(text)) is not None
        }
        rows = [row for row in parsed if bool(images[row].isfinite().all())]
        if rows:
            for row, verification in zip(rows, verify(images[rows], [parsed[row][1] for row in rows]), strict=True):
                answers[row] = dict(verification.criteria)[parsed[row][0]]
        return answers


def _parse_question(text: str) -> tuple[str, Metadata] | None:
    """Return the criterion that a question asks for, and the metadata that has it; None for another question."""
    for criterion, pattern in _QUESTIONS.items():
        if match := pattern.fullmatch(text):
            if criterion == "color":
                return criterion, {"include": [{"class": match[1], "count": 1, "color": match[2]}]}
            if criterion == "position":
                first = {"class": match[1], "count": 1, "position": [match[2], 0]}
                return criterion, {"include": [{"class": match[3], "count": 1}, first]}
            words = [item.split(" ", 1) for item in match[1].split(" and ")]
            return criterion, {"include": [{"class": _NAMES[name], "count": _COUNTS[word]} for word, name in words]}
    return None


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
    _require_colors(colors)
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


def worded(colors: Sequence[str], model: str, suite: str = "train") -> Tensor:
    """Embed, by CLIP, the texts of a split's prompts whose shapes all have one of these colors, (m, d).

    They are exemplars in words, for ``rewards.backbones.image_features.ClipFeatures(model, unit=True)``. Raises
    ValueError for a color that is not in the palette, or colors that fewer than 2 prompts name.
    """
    _require_colors(colors)
    texts = [
        prompt.text
        for prompt in prompts(suite).prompts
        if {item.get("color") for item in require_metadata(prompt)["include"]} <= set(colors)
    ]
    return extract_text_features(texts, model)


def _require_colors(colors: Sequence[str]) -> None:
    if unknown := set(colors) - set(PALETTE):
        raise ValueError(f"no color {', '.join(sorted(unknown))} in the palette: choose from {', '.join(PALETTE)}")
