"""Who says what is in an image: the seam between the evaluation and the detectors of ``rewards``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from genalign.evaluation.geneval.scoring import Detection, Verdict
from genalign.types import Prompt


@dataclass(frozen=True)
class Judgement:
    """The verdict on one image, and the detections that it rests on."""

    verdict: Verdict
    detections: tuple[Detection, ...]


class Judge(Protocol):
    """Judges images by the GenEval metadata of their prompts."""

    @property
    def description(self) -> Mapping[str, Any]:
        """Everything that its verdicts depend on, ready for JSON: equal descriptions make numbers comparable."""

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise ValueError for a prompt that it cannot judge, before images are made of any."""

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> list[Judgement | None]:
        """A judgement for each image (B, 3, H, W) in [0, 1]; None for one that cannot be judged, such as NaN."""
