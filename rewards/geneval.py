"""GenEval by a detector and CLIP, as a judge for evaluations and as a reward (arXiv:2310.11513).

The scores are GenEval-style, by the detector that the judge's description names: see ``rewards.backbones.detectors``.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from genalign.evaluation.geneval.metadata import PromptSpec
from genalign.evaluation.geneval.scoring import (
    Box,
    Detection,
    GenEvalScore,
    filter_detections,
    score_detections,
    upstream_partial,
)
from genalign.evaluation.geneval.vocabulary import COLORS
from genalign.scoring.shared_results import SharedResults
from genalign.types import Precision, Prompt
from rewards.backbones.clip_encoder import ClipEncoder, load_clip
from rewards.backbones.detectors import Detector, Instance, Mask2Former, describe
from rewards.backbones.pixels import pictures

_GRAY = 153 / 255  # #999, the background of a masked object
_CROPS = 64  # in a batch
_TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")


class ColorClassifier(Protocol):
    """Names the color of an object."""

    @property
    def description(self) -> Mapping[str, Any]:
        """All settings that affect the answers, as JSON types."""

    def __call__(self, crops: Sequence[Tensor], names: Sequence[str]) -> list[str]:
        """Return one of GenEval's ten colors for each crop (3, h, w) in [0, 1] of an object of a class."""


@dataclass(frozen=True)
class ClipColors:
    """CLIP's zero-shot classification among ten colors, by the mean embedding of GenEval's three templates.

    ``model``, ``processor`` and ``dtype`` are as in ``rewards.backbones.clip_encoder.load_clip``; the default has the
    weights of GenEval's ViT-L-14, which the original runs in half precision and on crops resized by Pillow. Crops are
    encoded in batches.
    """

    model: str = "openai/clip-vit-large-patch14"
    processor: str | None = None
    dtype: Precision = "float32"

    @property
    def description(self) -> Mapping[str, Any]:
        """The settings, with the spelling "ClipColours" that is hashed in the protocols of earlier evaluations."""
        return describe(self) | {"class": "ClipColours"}

    @torch.no_grad()
    def __call__(self, crops: Sequence[Tensor], names: Sequence[str]) -> list[str]:
        """Classify crops (3, h, w), which may differ in size."""
        encoder = load_clip(self.model, self.processor, self.dtype).to(crops[0].device)
        parts = [crops[start : start + _CROPS] for start in range(0, len(crops), _CROPS)]
        embedded = [encoder.embed(torch.cat([encoder.prepare(crop[None]) for crop in part])) for part in parts]
        images = F.normalize(torch.cat(embedded), dim=-1)
        classifiers = _color_embeddings(encoder, list(dict.fromkeys(names)))
        logits = torch.stack([image @ classifiers[name].T for image, name in zip(images, names, strict=True)])
        return [COLORS[index] for index in logits.argmax(-1).tolist()]


def _color_embeddings(encoder: ClipEncoder, names: Sequence[str]) -> dict[str, Tensor]:
    """Compute unit embeddings (10, d) of the colors of each of the classes ``names``."""
    texts = [text.format(color=color, name=name) for name in names for color in COLORS for text in _TEMPLATES]
    embeddings = encoder.text(texts).view(len(names), len(COLORS), len(_TEMPLATES), -1).mean(2)
    return dict(zip(names, F.normalize(embeddings, dim=-1), strict=True))


def crop(image: Tensor, box: Box, mask: Tensor | None = None) -> Tensor:
    """Cut a box of at least one pixel from an image (3, H, W), and paint it gray where a mask (H, W) is false.

    The box is rounded to whole pixels as Pillow does, halves to even.
    """
    height, width = image.shape[-2:]
    x1, y1 = min(max(round(box[0]), 0), width - 1), min(max(round(box[1]), 0), height - 1)
    x2, y2 = min(max(round(box[2]), x1 + 1), width), min(max(round(box[3]), y1 + 1), height)
    masked = image if mask is None else torch.where(mask, image, _GRAY)
    return masked[:, y1:y2, x1:x2]


@dataclass(frozen=True)
class GenEvalJudge:
    """A detector and a color classifier, judged by GenEval's rules.

    The defaults ``Mask2Former()`` and ``ClipColors()`` are the closest available to GenEval's own. Images are rounded
    to the 8 bits of a PNG file.
    """

    detector: Detector | None = None
    colors: ColorClassifier | None = None

    @property
    def description(self) -> Mapping[str, Any]:
        """Rules, detector and color classifier, with the key "colours" that earlier protocols have."""
        detector, colors = self._parts()
        return {"rules": "geneval-1", "detector": dict(detector.description), "colours": dict(colors.description)}

    def _parts(self) -> tuple[Detector, ColorClassifier]:
        return self.detector or Mask2Former(), self.colors or ClipColors()

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise ValueError for a prompt without GenEval metadata, or of a class that the detector does not have."""
        detector, _ = self._parts()
        for prompt in prompts:
            names = PromptSpec.from_prompt(prompt).classes
            if detector.classes is not None and (unknown := [name for name in names if name not in detector.classes]):
                raise ValueError(
                    f"{unknown[0]!r} in {prompt.text!r} is none of the {len(detector.classes)} classes that"
                    f" {type(detector).__name__} detects: use Owlv2 or GroundingDino, which detect any class"
                )

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> list[GenEvalScore | None]:
        """Score each image (B, 3, H, W) in [0, 1]; None for an image that is not finite.

        Raises ValueError for another shape, or for a prompt that ``check`` refuses.
        """
        if images.ndim != 4 or images.shape[1] != 3 or len(images) != len(prompts):
            raise ValueError(f"images must be (B, 3, H, W) with B = {len(prompts)} prompts, not {tuple(images.shape)}")
        self.check(prompts)
        scores: list[GenEvalScore | None] = [None] * len(images)
        rows = [row for row, finite in enumerate(images.isfinite().flatten(1).all(1).tolist()) if finite]
        if not rows:
            return scores

        # Detect the objects, and drop those below the detector's thresholds.
        detector, colors = self._parts()
        whole = images if len(rows) == len(images) else torch.stack([images[row] for row in rows])
        pixels = whole.float().clamp(0, 1).mul(255).round() / 255
        specs = [PromptSpec.from_prompt(prompts[row]) for row in rows]
        counted = []
        for instances, spec in zip(detector(pixels, [spec.classes for spec in specs]), specs, strict=True):
            objects = [instance.detection for instance in instances]
            counted.append([instances[i] for i in filter_detections(objects, spec.tag, detector.thresholds)])

        detections = _classify_colors(pixels, counted, specs, colors)
        for row, objects, spec in zip(rows, detections, specs, strict=True):
            scores[row] = score_detections(objects, spec, detector.thresholds.position)
        return scores


def _classify_colors(
    images: Tensor, counted: Sequence[Sequence[Instance]], specs: Sequence[PromptSpec], classifier: ColorClassifier
) -> list[list[Detection]]:
    """Return the detections of each image, with the colors that a rule needs.

    For each color clause with enough objects of its class, these are the colors of its most confident objects. The
    crops of the batch are classified at once.
    """
    detections = [[instance.detection for instance in instances] for instances in counted]
    needed: set[tuple[int, int]] = set()
    for row, spec in enumerate(specs):
        for clause in spec.include:
            of_class = [(row, index) for index, item in enumerate(detections[row]) if item.name == clause.name]
            if clause.color is not None and len(of_class) >= clause.count:
                needed.update(of_class[: clause.count])  # detections of a class are in order of confidence
    if not needed:
        return detections
    places = sorted(needed)
    crops = [crop(images[row], detections[row][index].box, counted[row][index].mask) for row, index in places]
    colors = classifier(crops, [detections[row][index].name for row, index in places])
    for (row, index), color in zip(places, colors, strict=True):
        detections[row][index] = replace(detections[row][index], color=color)
    return detections


_judged = SharedResults[list[GenEvalScore | None]]()


@dataclass(frozen=True)
class GenEvalReward:
    """GenEval's score of an image, in [0, 1]: partial credit, whether the image is correct, or a single criterion.

    Several of these rewards with equal detectors share the detections of a batch.

    Args:
        score: "partial" credit; "strict" or "relaxed" (GenEval's own rule), 1.0 for a correct image and 0.0 for a
            wrong one, see ``genalign.evaluation.geneval.scoring.GenEvalScore``; "count", "color" or "position", the
            mean over the clauses of a prompt that have such a criterion, and 1.0 without any; or "upstream_partial",
            Flow-GRPO's own partial credit with its faults, for comparison with its curves, of images that went through
            JPEG, as on the way to its reward server.
        detector: The detector of objects; null takes ``Mask2Former()``, the closest available to GenEval's own.
        colors: The classifier of colors; null takes ``ClipColors()``, the closest available to GenEval's own.
    """

    score: Literal["partial", "strict", "relaxed", "upstream_partial", "count", "color", "position"] = "partial"
    detector: Detector | None = None
    colors: ColorClassifier | None = None

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Score images (B, 3, H, W) in [0, 1]: (B,) float32 on the CPU, NaN for an image that is not finite."""
        detector = self.detector or Mask2Former()
        judge = GenEvalJudge(detector, self.colors)
        if self.score == "upstream_partial":
            scores = judge(_through_jpeg(samples), prompts)
        else:
            scores = _judged(judge, samples, prompts, lambda: judge(samples, prompts))
        values = []
        for score, prompt in zip(scores, prompts, strict=True):
            if score is None:
                values.append(math.nan)
            elif self.score == "upstream_partial":
                spec, margin = PromptSpec.from_prompt(prompt), detector.thresholds.position
                values.append(upstream_partial(score.detections, spec, margin))
            elif self.score in ("count", "color", "position"):
                values.append(score.mean_of(self.score))
            else:
                values.append(float(getattr(score, self.score)))
        return torch.tensor(values, dtype=torch.float32)


def _through_jpeg(images: Tensor) -> Tensor:
    """Encode and decode images (B, 3, H, W) as JPEG of Pillow's own quality, 75; one with NaN stays as it is."""
    decoded = []
    for image, picture in zip(images, pictures(images), strict=True):
        if picture is None:
            decoded.append(image)
            continue
        file = io.BytesIO()
        picture.save(file, format="JPEG")
        with Image.open(file, formats=("JPEG",)) as again:
            pixels = torch.from_numpy(np.array(again)).permute(2, 0, 1)
        decoded.append(pixels.to(images) / 255)
    return torch.stack(decoded)
