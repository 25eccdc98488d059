"""Guards of sound: what no clip should do to please another reward. Higher is better, as for every reward.

They stand beside a reward in a sum, as a condition in ``rewards.combine.Gate``, or held out in the hacking panel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from genalign.metrics.audio import clipped, level, silent
from genalign.runtime.waveforms import require_waveforms
from genalign.types import Prompt


@dataclass(frozen=True)
class LevelWithin:
    """0 for a clip whose level lies between ``low`` and ``high``, else minus what it is off, in dB: RMS of the whole
    clip, in dB of full scale, not loudness in LUFS."""

    low: float = -40.0
    high: float = -9.0

    def __post_init__(self) -> None:
        if not self.low <= self.high:
            raise ValueError(f"low must not be above high, not {self.low} and {self.high}")

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores (B,) of waveforms (B, C, L), differentiable; NaN where one has NaN."""
        found = level(require_waveforms(samples))
        return -(self.low - found).clamp(min=0) - (found - self.high).clamp(min=0)


def unclipped(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """The share (B,) of samples of waveforms (B, C, L) that are below full scale; NaN where one has NaN."""
    return 1 - clipped(require_waveforms(samples))


def sounding(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """The share (B,) of frames of 256 samples at -60 dB of full scale or above; NaN where one has NaN."""
    return 1 - silent(require_waveforms(samples))
