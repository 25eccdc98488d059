"""Rewards of the frames of a clip."""

from __future__ import annotations

import math

import pytest
import torch

from genalign.types import Prompt
from rewards.segments import SegmentReward


def loudness(samples: torch.Tensor, prompts: object) -> torch.Tensor:
    return samples.flatten(1).mean(1)


def test_the_middle_frame_of_each_segment_counts_by_its_distance_from_the_middle() -> None:
    """Of 16 frames with the values 0 to 15, in four segments: 2, 6, 10 and 14, at 6, 2, 2 and 6 from the middle."""
    clip = torch.arange(16.0).repeat_interleave(3).view(1, 1, 48)
    score = SegmentReward(loudness, attenuation=0.1)(clip, [Prompt("a")])
    expected = sum(frame * math.exp(-0.1 * abs(frame - 8)) for frame in (2, 6, 10, 14)) / 4
    assert float(score) == pytest.approx(expected)
    assert float(SegmentReward(loudness, segments=1, attenuation=0.0)(clip, [Prompt("a")])) == 8
    clip.requires_grad_()
    (slope,) = torch.autograd.grad(SegmentReward(loudness)(clip, [Prompt("a")]).sum(), clip)
    assert slope.nonzero()[:, 2].tolist() == [*range(6, 9), *range(18, 21), *range(30, 33), *range(42, 45)]


def test_wrong_sizes_are_named() -> None:
    with pytest.raises(ValueError, match="segments must be between 1 and the 4 frames"):
        SegmentReward(loudness, frames=4, segments=5)
    with pytest.raises(ValueError, match="a clip of 8 values has no 16 frames: lower frames"):
        SegmentReward(loudness)(torch.zeros(1, 1, 8), [Prompt("a")])
    with pytest.raises(ValueError, match=r"takes waveforms \(B, C, L\), not samples \(2, 3, 32, 32\): name its reward"):
        SegmentReward(loudness)(torch.zeros(2, 3, 32, 32), [Prompt("a")] * 2)
