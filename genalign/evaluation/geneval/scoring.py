"""GenEval's rules on detected objects (Ghosh et al., arXiv:2310.11513), and their stricter and partial forms.

Pure functions of boxes, scores and colors; detectors are in ``rewards.backbones.detectors``. ``relaxed`` is GenEval's
own rule, ``strict`` that of Flow-GRPO's reward (arXiv:2505.05470), ``partial`` its partial credit without the faults
that ``upstream_partial`` reproduces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from genalign.evaluation.geneval.boxes import relations
from genalign.evaluation.geneval.metadata import Clause, Request
from genalign.evaluation.geneval.vocabulary import COLORS

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Detection:
    """One object: its class, pixel box (x1, y1, x2, y2) with y pointing down, confidence in [0, 1], and the colour of
    its crop, None where nobody looked.
    """

    name: str
    box: Box
    score: float
    color: str | None = None


@dataclass(frozen=True)
class Thresholds:
    """Which detections count; the defaults are GenEval's.

    Those with a score above ``confidence``, above ``counting`` in the counting task; of a class the best
    ``max_objects``, of which a box is dropped that overlaps a better one by ``max_overlap`` (1 is never). ``position``
    is the share of their summed sizes by which two boxes' distance shrinks before it is a relation.
    """

    confidence: float = 0.3
    counting: float = 0.9
    max_objects: int = 16
    max_overlap: float = 1.0
    position: float = 0.1

    def of(self, tag: str) -> float:
        """The score that a detection must exceed in a task."""
        return self.counting if tag == "counting" else self.confidence


@dataclass(frozen=True)
class Verdict:
    """Whether an image shows what its prompt asks for.

    ``relaxed``: GenEval's ``correct``, which looks at the ``count`` most certain objects of each class and overlooks
    others unless ``exclude`` names them; ``reason`` is its text, empty where nothing is wrong. ``strict``: exactly the
    counts asked for, all of the right colour and in the right relation. ``partial``: the mean of ``criteria``, each in
    [0, 1], named "count", "color" and "position", once per clause that asks for it.
    """

    strict: bool
    relaxed: bool
    partial: float
    reason: str
    criteria: tuple[tuple[str, float], ...]


def kept(detections: Sequence[Detection], tag: str, thresholds: Thresholds) -> list[int]:
    """Indices of the detections that count in the task ``tag``, class by class, the most certain first."""
    chosen: list[int] = []
    for name in dict.fromkeys(detection.name for detection in detections):
        sure = [i for i, found in enumerate(detections) if found.name == name and found.score > thresholds.of(tag)]
        ordered = sorted(sure, key=lambda i: -detections[i].score)[: thresholds.max_objects]
        chosen += _apart(detections, ordered, thresholds.max_overlap)
    return chosen


def _apart(detections: Sequence[Detection], ordered: Sequence[int], max_overlap: float) -> list[int]:
    """Those of ``ordered`` that overlap no earlier one that is kept by ``max_overlap``."""
    if max_overlap == 1:
        return list(ordered)
    chosen: list[int] = []
    for i in ordered:
        if all(overlap(detections[i].box, detections[better].box) < max_overlap for better in chosen):
            chosen.append(i)
    return chosen


def overlap(a: Box, b: Box) -> float:
    """Intersection over union by GenEval's convention, that a box holds its last pixel."""
    common = _area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    union = _area(a) + _area(b) - common
    return common / union if union else 0.0


def _area(box: Box) -> float:
    return max(box[2] - box[0] + 1, 0) * max(box[3] - box[1] + 1, 0)


def verdict(detections: Sequence[Detection], request: Request, position: float = Thresholds.position) -> Verdict:
    """Judge the detections that count (see ``kept``) by a request.

    With n asked for and m found of a clause's class: count = max(0, 1 - |n - m| / n); color = the share of the right
    colour and position = the share of (object, target) pairs in the relation, both 0 where a count that they rest on is
    wrong.

    Raises ValueError where a colour that the rule looks at is None.
    """
    found = [_of(detections, clause) for clause in request.include]
    failures = _failures(request, detections, position)
    criteria = _criteria(request.include, found, position)
    surplus = any(len(_of(detections, clause)) >= clause.count for clause in request.exclude)
    return Verdict(
        strict=all(value == 1 for _, value in criteria) and not surplus,
        relaxed=not failures,
        partial=sum(value for _, value in criteria) / len(criteria),
        reason="\n".join(failures),
        criteria=tuple(criteria),
    )


def _of(detections: Sequence[Detection], clause: Clause) -> list[Detection]:
    """The objects of a clause's class, the most certain first."""
    return sorted((found for found in detections if found.name == clause.name), key=lambda found: -found.score)


def _colors(objects: Sequence[Detection]) -> list[str]:
    for found in objects:
        if found.color is None:
            raise ValueError(f"the colour of the {found.name} at {found.box} is asked for: classify its crop first")
    return [str(found.color) for found in objects]


def _wrong_pair(
    objects: Sequence[Detection], targets: Sequence[Detection], relation: str, margin: float
) -> frozenset[str] | None:
    """How the first pair stands that is not in ``relation``; None where all are."""
    stands = (relations(a.box, b.box, margin) for a, b in product(objects, targets))
    return next((true for true in stands if relation not in true), None)


def _failures(request: Request, detections: Sequence[Detection], margin: float) -> list[str]:
    """Why GenEval calls an image wrong, in its own words."""
    reasons: list[str] = []
    groups: list[list[Detection] | None] = []
    for clause in request.include:
        objects = _of(detections, clause)[: clause.count]
        reason = _failure(clause, objects, groups, margin)
        groups.append(objects if reason is None else None)
        reasons += [reason] if reason is not None else []
    for clause in request.exclude:
        if (m := len(_of(detections, clause))) >= clause.count:
            reasons.append(f"expected {clause.name}<{clause.count}, found {m}")
    return reasons


def _failure(
    clause: Clause, objects: Sequence[Detection], groups: Sequence[Sequence[Detection] | None], margin: float
) -> str | None:
    if len(objects) < clause.count:
        return f"expected {clause.name}>={clause.count}, found {len(objects)}"
    if clause.color is not None:
        colors = _colors(objects)
        if (right := colors.count(clause.color)) < clause.count:
            all_found = ", ".join(f"{colors.count(color)} {color}" for color in COLORS if color in colors)
            asked = f"expected {clause.color} {clause.name}>={clause.count}"
            return f"{asked}, found {right} {clause.color}; and {all_found}"
    if clause.relation is None or clause.target is None:
        return None
    targets = groups[clause.target]
    if targets is None:
        return f"no target for {clause.name} to be {clause.relation}"
    true = _wrong_pair(objects, targets, clause.relation, margin)
    if true is None:
        return None
    return f"expected {clause.name} {clause.relation} target, found {' and '.join(sorted(true))} target"


def _criteria(
    include: Sequence[Clause], found: Sequence[Sequence[Detection]], margin: float
) -> list[tuple[str, float]]:
    criteria: list[tuple[str, float]] = []
    for clause, objects in zip(include, found, strict=True):
        exact = len(objects) == clause.count
        criteria.append(("count", max(0.0, 1 - abs(clause.count - len(objects)) / clause.count)))
        if clause.color is not None:
            criteria.append(("color", _colors(objects).count(clause.color) / clause.count if exact else 0.0))
        if clause.relation is not None and clause.target is not None:
            targets = found[clause.target]
            exact = exact and len(targets) == include[clause.target].count
            criteria.append(("position", _share(objects, targets, clause.relation, margin) if exact else 0.0))
    return criteria


def _share(objects: Sequence[Detection], targets: Sequence[Detection], relation: str, margin: float) -> float:
    pairs = list(product(objects, targets))
    return sum(relation in relations(a.box, b.box, margin) for a, b in pairs) / len(pairs)


def upstream_partial(detections: Sequence[Detection], request: Request, position: float = Thresholds.position) -> float:
    """Flow-GRPO's partial credit as its reward server computes it, to compare with its curves.

    Unlike ``Verdict.partial``, it falls below 0 where many more objects are found than asked for, and gives an image of
    the right objects in the wrong relation 3 / 4.
    """
    entries: list[float] = []
    groups: list[Sequence[Detection] | None] = []
    for clause in request.include:
        objects = _of(detections, clause)
        made, matched = _upstream_entries(clause, objects, groups, position)
        entries += made
        groups.append(objects if matched else None)
    return sum(entries) / len(entries)


def _upstream_entries(
    clause: Clause, objects: Sequence[Detection], groups: Sequence[Sequence[Detection] | None], margin: float
) -> tuple[list[float], bool]:
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
