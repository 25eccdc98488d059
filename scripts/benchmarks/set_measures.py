"""What the proofs measure of a whole evaluation: distances, variety, and scene statistics by the verifier's eyes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from genalign.evaluation.records import PromptRecord
from genalign.metrics.frechet import frechet_distance
from genalign.metrics.image import saturation
from genalign.metrics.vendi import vendi_score
from genalign.types import Prompt, RewardFunction
from genalign.worlds.shapes.detection import ShapeDetection, detect
from genalign.worlds.shapes.diversity import evaluation_images
from rewards.backbones.audio_features import FrameFeatures, extract_frame_features
from rewards.backbones.image_features import ClipFeatures, extract_features
from rewards.backbones.reference_images import ImageTensor, ReferenceSamples
from rewards.backbones.vae_features import VaeFeatures
from rewards.set_rewards import FrameFrechetReward

FEATURES = ClipFeatures("shapes-clip")
Measure = Callable[[Tensor], float]


def set_records(name: str, metric: str, seed: int, run: Path, measure: Measure) -> list[PromptRecord]:
    """One figure of all images of a run before and after; a set is one record, and its interval is over seeds."""
    (before, prompts), (after, _) = evaluation_images(run / "before"), evaluation_images(run / "after")
    return [PromptRecord(name, metric, seed, "all", "the whole set", measure(before), measure(after), len(prompts))]


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
