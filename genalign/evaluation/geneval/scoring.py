"""GenEval's rules on detected objects (Ghosh et al., arXiv:2310.11513), and their stricter and partial forms.

Pure functions of boxes, scores and colors; detectors are in ``rewards.backbones.detectors``. ``relaxed`` is GenEval's
own rule, ``strict`` the rule of Flow-GRPO's reward (arXiv:2505.05470), and ``partial`` its partial credit without the
faults that ``upstream_partial`` reproduces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product

import numpy as np

from genalign.evaluation.geneval.metadata import Clause, PromptSpec
from genalign.evaluation.geneval.vocabulary import COLORS

Box = tuple[float, float, float, float]
"""Corners (x1, y1, x2, y2) in pixels, with y pointing down."""


@dataclass(frozen=True)
class Detection:
    """One object: its class, box in pixels, confidence in [0, 1], and color, which is None unless a rule needs it."""

    name: str
    box: Box
    score: float
    color: str | None = None


@dataclass(frozen=True)
class Thresholds:
    """Thresholds that decide which detections count; the defaults are GenEval's.

    Detections must score above ``confidence``, or above ``counting`` in the counting task. The best ``max_objects`` of
    a class count, except boxes that overlap a better one by ``max_overlap`` or more (1 excludes none). ``position`` is
    the fraction of their summed sizes by which the distance of two boxes shrinks before it is a relation.
    """

    confidence: float = 0.3
    counting: float = 0.9
    max_objects: int = 16
    max_overlap: float = 1.0
    position: float = 0.1


@dataclass(frozen=True)
class GenEvalScore:
    """How well an image matches its prompt.

    ``relaxed`` is GenEval's ``correct``: it checks the ``count`` most confident objects of each class and ignores
    others unless ``exclude`` names them; ``reason`` is its explanation, empty for a correct image. ``strict`` requires
    exactly the right counts, all in the right color and relation, and nothing that ``exclude`` names. Flow-GRPO's
    server ignores ``exclude`` there: a difference for classes that ``include`` lacks, in none of GenEval's 553 rows.
    ``partial`` is the mean of ``criteria``, each in [0, 1]: a "count" per clause, and a "color" and "position" per
    clause that has one. ``detections`` are the objects that were scored.
    """

    strict: bool
    relaxed: bool
    partial: float
    reason: str
    criteria: tuple[tuple[str, float], ...]
    detections: tuple[Detection, ...] = field(compare=False)

    def mean_of(self, criterion: str) -> float:
        """Return the mean of the criteria of a name; 1 where the prompt asks for none."""
        values = [value for name, value in self.criteria if name == criterion]
        return sum(values) / len(values) if values else 1.0


def filter_detections(detections: Sequence[Detection], tag: str, thresholds: Thresholds) -> list[int]:
    """Return the indices of the detections that count in the task ``tag``, by class and descending confidence.

    As in GenEval, scores and threshold are compared in float32, and the last of equally confident ones comes first.
    """
    least = np.float32(thresholds.counting if tag == "counting" else thresholds.confidence)
    counted: list[int] = []
    for name in dict.fromkeys(detection.name for detection in detections):
        confident = [i for i, item in enumerate(detections) if item.name == name and np.float32(item.score) > least]
        best: list[int] = []
        for i in sorted(confident, key=lambda i: detections[i].score)[::-1][: thresholds.max_objects]:
            overlaps = (overlap(detections[i].box, detections[j].box) for j in best)
            if thresholds.max_overlap == 1 or all(value < thresholds.max_overlap for value in overlaps):
                best.append(i)
        counted += best
    return counted


def relations(a: Box, b: Box, margin: float = 0.1) -> frozenset[str]:
    """Return the relations of box ``a`` to box ``b`` by GenEval's ``relative_position`` (evaluate_images.py).

    The offset of the centers is shrunk by ``margin`` times the summed box sizes, then divided by its unshrunk norm;
    a component beyond 0.5 in absolute value is a relation.
    """
    offset = np.array([(a[0] + a[2] - b[0] - b[2]) / 2, (a[1] + a[3] - b[1] - b[3]) / 2])
    extent = np.array([a[2] - a[0] + b[2] - b[0], a[3] - a[1] + b[3] - b[1]])
    shrunk = np.sign(offset) * np.maximum(np.abs(offset) - margin * extent, 0)
    if (np.abs(shrunk) < 1e-3).all():
        return frozenset()
    dx, dy = shrunk / np.linalg.norm(offset)
    names = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return frozenset(name for name, true in names.items() if true)


def overlap(a: Box, b: Box) -> float:
    """Return the intersection over union by GenEval's convention, in which a box includes its last pixel."""
    common = _area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    union = _area(a) + _area(b) - common
    return common / union if union else 0.0


def _area(box: Box) -> float:
    return max(box[2] - box[0] + 1, 0) * max(box[3] - box[1] + 1, 0)


def score_detections(
    detections: Sequence[Detection], spec: PromptSpec, position: float = Thresholds.position
) -> GenEvalScore:
    """Score the detections that count (see ``filter_detections``) against a prompt's clauses.

    With n required and m detected objects of a clause's class: count = max(0, 1 - |n - m| / n); color is the fraction
    of objects in the right color and position the fraction of (object, target) pairs in the relation, both 0 if a count
    that they depend on is wrong.

    Raises ValueError if the color that a rule needs is None.
    """
    failures = _failures(spec, detections, position)
    criteria = _criteria(spec.include, detections, position)
    surplus = any(len(_of_class(detections, clause)) >= clause.count for clause in spec.exclude)
    return GenEvalScore(
        strict=all(value == 1 for _, value in criteria) and not surplus,
        relaxed=not failures,
        partial=sum(value for _, value in criteria) / len(criteria),
        reason="\n".join(failures),
        criteria=tuple(criteria),
        detections=tuple(detections),
    )


def _of_class(detections: Sequence[Detection], clause: Clause) -> list[Detection]:
    """Select the objects of a clause's class by descending confidence."""
    return sorted((item for item in detections if item.name == clause.name), key=lambda item: -item.score)


def _colors(objects: Sequence[Detection]) -> list[str]:
    for item in objects:
        if item.color is None:
            raise ValueError(f"the color of the {item.name} at {item.box} is unknown: classify its crop first")
    return [str(item.color) for item in objects]


def _wrong_pair(
    objects: Sequence[Detection], targets: Sequence[Detection], relation: str, margin: float
) -> frozenset[str] | None:
    """Return the relations of the first pair that lacks ``relation``; None if all pairs have it."""
    actual = (relations(a.box, b.box, margin) for a, b in product(objects, targets))
    return next((names for names in actual if relation not in names), None)


def _failures(spec: PromptSpec, detections: Sequence[Detection], margin: float) -> list[str]:
    """Explain why GenEval's rule rejects an image, in GenEval's own words; empty for a correct image."""
    reasons: list[str] = []
    groups: list[list[Detection] | None] = []
    for clause in spec.include:
        objects = _of_class(detections, clause)[: clause.count]
        reason = _failure(clause, objects, groups, margin)
        groups.append(objects if reason is None else None)
        if reason is not None:
            reasons.append(reason)
    for clause in spec.exclude:
        if (m := len(_of_class(detections, clause))) >= clause.count:
            reasons.append(f"expected {clause.name}<{clause.count}, found {m}")
    return reasons


def _failure(
    clause: Clause, objects: Sequence[Detection], groups: Sequence[Sequence[Detection] | None], margin: float
) -> str | None:
    """Explain why ``objects`` violate a clause; ``groups`` are the objects of earlier clauses, None if these failed."""
    if len(objects) < clause.count:
        return f"expected {clause.name}>={clause.count}, found {len(objects)}"
    if clause.color is not None:
        colors = _colors(objects)
        if (right := colors.count(clause.color)) < clause.count:
            counts = ", ".join(f"{colors.count(color)} {color}" for color in COLORS if color in colors)
            return f"expected {clause.color} {clause.name}>={clause.count}, found {right} {clause.color}; and {counts}"
    if clause.relation is None or clause.target is None:
        return None
    targets = groups[clause.target]
    if targets is None:
        return f"no target for {clause.name} to be {clause.relation}"
    actual = _wrong_pair(objects, targets, clause.relation, margin)
    if actual is None:
        return None
    return f"expected {clause.name} {clause.relation} target, found {' and '.join(sorted(actual))} target"


def _criteria(include: Sequence[Clause], detections: Sequence[Detection], margin: float) -> list[tuple[str, float]]:
    """Compute the partial credits of all clauses."""
    criteria: list[tuple[str, float]] = []
    for clause in include:
        objects = _of_class(detections, clause)
        exact = len(objects) == clause.count
        criteria.append(("count", max(0.0, 1 - abs(clause.count - len(objects)) / clause.count)))
        if clause.color is not None:
            criteria.append(("color", _colors(objects).count(clause.color) / clause.count if exact else 0.0))
        if clause.relation is not None and clause.target is not None:
            targets = _of_class(detections, include[clause.target])
            pairs = list(product(objects, targets))
            related = sum(clause.relation in relations(a.box, b.box, margin) for a, b in pairs)
            exact = exact and len(targets) == include[clause.target].count
            criteria.append(("position", related / len(pairs) if exact else 0.0))
    return criteria


def upstream_partial(detections: Sequence[Detection], spec: PromptSpec, position: float = Thresholds.position) -> float:
    """Compute Flow-GRPO's partial credit as its reward server does, to compare with its curves.

    Unlike ``GenEvalScore.partial``, it falls below 0 for many surplus objects, and is 3 / 4 for an image of the right
    objects in the wrong relation.
    """
    entries: list[float] = []
    groups: list[Sequence[Detection] | None] = []
    for clause in spec.include:
        objects = _of_class(detections, clause)
        clause_entries, matched = _upstream_entries(clause, objects, groups, position)
        entries += clause_entries
        groups.append(objects if matched else None)
    return sum(entries) / len(entries)


def _upstream_entries(
    clause: Clause, objects: Sequence[Detection], groups: Sequence[Sequence[Detection] | None], margin: float
) -> tuple[list[float], bool]:
    """Compute the entries that one clause adds to Flow-GRPO's mean, and whether later clauses may refer to it."""
    entries = [1 - abs(clause.count - len(objects)) / clause.count]
    if len(objects) != clause.count:
        return entries + [0.0] * (clause.color is not None or clause.relation is not None), False
    if clause.color is not None:
        right = _colors(objects).count(clause.color)
        entries.append(right / clause.count)
        if right != clause.count:
            return entries, False
    if clause.relation is None or clause.target is None:
        return entries, True
    targets = groups[clause.target]
    if targets is None:
        return [*entries, 0.0], False
    if _wrong_pair(objects, targets, clause.relation, margin) is not None:
        return [*entries, 0.0, 1.0], False
    return [*entries, 1.0], True
