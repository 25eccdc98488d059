"""The interface between a GenEval evaluation and the detectors in ``rewards``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from genalign.evaluation.geneval.scoring import GenEvalScore
from genalign.types import Prompt


class Judge(Protocol):
    """Scores images by the GenEval metadata of their prompts."""

    @property
    def description(self) -> Mapping[str, Any]:
        """All settings that affect the scores, as JSON types: equal descriptions make scores comparable."""

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise ValueError for a prompt that cannot be judged, before any image is generated."""

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> list[GenEvalScore | None]:
        """Score each image (B, 3, H, W) in [0, 1]; None for an image that cannot be judged, such as NaN."""
