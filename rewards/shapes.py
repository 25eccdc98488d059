"""The exact verifier of the shapes world as a reward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from genalign.types import Metadata, Prompt
from genalign.worlds.shapes.verifier import verify


@dataclass(frozen=True)
class ShapesReward:
    """``partial`` credit in [0, 1], or 1.0 for what is ``strict``-ly or ``relaxed``-ly right, else 0.0."""

    score: Literal["partial", "strict", "relaxed"] = "partial"

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores (B,), float32 on the CPU, of images (B, 3, 64, 64) in [0, 1]; NaN for an image with NaN pixels."""
        metadata = [_metadata(prompt) for prompt in prompts]
        failed = samples.isnan().flatten(1).any(1).cpu()
        verdicts = verify(samples.nan_to_num(), metadata)
        match self.score:
            case "partial":
                scores = [verdict.partial for verdict in verdicts]
            case "strict":
                scores = [float(verdict.strict) for verdict in verdicts]
            case "relaxed":
                scores = [float(verdict.relaxed) for verdict in verdicts]
        return torch.tensor(scores, dtype=torch.float32).masked_fill(failed, torch.nan)


def _metadata(prompt: Prompt) -> Metadata:
    if prompt.metadata is None:
        raise ValueError(f"the prompt {prompt.text!r} has no metadata: this reward needs GenEval metadata")
    return prompt.metadata
