"""GenEval by a detector and CLIP, as a judge for evaluations and as a reward (arXiv:2310.11513).

Numbers are GenEval-style, by the detector that the judge's description names: see ``rewards.backbones.detectors``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from genalign.evaluation.geneval.judge import Judgement
from genalign.evaluation.geneval.metadata import PromptSpec
from genalign.evaluation.geneval.scoring import Box, Detection, Thresholds, filter_detections, upstream_partial, verdict
from genalign.evaluation.geneval.vocabulary import COLORS
from genalign.types import Prompt
from rewards.backbones.clip_encoder import load_clip
from rewards.backbones.detectors import Detector, Instance, Mask2Former, describe

_GREY = 153 / 255  # #999, what surrounds a masked object
_TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")


class ColorClassifier(Protocol):
    """Names the colour of an object."""

    @property
    def description(self) -> Mapping[str, Any]:
        """Everything that its answers depend on, ready for JSON."""

    def __call__(self, crops: Sequence[Tensor], names: Sequence[str]) -> list[str]:
        """One of GenEval's ten colours for each crop (3, h, w) in [0, 1] of an object of a class."""


@dataclass(frozen=True)
class ClipColors:
    """CLIP's zero-shot choice among ten colors, by the mean embedding of GenEval's three templates.

    ``model`` and ``processor`` are as in ``rewards.backbones.clip_encoder.load_clip``; the default has the weights of
    GenEval's ViT-L-14, which the original runs in half precision and on crops resized by Pillow.
    """

    model: str = "openai/clip-vit-large-patch14"
    processor: str | None = None

    @property
    def description(self) -> Mapping[str, Any]:
        return describe(self)

    @torch.no_grad()
    def __call__(self, crops: Sequence[Tensor], names: Sequence[str]) -> list[str]:
        """Crops may differ in size."""
        encoder = load_clip(self.model, self.processor).to(crops[0].device)
        images = F.normalize(torch.cat([encoder(crop[None]) for crop in crops]).float(), dim=-1)
        found = torch.stack([image @ self._classifier(name).T for image, name in zip(images, names, strict=True)])
        return [COLORS[index] for index in found.argmax(-1).tolist()]

    def _classifier(self, name: str) -> Tensor:
        """Unit embeddings (10, d) of the colours of a class."""
        texts = [template.format(color=color, name=name) for color in COLORS for template in _TEMPLATES]
        embeddings = load_clip(self.model, self.processor).text(texts)
        return F.normalize(embeddings.view(len(COLORS), len(_TEMPLATES), -1).mean(1), dim=-1)


def crop(image: Tensor, box: Box, mask: Tensor | None = None) -> Tensor:
    """The part of an image (3, H, W) in a box, grey where a mask (H, W) is false; at least one pixel.

    A box is rounded to whole pixels as Pillow does it, halves to even.
    """
    height, width = image.shape[-2:]
    x1, y1 = min(max(round(box[0]), 0), width - 1), min(max(round(box[1]), 0), height - 1)
    x2, y2 = min(max(round(box[2]), x1 + 1), width), min(max(round(box[3]), y1 + 1), height)
    shown = image if mask is None else torch.where(mask, image, _GREY)
    return shown[:, y1:y2, x1:x2]


@dataclass(frozen=True)
class GenEvalJudge:
    """What a detector sees, judged by GenEval's rules; the defaults are GenEval's choice as far as it can be had here,
    ``Mask2Former()`` and ``ClipColours()``. Images go through as the 8 bits that a PNG file has.
    """

    detector: Detector | None = None
    colours: ColorClassifier | None = None

    @property
    def description(self) -> Mapping[str, Any]:
        detector, colours = self._parts()
        return {"rules": "geneval-1", "detector": dict(detector.description), "colours": dict(colours.description)}

    @property
    def position(self) -> float:
        """The detector's threshold of positions."""
        return self._parts()[0].thresholds.position

    def _parts(self) -> tuple[Detector, ColorClassifier]:
        return self.detector or Mask2Former(), self.colours or ClipColors()

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise ValueError for a prompt without GenEval metadata, or of a class that the detector cannot find."""
        detector, _ = self._parts()
        for prompt in prompts:
            names = PromptSpec.of(prompt).names
            if detector.classes is not None and (unknown := [name for name in names if name not in detector.classes]):
                raise ValueError(
                    f"{unknown[0]!r} in {prompt.text!r} is none of the {len(detector.classes)} classes that"
                    f" {type(detector).__name__} finds: use Owlv2 or GroundingDino, which find what is named"
                )

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> list[Judgement | None]:
        """A judgement for each image (B, 3, H, W) in [0, 1]; None for one that is not finite.

        Raises ValueError for another shape, or for a prompt that ``check`` refuses.
        """
        if images.ndim != 4 or images.shape[1] != 3 or len(images) != len(prompts):
            raise ValueError(f"images must be (B, 3, H, W) with B = {len(prompts)} prompts, not {tuple(images.shape)}")
        self.check(prompts)
        rows = images.isfinite().flatten(1).all(1).nonzero().flatten().tolist()
        judged: list[Judgement | None] = [None] * len(images)
        if rows:
            shown = images[rows].float().clamp(0, 1).mul(255).round() / 255
            for row, found in zip(rows, self._judged(shown, [PromptSpec.of(prompts[row]) for row in rows]), strict=True):
                judged[row] = found
        return judged

    def _judged(self, images: Tensor, requests: Sequence[PromptSpec]) -> list[Judgement]:
        detector, colours = self._parts()
        seen = detector(images, [request.names for request in requests])
        counted = [_counted(*pair, detector.thresholds) for pair in zip(seen, requests, strict=True)]
        coloured = _coloured(images, counted, requests, colours)
        return [
            Judgement(verdict(found, request, self.position), tuple(found))
            for found, request in zip(coloured, requests, strict=True)
        ]


def _counted(instances: Sequence[Instance], request: PromptSpec, thresholds: Thresholds) -> list[Instance]:
    return [instances[i] for i in filter_detections([instance.detection for instance in instances], request.tag, thresholds)]


def _coloured(
    images: Tensor, counted: Sequence[Sequence[Instance]], requests: Sequence[PromptSpec], colours: ColorClassifier
) -> list[list[Detection]]:
    """The objects with the colours that a rule will look at: of a class whose colour is asked for, and which is there
    often enough, those of the most certain. All crops of the batch are named at once.
    """
    found = [[instance.detection for instance in instances] for instances in counted]
    asked = [(row, index) for row, request in enumerate(requests) for index in _looked_at(found[row], request)]
    if not asked:
        return found
    crops = [crop(images[row], found[row][index].box, counted[row][index].mask) for row, index in asked]
    named = colours(crops, [found[row][index].name for row, index in asked])
    for (row, index), color in zip(asked, named, strict=True):
        found[row][index] = replace(found[row][index], color=color)
    return found


def _looked_at(detections: Sequence[Detection], request: PromptSpec) -> list[int]:
    """Indices of the objects whose colour matters; within a class they are in order of certainty."""
    chosen: set[int] = set()
    for clause in request.include:
        of_class = [index for index, found in enumerate(detections) if found.name == clause.name]
        if clause.color is not None and len(of_class) >= clause.count:
            chosen.update(of_class[: clause.count])
    return sorted(chosen)


@dataclass(frozen=True)
class GenEvalReward:
    """``partial`` credit in [0, 1], or 1.0 for what is ``strict``-ly right, or right by GenEval's own ``relaxed`` rule,
    else 0.0 (``genalign.evaluation.geneval.scoring.Verdict``). ``upstream_partial`` is Flow-GRPO's own partial credit,
    with its faults, for comparison with its curves. ``detector`` and ``colours`` are as in ``GenEvalJudge``.
    """

    score: Literal["partial", "strict", "relaxed", "upstream_partial"] = "partial"
    detector: Detector | None = None
    colours: ColorClassifier | None = None

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores (B,), float32 on the CPU, of images (B, 3, H, W) in [0, 1]; NaN for an image that is not finite."""
        judge = GenEvalJudge(self.detector, self.colours)
        judged = zip(judge(samples, prompts), prompts, strict=True)
        return torch.tensor([self._value(judge, *pair) for pair in judged], dtype=torch.float32)

    def _value(self, judge: GenEvalJudge, judgement: Judgement | None, prompt: Prompt) -> float:
        if judgement is None:
            return math.nan
        match self.score:
            case "partial":
                return judgement.verdict.partial
            case "strict":
                return float(judgement.verdict.strict)
            case "relaxed":
                return float(judgement.verdict.relaxed)
            case "upstream_partial":
                return upstream_partial(judgement.detections, PromptSpec.of(prompt), judge.position)
