"""T2I-CompBench and "++" (arXiv:2307.06350): attributes by questions, places and numbers by boxes, actions by CLIP."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from genalign.evaluation.benchmarks.benchmark import (
    Benchmark,
    Judges,
    average,
    by_prompt,
    missing_counts,
    require_metadata,
)
from genalign.evaluation.benchmarks.boxes import center, detect, iou, require_classes
from genalign.evaluation.benchmarks.compbench_prompts import ATTRIBUTES, CATEGORIES, read_compbench
from genalign.evaluation.benchmarks.tifa import as_json, ask
from genalign.evaluation.evaluate import SampleRecord
from genalign.evaluation.geneval.scoring import Box, Detection, overlap
from genalign.evaluation.scorers import ExplainedScores
from genalign.types import Prompt, PromptSet

_NEAR = 150.0  # pixels
_MOST_OVERLAP, _FULL_OVERLAP_3D, _DUPLICATE = 0.1, 0.5, 0.9
_LEAST_SPATIAL = 0.5  # a lower score of places counts 0
_NAMES = {
    **dict.fromkeys(("boy", "girl", "man", "woman"), "person"),
    **{"ship": "boat", "goldfish": "fish", "painting": "picture"},
}
"""The classes that the original's detector has for some nouns."""

_JUDGES = {
    "phrases": "questions",
    "places": "detector",
    "places_3d": "detector",
    "counts": "detector",
    "text": "similarity",
}
_PARTS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(ATTRIBUTES, ("phrases",)),
    "spatial": ("places",),
    "3d_spatial": ("places_3d",),
    "numeracy": ("counts",),
    "non_spatial": ("text",),
    "complex": ("phrases", "places", "text"),
}
_COMPLEX = {"spatial": ("phrases", "places"), "action": ("phrases", "text")}
_Part = Callable[[Judges, Tensor, Sequence[Prompt]], list[tuple[float, Any]]]


@dataclass(frozen=True)
class CompBenchScorer:
    """The score of a prompt's category, in [0, 1], or the mean of several for complex ones. NaN if one is missing."""

    judges: Judges

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> ExplainedScores:
        """Score images (B, 3, H, W) in [0, 1]; the details are what each part rests on."""
        scores, details = [list[float]() for _ in prompts], [dict[str, Any]() for _ in prompts]
        needed = [_parts(prompt) for prompt in prompts]
        for name, score in _SCORES.items():
            rows = [row for row, parts in enumerate(needed) if name in parts]
            if rows:
                values = score(self.judges, samples[rows], [prompts[row] for row in rows])
                for row, (value, detail) in zip(rows, values, strict=True):
                    scores[row].append(value)
                    details[row][name] = detail
        return ExplainedScores(torch.tensor([math.fsum(row) / len(row) for row in scores]), details)


def _parts(prompt: Prompt) -> tuple[str, ...]:
    parts = _PARTS.get(prompt.task)
    if parts is None:
        raise ValueError(
            f"{prompt.text!r} is of no category of T2I-CompBench but of {prompt.task!r}: read its own files"
        )
    return _COMPLEX.get(require_metadata(prompt, "kind"), parts) if prompt.task == "complex" else parts


def _score_phrases(judges: Judges, images: Tensor, prompts: Sequence[Prompt]) -> list[tuple[float, Any]]:
    """Multiply the probabilities that each phrase, as a question, is answered by yes."""
    texts = [[f"{phrase}?" for phrase in require_metadata(prompt, "phrases")] for prompt in prompts]
    return [(float(part.prod()), as_json(part)) for part in ask(judges.need("questions"), images, texts)]


def _score_text(judges: Judges, images: Tensor, prompts: Sequence[Prompt]) -> list[tuple[float, Any]]:
    """Return the cosines of images and texts, without adjectives for complex prompts."""
    key = "text_without_adjectives"
    texts = [Prompt(require_metadata(prompt, key)) if prompt.task == "complex" else prompt for prompt in prompts]
    cosines: list[float] = judges.need("similarity")(images, texts).tolist()
    return [(value, value if math.isfinite(value) else None) for value in cosines]


def _score_places(judges: Judges, images: Tensor, prompts: Sequence[Prompt]) -> list[tuple[float, Any]]:
    """Score the confidence of two objects by 1/4 each, and their place by 1/2; less than 1/2 counts 0."""

    def relation(row: int, a: Detection, b: Detection) -> float:
        return relation_score(require_metadata(prompts[row], "relation"), a.box, b.box)

    pairs = _score_pairs(judges, images, prompts, relation)
    return [(0.0 if value < _LEAST_SPATIAL else value, detail) for value, detail in pairs]


def _score_places_3d(judges: Judges, images: Tensor, prompts: Sequence[Prompt]) -> list[tuple[float, Any]]:
    """Score as ``_score_places`` by depth, without a lowest score."""
    nearness = judges.need("depth")(images)

    def relation(row: int, a: Detection, b: Detection) -> float:
        return depth_score(require_metadata(prompts[row], "relation"), a.box, b.box, nearness[row])

    return _score_pairs(judges, images, prompts, relation)


def _score_pairs(
    judges: Judges, images: Tensor, prompts: Sequence[Prompt], relation: Callable[[int, Detection, Detection], float]
) -> list[tuple[float, Any]]:
    """Score the best object of each of two names by a quarter of its confidence, and their relation by half."""
    names, scores = [_object_names(prompt) for prompt in prompts], list[tuple[float, Any]]()
    for row, (pair, objects) in enumerate(zip(names, detect(judges.need("detector"), images, names), strict=True)):
        if objects is None:
            scores.append((math.nan, None))
            continue
        best = [next((item for item in objects if item.name == name), None) for name in pair]
        score = math.fsum(0.25 * item.score for item in best if item is not None)
        if len(best) == 2 and best[0] is not None and best[1] is not None:
            score += relation(row, best[0], best[1]) / 2
        scores.append((score, [_as_json(item) for item in objects]))
    return scores


def _score_counts(judges: Judges, images: Tensor, prompts: Sequence[Prompt]) -> list[tuple[float, Any]]:
    """Score each object by 1/2 if it is there, and by 1 if it is there in the right number."""
    scores: list[tuple[float, Any]] = []
    names = [_object_names(prompt) for prompt in prompts]
    detected = detect(judges.need("detector"), images, names)
    for prompt, wanted, objects in zip(prompts, names, detected, strict=True):
        if objects is None:
            scores.append((math.nan, None))
            continue
        distinct = without_duplicates(objects)
        values = []
        for name, (_, count) in zip(wanted, require_metadata(prompt, "counts"), strict=True):
            number = sum(item.name == name for item in distinct)
            values.append(0.5 * (number > 0) + 0.5 * (number == count))
        scores.append((average(values), [_as_json(item) for item in distinct]))
    return scores


_SCORES: Mapping[str, _Part] = {
    "phrases": _score_phrases,
    "places": _score_places,
    "places_3d": _score_places_3d,
    "counts": _score_counts,
    "text": _score_text,
}


def _as_json(item: Detection) -> list[Any]:
    return [item.name, *(round(value, 2) for value in item.box), round(item.score, 4)]


def relation_score(relation: str, a: Box, b: Box) -> float:
    """Score in [0, 1] how well box ``a`` is in a relation to box ``b``.

    "next to", "near" and "on side of": 1 within 150 pixels along either axis, else 150 over the longer distance. The
    others: the offset must be longest in the relation's direction; an overlap of 0.1 or more divides 0.1.
    """
    (ax, ay), (bx, by) = center(a), center(b)
    dx, dy = bx - ax, by - ay
    if relation in ("next to", "near", "on side of"):
        return 1.0 if min(abs(dx), abs(dy)) < _NEAR else _NEAR / max(abs(dx), abs(dy))
    along, across = {
        "on the left of": (dx, dy),
        "on the right of": (-dx, dy),
        "on the top of": (dy, dx),
        "on the bottom of": (-dy, dx),
    }[relation]
    if along <= abs(across):
        return 0.0
    common = iou(a, b)
    return 1.0 if common < _MOST_OVERLAP else _MOST_OVERLAP / common


def depth_score(relation: str, a: Box, b: Box, nearness: Tensor) -> float:
    """Score in [0, 1] whether ``a`` is in front of ``b``, or behind it, by the mean nearness (H, W) inside both boxes.

    Boxes must overlap: fully counts an overlap of 1/2, in proportion a smaller one.
    """
    means = []
    for box in (a, b):
        x, y = int(box[0]), int(box[1])  # in whole pixels, at least one
        inside = nearness[y : max(int(box[3]), y + 1), x : max(int(box[2]), x + 1)]
        means.append(float(inside.float().mean()))
    right = means[0] > means[1] if relation == "in front of" else means[0] < means[1]
    return min(iou(a, b) / _FULL_OVERLAP_3D, 1.0) if right else 0.0


def without_duplicates(objects: Sequence[Detection]) -> list[Detection]:
    """Leave out objects that a better one of the same name overlaps, or that one contains the other, by over 0.9."""
    distinct: list[Detection] = []
    for item in objects:
        if not any(item.name == other.name and _duplicates(item.box, other.box) for other in distinct):
            distinct.append(item)
    return distinct


def _duplicates(a: Box, b: Box) -> bool:
    inside = (max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    common = _area(inside)
    return overlap(a, b) > _DUPLICATE or common > _DUPLICATE * min(_area(a), _area(b))


def _area(box: Box) -> float:
    """Compute the area of a box that includes its last pixel; 0 for an empty one."""
    return max(box[2] - box[0] + 1, 0) * max(box[3] - box[1] + 1, 0)


def aggregate_compbench(records: Sequence[SampleRecord], prompts: PromptSet) -> dict[str, float]:
    """Average the scores over images, prompts and, for the headline, which the original does not have, categories."""
    categories: dict[str, list[float]] = {}
    answers: list[Any] = []  # of questions, boxes and cosines; None for a missing one
    for prompt, rows in by_prompt(records, prompts):
        categories.setdefault(prompt.task, []).append(average(row.scores["compbench"] for row in rows))
        for detail in (row.details.get("compbench", {}) for row in rows):
            for part in (detail.get(part) for part in _parts(prompt)):
                answers += part if isinstance(part, list) else [part]
    parts = {category: average(categories[category]) for category in CATEGORIES if category in categories}
    return {
        "mean over categories": average(parts.values()),
        **parts,
        **missing_counts(answers, (row.scores["compbench"] for row in records)),
    }


def _needs(prompts: PromptSet, judges: Judges) -> tuple[str, ...]:
    """Return the judges of the categories. Raises ValueError for objects that the detector cannot detect."""
    parts = dict.fromkeys(part for prompt in prompts.prompts for part in _parts(prompt))
    names = dict.fromkeys(_JUDGES[part] for part in parts)
    if "detector" in names:
        require_classes(judges, [name for prompt in prompts.prompts for name in _object_names(prompt)])
    return (*names, "depth") if "places_3d" in parts else tuple(names)


def _object_names(prompt: Prompt) -> list[str]:
    """Return the objects of a prompt by the names that the original's detector has."""
    metadata = prompt.metadata or {}
    names = [*metadata.get("objects", ()), *(name for name, _ in metadata.get("counts", ()))]
    return [_NAMES.get(name, name) for name in names]


COMPBENCH = Benchmark(
    name="compbench",
    read=read_compbench,
    needs=_needs,
    scorers=lambda judges: {"compbench": CompBenchScorer(judges)},
    aggregate=aggregate_compbench,
    rules=(
        "compbench-1: phrases by product, those of 'a red cup and a blue mug' by a pattern and of sentences by spaCy;"
        " places by the dominant axis, between the words on both sides of the relation; 3D places by depth in rows and"
        " columns, which the original swaps; counts without duplicates; cosines unscaled; the question judge stands for"
        " BLIP-VQA, the detector for UniDet, the depth for DPT, the similarity for CLIP ViT-B/32"
    ),
    images=10,
)
