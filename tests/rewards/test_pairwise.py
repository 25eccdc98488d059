"""Comparisons of two samples, and win rates within groups."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from genalign.types import PairwiseReward, Prompt, Reward
from rewards.pairwise import BradleyTerry, WinRateReward
from tests.rewards.gray_images import grays, named


def level(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return samples.flatten(1).mean(1)


def test_a_preference_by_scores_is_bradley_and_terrys() -> None:
    preference: PairwiseReward = BradleyTerry(level, scale=10)
    preferred = preference(grays(0.5, 0.1), grays(0.3, 0.1), named(2))
    assert preferred.tolist() == pytest.approx([math.exp(5) / (math.exp(5) + math.exp(3)), 0.5], abs=1e-6)
    backwards = preference(grays(0.3, 0.1), grays(0.5, 0.1), named(2))
    torch.testing.assert_close(preferred + backwards, torch.ones(2))


def test_win_rates_are_of_groups_and_not_of_texts() -> None:
    """By hand, for a comparison without doubt; all three groups have one text."""
    first, second, alone = (Prompt("a gray image") for _ in range(3))
    counts: list[int] = []

    def brighter(left: Tensor, right: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        counts.append(len(prompts))
        return (level(left, prompts) > level(right, prompts)).float()

    reward = WinRateReward(brighter)
    assert isinstance(reward, Reward)
    samples, prompts = grays(0.1, 0.9, 0.2, 0.3, 0.8, 0.5), [first, second, first, first, second, alone]
    scores = reward(samples, prompts)
    assert scores[:5].tolist() == [0, 1, 0.5, 1, 0] and bool(scores[5].isnan())
    assert counts == [3 + 1]
    assert reward(grays(0.1), [alone]).isnan().all() and counts == [4]


def test_the_mean_win_rate_of_a_group_is_a_half() -> None:
    prompt = Prompt("a")
    scores = WinRateReward(BradleyTerry(level, 3.0))(torch.rand(8, 3, 4, 4), [prompt] * 8)
    assert float(scores.mean()) == pytest.approx(0.5, abs=1e-6)


def test_a_comparison_without_an_answer_is_left_out() -> None:
    prompt = Prompt("a")

    def unsure(left: Tensor, right: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return torch.tensor([1.0, torch.nan, 0.25])  # of (0, 1), (0, 2), (1, 2)

    scores = WinRateReward(unsure)(grays(0.1, 0.2, 0.3), [prompt] * 3)
    assert scores.tolist() == [1.0, 0.125, 0.75]
