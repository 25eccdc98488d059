"""GenEval's verdict on a picture of the shapes world, exact and without learned weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from torch import Tensor

from genalign.evaluation.geneval.boxes import relations
from genalign.types import Metadata
from genalign.worlds.shapes.detection import Detection, detect
from genalign.worlds.shapes.geometry import PALETTE, SHAPES
from genalign.worlds.verdict import Verdict, verdict

__all__ = ["VERIFIER_VERSION", "Detection", "Verdict", "detect", "judge", "verify"]

VERIFIER_VERSION = "shapes-1"
Clause = Mapping[str, Any]


def verify(images: Tensor, metadata: Sequence[Metadata]) -> list[Verdict]:
    """A verdict for each image (B, 3, 64, 64) in [0, 1] by its prompt's GenEval metadata (B).

    Raises:
        ValueError: for unequal lengths, NaN pixels, or metadata of another world.
    """
    if len(images) != len(metadata):
        raise ValueError(f"{len(images)} images but {len(metadata)} metadata: give one for each image")
    return [judge(detections, item) for detections, item in zip(detect(images), metadata, strict=True)]


def judge(detections: Sequence[Detection], metadata: Metadata) -> Verdict:
    """Score detections against GenEval ``metadata`` (include, exclude).

    With n asked for and m found of a clause's shape: count = max(0, 1 - |n - m| / n); color = the share of the right
    colour and position = the share of (object, reference) pairs in the relation, both 0 where a count they rest on is
    wrong; clean = explained / all objects, where a clause explains up to n objects of its shape, 0 for no object. The
    criteria are "count", "color" and "position" once per clause that asks for it, then "clean".

    References: Ghosh et al., GenEval, arXiv:2310.11513, and its partial credit as a reward in Flow-GRPO,
    arXiv:2505.05470; here clamped at 0, and a wrong relation earns nothing.
    """
    include: Sequence[Clause] = metadata["include"]
    _check_vocabulary(include)
    found = [_of_shape(detections, clause["class"]) for clause in include]
    criteria = [("count", _count(clause, objects)) for clause, objects in zip(include, found, strict=True)]
    criteria += [
        ("color", _color(clause, objects)) for clause, objects in zip(include, found, strict=True) if "color" in clause
    ]
    criteria += [("position", _position(i, include, found)) for i, clause in enumerate(include) if "position" in clause]
    criteria.append(("clean", _clean(include, found, len(detections))))
    return verdict(criteria, _relaxed(detections, metadata))


def _check_vocabulary(include: Sequence[Clause]) -> None:
    for clause in include:
        if clause["class"] not in SHAPES:
            raise ValueError(f"{clause['class']!r} is not one of this world's shapes: {', '.join(SHAPES)}")
        if clause.get("color", "red") not in PALETTE:
            raise ValueError(f"{clause['color']!r} is not one of this world's colours: {', '.join(PALETTE)}")


def _of_shape(detections: Sequence[Detection], shape: str) -> list[Detection]:
    return [detection for detection in detections if detection.shape == shape]


def _right_color(clause: Clause, objects: Sequence[Detection]) -> int:
    """How many have the clause's colour; all, where it names none."""
    return sum(detection.color == clause.get("color", detection.color) for detection in objects)


def _count(clause: Clause, objects: Sequence[Detection]) -> float:
    wanted = int(clause["count"])
    return max(0.0, 1 - abs(wanted - len(objects)) / wanted)


def _color(clause: Clause, objects: Sequence[Detection]) -> float:
    wanted = int(clause["count"])
    return _right_color(clause, objects) / wanted if len(objects) == wanted else 0.0


def _position(index: int, include: Sequence[Clause], found: Sequence[Sequence[Detection]]) -> float:
    relation, reference = include[index]["position"]
    if any(len(found[i]) != include[i]["count"] for i in (index, reference)):
        return 0.0
    pairs = list(product(found[index], found[reference]))
    return sum(relation in relations(a.box, b.box) for a, b in pairs) / len(pairs)


def _clean(include: Sequence[Clause], found: Sequence[Sequence[Detection]], total: int) -> float:
    explained = sum(min(clause["count"], len(objects)) for clause, objects in zip(include, found, strict=True))
    return explained / total if total else 0.0


def _relaxed(detections: Sequence[Detection], metadata: Metadata) -> bool:
    """GenEval's ``evaluate``: only the ``count`` most certain objects of each clause's shape are looked at."""
    certain = sorted(detections, key=lambda detection: -detection.iou)
    groups: list[list[Detection] | None] = []
    for clause in metadata["include"]:
        objects = _of_shape(certain, clause["class"])[: clause["count"]]
        groups.append(objects if _holds(clause, objects, groups) else None)
    surplus = any(len(_of_shape(certain, clause["class"])) >= clause["count"] for clause in metadata.get("exclude", ()))
    return None not in groups and not surplus


def _holds(clause: Clause, objects: Sequence[Detection], earlier: Sequence[Sequence[Detection] | None]) -> bool:
    if _right_color(clause, objects) < clause["count"]:
        return False
    if "position" not in clause:
        return True
    relation, reference = clause["position"]
    targets = earlier[reference]
    return targets is not None and all(relation in relations(a.box, b.box) for a, b in product(objects, targets))
