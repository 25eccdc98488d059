"""Guards against degenerate clips, such as silence and clipping, that another reward may lead to.

They are rewards, higher is better: add one to another reward, make it the condition of ``rewards.combine.Gate``, or
hold it out for the reward-hacking report.
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
    """Minus the distance in dB of a clip's level from the range of ``low`` to ``high``; 0 within it.

    The level is the RMS of the whole clip in dB of full scale, not a loudness in LUFS.

    Args:
        low: The lowest level of the range, in dB of full scale.
        high: The highest level of the range, in dB of full scale.
    """

    low: float = -40.0
    high: float = -9.0

    def __post_init__(self) -> None:
        if not self.low <= self.high:
            raise ValueError(f"low must not be above high, not {self.low} and {self.high}")

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Score waveforms (B, C, L) as (B,), differentiable; NaN where one has NaN."""
        decibels = level(require_waveforms(samples))
        return -(self.low - decibels).clamp(min=0) - (decibels - self.high).clamp(min=0)


def unclipped(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """Compute the fraction (B,) of values of waveforms (B, C, L) below full scale; NaN where one has NaN."""
    return 1 - clipped(require_waveforms(samples))


def non_silent_fraction(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """Compute the fraction (B,) of frames of 256 values at -60 dB of full scale or above; NaN where one has NaN."""
    return 1 - silent(require_waveforms(samples))
