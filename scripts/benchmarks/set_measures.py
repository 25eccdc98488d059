"""What the proofs measure of a whole evaluation: distances, variety, and scene statistics by the verifier's eyes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genalign.evaluation.records import PromptRecord, mean
from genalign.metrics.frechet import frechet_distance
from genalign.metrics.image import saturation
from genalign.metrics.intervals import win_test
from genalign.metrics.set_tests import compare_parts
from genalign.metrics.vendi import vendi_score
from genalign.types import Prompt, RewardFunction
from genalign.worlds.shapes.detection import ShapeDetection, detect
from genalign.worlds.shapes.diversity import evaluation_images
from rewards.backbones.audio_features import FrameFeatures, extract_frame_features
from rewards.backbones.image_features import ClipFeatures, extract_features
from rewards.backbones.reference_images import ImageTensor, ReferenceSamples
from rewards.backbones.vae_features import VaeFeatures
from rewards.ratings import RatingReward
from rewards.set_rewards import FrameFrechetReward, FrechetReward
from rewards.shapes import recolored, worded
from scripts.benchmarks.planted_ratings import rated_scenes, warmth

FEATURES = ClipFeatures("shapes-clip")
PART = 32  # images of a trial
Measure = Callable[[Tensor], float]


def set_records(name: str, metric: str, seed: int, run: Path, measure: Measure) -> list[PromptRecord]:
    """One figure of all images of a run before and after; a set is one record, and its interval is over seeds."""
    (before, prompts), (after, _) = evaluation_images(run / "before"), evaluation_images(run / "after")
    return [PromptRecord(name, metric, seed, "all", "the whole set", measure(before), measure(after), len(prompts))]


def wins_row(name: str, target: str, runs: Mapping[int, Path], measures: Mapping[str, Measure]) -> dict[str, Any]:
    """Measure a recipe for a row of a table like DRAGON's table 1, as ``audio_measures.rewards_row`` does for clips.

    Args:
        name: The name of the recipe.
        target: The measure that it was trained on, by name. A random part of ``PART`` images is a trial of it.
        runs: The finished runs by seed.
        measures: What is reported beside, of whole sets before and after training, by name.
    """
    trials: list[tuple[float, float]] = []
    sides: dict[str, list[tuple[float, float]]] = {metric: [] for metric in measures}
    for run in runs.values():
        (before, _), (after, _) = evaluation_images(run / "before"), evaluation_images(run / "after")
        trials += compare_parts(measures[target], before, after, PART)
        for metric, measure in measures.items():
            sides[metric].append((measure(before), measure(after)))
    means = {
        metric: {"before": mean(b for b, _ in pairs), "after": mean(a for _, a in pairs)}
        for metric, pairs in sides.items()
    }
    won = win_test([before for before, _ in trials], [after for _, after in trials])
    return {"name": name, "target": target, "wins": asdict(won), "rewards": means}


def nearness(references: ReferenceSamples) -> Measure:
    """-Frechet distance of shapes-clip features to ``references``, as many as there are images."""

    def measure(images: Tensor) -> float:
        rows = range(min(len(images), len(references)))
        there = extract_features(ImageTensor(references.load(rows)), FEATURES)
        return -frechet_distance(extract_features(ImageTensor(images), FEATURES)[: len(rows)], there)

    return measure


def patch_nearness(references: ReferenceSamples) -> Measure:
    """-Frechet distance of the patches of the VAE's latents to those of ``references``."""
    encoder = VaeFeatures("shapes-sd3", patch=2)
    there = FrameFrechetReward(extract_frame_features(references, encoder))

    def measure(images: Tensor) -> float:
        return there(torch.cat([FrameFeatures(encoder)(part) for part in images.split(64)]))

    return measure


def text_nearness(texts: Tensor) -> Measure:
    """-Frechet distance of shapes-clip features of length 1 to those of texts (m, d)."""
    encoder, there = ClipFeatures("shapes-clip", unit=True), FrechetReward(texts)
    return lambda images: there(extract_features(ImageTensor(images), encoder))


def mean_of(reward: RewardFunction) -> Measure:
    """The mean of a reward that ignores prompts."""

    def measure(images: Tensor) -> float:
        return float(torch.cat([reward(part, [Prompt("")] * len(part)) for part in images.split(64)]).mean())

    return measure


def variety(images: Tensor) -> float:
    """The Vendi score of shapes-clip features."""
    return vendi_score(extract_features(ImageTensor(images), FEATURES))


def share(is_so: Callable[[ShapeDetection], bool]) -> Measure:
    """The share of detected shapes that are so."""

    def measure(images: Tensor) -> float:
        objects = [item for items in detect(images) for item in items]
        return sum(map(is_so, objects)) / max(len(objects), 1)

    return measure


def is_purple(item: ShapeDetection) -> bool:
    """Whether purple is its nearest color."""
    return item.color == "purple"


def is_cold(item: ShapeDetection) -> bool:
    """Whether purple or blue is its nearest color."""
    return item.color in ("purple", "blue")


def is_small(item: ShapeDetection) -> bool:
    """Whether an object's box is at most 17 pixels wide and high."""
    return max(item.box[2] - item.box[0], item.box[3] - item.box[1]) <= 17


def mean_saturation(images: Tensor) -> float:
    """The mean saturation over images, a number."""
    return float(saturation(images).mean())


CLIP, VAE, WORDS = "less distance by CLIP", "less distance by the VAE", "less distance to words"
PURPLE, SMALL, COLD = "share of purple shapes", "share of small shapes", "share of purple and blue shapes"
RATING, TASTE, VENDI = "rating by other raters", "true rating", "Vendi score"
LOOKS: dict[str, dict[str, str]] = {
    "frechet": {"": CLIP, "vae": VAE, "purple": PURPLE, "small": SMALL},
    "vae_frechet": {"": VAE, "clip": CLIP, "purple": PURPLE, "small": SMALL},
    "vae_frechet_image": {"": VAE, "clip": CLIP, "purple": PURPLE, "small": SMALL},
    "words": {"distance": WORDS, "": COLD},
    "rating": {"": RATING, "taste": TASTE},
    "vendi": {"": VENDI},
}
"""The measures of each run of shapes_dragon.yaml and shapes_variety.yaml, by the ends of their rows' names.

The first is what the run trains on.
"""


def image_measures() -> dict[str, Measure]:
    """All measures of ``LOOKS``, by other images and raters than those of training (the words are the same)."""
    references = recolored(("purple",), radius=(5.5, 7.5), seed=1)
    return {
        CLIP: nearness(references),
        VAE: patch_nearness(references),
        WORDS: text_nearness(worded(("purple", "blue"), "shapes-clip")),
        PURPLE: share(is_purple),
        SMALL: share(is_small),
        COLD: share(is_cold),
        RATING: mean_of(RatingReward(FEATURES, rated_scenes(seed=1))),
        TASTE: mean_of(warmth),
        VENDI: variety,
    }
