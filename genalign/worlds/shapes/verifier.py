"""The verifier of the shapes world: GenEval's rules on exact detections, without learned weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from torch import Tensor

from genalign.evaluation.geneval.scoring import relations
from genalign.types import Metadata
from genalign.worlds.shapes.detection import ShapeDetection, detect
from genalign.worlds.shapes.geometry import PALETTE, SHAPES
from genalign.worlds.verification import Verification, summarize

__all__ = ["VERIFIER_VERSION", "ShapeDetection", "Verification", "detect", "verify", "verify_detections"]

VERIFIER_VERSION = "shapes-1"
Clause = Mapping[str, Any]


def verify(images: Tensor, metadata: Sequence[Metadata]) -> list[Verification]:
    """Verify images (B, 3, 64, 64) in [0, 1] against the GenEval metadata (B) of their prompts.

    Raises:
        ValueError: for unequal lengths, NaN pixels, or metadata of another world.
    """
    if len(images) != len(metadata):
        raise ValueError(f"{len(images)} images but {len(metadata)} metadata: give one for each image")
    return [verify_detections(detections, item) for detections, item in zip(detect(images), metadata, strict=True)]


def verify_detections(detections: Sequence[ShapeDetection], metadata: Metadata) -> Verification:
    """Score detections against GenEval ``metadata`` (include, exclude).

    With n requested and m detected objects of a clause's shape: count = max(0, 1 - |n - m| / n); color = the share of
    the right color and position = the share of (object, reference) pairs in the relation, both 0 where a count they
    depend on is wrong; clean = explained / all objects, where a clause explains up to n objects of its shape, 0 for no
    object. The criteria are "count", "color" and "position" once per clause that has it, then "clean".

    References: Ghosh et al., GenEval, arXiv:2310.11513, and its partial credit as a reward in Flow-GRPO,
    arXiv:2505.05470; here clamped at 0, and a wrong relation earns nothing.
    """
    include: Sequence[Clause] = metadata["include"]
    _require_vocabulary(include)
    groups = [_of_shape(detections, clause["class"]) for clause in include]
    counts = [int(clause["count"]) for clause in include]
    right_count = [len(objects) == n for objects, n in zip(groups, counts, strict=True)]
    count, color, position = list[tuple[str, float]](), list[tuple[str, float]](), list[tuple[str, float]]()
    for i, clause in enumerate(include):
        count.append(("count", max(0.0, 1 - abs(counts[i] - len(groups[i])) / counts[i])))
        if "color" in clause:
            color.append(("color", _right_color(clause, groups[i]) / counts[i] if right_count[i] else 0.0))
        if "position" in clause:
            relation, reference = clause["position"]
            counted = right_count[i] and right_count[reference]
            holds = [relation in relations(a.box, b.box) for a, b in product(groups[i], groups[reference])]
            position.append(("position", sum(holds) / max(len(holds), 1) if counted else 0.0))
    explained = sum(min(n, len(objects)) for objects, n in zip(groups, counts, strict=True))
    clean = ("clean", explained / max(len(detections), 1))
    recognized = bool(detections) and all(detection.shape in SHAPES for detection in detections)
    return summarize([*count, *color, *position, clean], _relaxed(detections, metadata), recognized)


def _require_vocabulary(include: Sequence[Clause]) -> None:
    for clause in include:
        if clause["class"] not in SHAPES:
            raise ValueError(f"{clause['class']!r} is not one of this world's shapes: {', '.join(SHAPES)}")
        if clause.get("color", "red") not in PALETTE:
            raise ValueError(f"{clause['color']!r} is not one of this world's colors: {', '.join(PALETTE)}")


def _of_shape(detections: Sequence[ShapeDetection], shape: str) -> list[ShapeDetection]:
    return [detection for detection in detections if detection.shape == shape]


def _right_color(clause: Clause, objects: Sequence[ShapeDetection]) -> int:
    """The number of objects of the clause's color; all, where it names none."""
    return sum(detection.color == clause.get("color", detection.color) for detection in objects)


def _relaxed(detections: Sequence[ShapeDetection], metadata: Metadata) -> bool:
    """GenEval's ``evaluate``: only the ``count`` most confident objects of each clause's shape count."""
    certain = sorted(detections, key=lambda detection: -detection.iou)
    groups: list[list[ShapeDetection] | None] = []
    for clause in metadata["include"]:
        objects = _of_shape(certain, clause["class"])[: clause["count"]]
        groups.append(objects if _holds(clause, objects, groups) else None)
    surplus = any(len(_of_shape(certain, clause["class"])) >= clause["count"] for clause in metadata.get("exclude", ()))
    return None not in groups and not surplus


def _holds(
    clause: Clause, objects: Sequence[ShapeDetection], earlier: Sequence[Sequence[ShapeDetection] | None]
) -> bool:
    if _right_color(clause, objects) < clause["count"]:
        return False
    if "position" not in clause:
        return True
    relation, reference = clause["position"]
    targets = earlier[reference]
    return targets is not None and all(relation in relations(a.box, b.box) for a, b in product(objects, targets))
