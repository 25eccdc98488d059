"""The tones world for training: its exact verifier as a reward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from genalign.types import Prompt
from genalign.worlds.tones.verifier import verify
from rewards.verified import Score, scores


@dataclass(frozen=True)
class TonesReward:
    """``partial`` credit in [0, 1], or 1.0 for what is ``strict``-ly or ``relaxed``-ly right, else 0.0."""

    score: Score = "partial"

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores (B,), float32 on the CPU, of waveforms (B, 1, 12000) at 8 kHz; NaN for one with NaN samples."""
        return scores(verify, self.score, samples, prompts)
