"""Rewards of parts of a clip, such as InstructVideo's (arXiv 2312.12490) of single frames."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from genalign.types import AnyCallable, Prompt


@dataclass(frozen=True)
class SegmentReward:
    """The mean over segments of a clip of what a reward says of the frame in the middle of each.

    A clip is divided into ``frames``, and these into ``segments``. Frame i counts exp(-attenuation |i - frames / 2|)
    times, so the ends of a clip, which are the least reliable, count least. The published code draws a frame of
    each segment; here it is the middle one, so a clip has one score.

    Args:
        reward: A reward of clips as long as a frame.
        frames: The number of frames of a clip.
        segments: The number of segments.
        attenuation: The decay of the weights, per frame; 0 weighs all frames alike.
    """

    reward: AnyCallable
    frames: int = 16
    segments: int = 4
    attenuation: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.segments <= self.frames or not self.attenuation >= 0:
            raise ValueError(
                f"segments must be between 1 and the {self.frames} frames, and attenuation at least 0, not"
                f" {self.segments} and {self.attenuation}"
            )

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Score clips (B, C, L) as (B,), differentiable where the reward is.

        Raises ValueError for samples that are no clips of sound, and clips that are shorter than their frames.
        """
        if samples.ndim != 3:
            raise ValueError(
                f"SegmentReward takes waveforms (B, C, L), not samples {tuple(samples.shape)}: name its reward instead"
            )
        length = samples.shape[-1] // self.frames
        if not length:
            raise ValueError(f"a clip of {samples.shape[-1]} values has no {self.frames} frames: lower frames")
        scores = []
        for segment in range(self.segments):
            frame = (2 * segment + 1) * self.frames // (2 * self.segments)
            weight = math.exp(-self.attenuation * abs(frame - self.frames / 2))
            scores.append(weight * self.reward(samples[..., frame * length : (frame + 1) * length], prompts))
        return torch.stack(scores).mean(0)
