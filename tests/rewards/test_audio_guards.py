"""Guards against degenerate clips, as rewards."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from genalign.scoring.reward_check import Expected, Probe, check
from genalign.types import Prompt, RewardFunction
from rewards.audio_guards import LevelWithin, non_silent_fraction, unclipped
from rewards.combine import Gate

PROMPTS = [Prompt(f"clip {index}") for index in range(4)]


def clips() -> Tensor:
    """Noise at levels from far too quiet to clipped."""
    noise = torch.randn(4, 2, 4096, generator=torch.Generator().manual_seed(0))
    return (noise * torch.tensor([1e-4, 0.03, 0.2, 2.0]).view(4, 1, 1)).clamp(-1, 1)


def test_levels_outside_the_range_cost_what_they_are_off() -> None:
    scores = LevelWithin()(clips(), PROMPTS)
    assert scores[1] == scores[2] == 0
    assert float(scores[0]) == pytest.approx(-40, abs=1)  # -80 dB, where -40 is the least
    assert -9 < float(scores[3]) < -5
    assert float(LevelWithin(-30, -20)(torch.zeros(1, 1, 300), PROMPTS[:1])) == pytest.approx(-70)
    with pytest.raises(ValueError, match="low must not be above high, not -9 and -40"):
        LevelWithin(-9, -40)


def test_shares() -> None:
    assert unclipped(clips(), PROMPTS)[:3].tolist() == [1, 1, 1] and 0.3 < float(unclipped(clips(), PROMPTS)[3]) < 0.5
    assert non_silent_fraction(clips(), PROMPTS).tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize("guard", [LevelWithin(), unclipped, non_silent_fraction])
def test_guards_keep_to_the_contract(guard: RewardFunction) -> None:
    gradient = isinstance(guard, LevelWithin)
    results = check(guard, Probe(clips(), PROMPTS), Expected(gradient=gradient))
    assert [result.name for result in results if result.passed is False] == []


def test_silence_does_not_pass_a_gate() -> None:
    def pleased(samples: Tensor, prompts: object) -> Tensor:
        return torch.ones(len(samples))

    gate = Gate(pleased, non_silent_fraction, threshold=0.5, otherwise=-1.0)
    waves = clips()
    waves[1] = 0
    waves[2, 0, 7] = math.nan
    assert gate(waves, PROMPTS).nan_to_num(9).tolist() == [-1, -1, 9, 1]
