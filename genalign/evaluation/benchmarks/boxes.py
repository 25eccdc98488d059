"""Boxes of objects in images, for benchmarks that ask where and how many objects are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from genalign.evaluation.benchmarks.benchmark import Judges
from genalign.evaluation.geneval.scoring import Box, Detection, Thresholds, filter_detections


class DetectedObject(Protocol):
    """An object as ``rewards.backbones.detectors.Instance``."""

    @property
    def detection(self) -> Detection: ...


class ObjectDetector(Protocol):
    """A detector as ``rewards.backbones.detectors.Detector``: ``classes`` are detectable, None for any name."""

    @property
    def thresholds(self) -> Thresholds: ...

    @property
    def classes(self) -> Sequence[str] | None: ...

    def __call__(self, images: Tensor, names: Sequence[Sequence[str]]) -> Sequence[Sequence[DetectedObject]]: ...


def detect(detector: ObjectDetector, images: Tensor, names: Sequence[Sequence[str]]) -> list[list[Detection] | None]:
    """Detect the objects of B lists of names in images (B, 3, H, W) in [0, 1].

    Returns:
        The objects of each image above the detector's own confidence, the most confident of each class first; None for
        an image that is not finite.
    """
    finite = images.isfinite().flatten(1).all(1).tolist()
    objects: list[list[Detection] | None] = [[] if whole else None for whole in finite]
    rows = [row for row, whole in enumerate(finite) if whole and names[row]]
    if rows:
        for row, instances in zip(rows, detector(images[rows], [names[row] for row in rows]), strict=True):
            items = [instance.detection for instance in instances]
            counted = (items[i] for i in filter_detections(items, "", detector.thresholds))
            objects[row] = [item for item in counted if item.name in names[row]]
    return objects


def require_classes(judges: Judges, names: Sequence[str]) -> None:
    """Raise ValueError for a name that the detector does not have, if there is one and its classes are fixed."""
    detector: Any = judges.detector
    if detector is None or detector.classes is None:
        return
    if unknown := [name for name in names if name not in detector.classes]:
        raise ValueError(
            f"{unknown[0]!r} and {len(unknown) - 1} others are none of the {len(detector.classes)} classes that"
            f" {type(detector).__name__} detects: use a detector of any name, such as Owlv2 or GroundingDino"
        )


def iou(a: Box, b: Box) -> float:
    """Compute the intersection over union of two boxes; 0 for two empty ones."""
    width = max(min(a[2], b[2]) - max(a[0], b[0]), 0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    union = _area(a) + _area(b) - width * height
    return width * height / union if union else 0.0


def center(box: Box) -> tuple[float, float]:
    """Return the center (x, y) of a box."""
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
