"""Rewards of views, and the discount of samples whose score depends on the view."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from genalign.algorithms.credit import GroupRelative
from genalign.algorithms.interfaces import RoundScores
from genalign.scoring.reward_check import Probe, check
from genalign.types import Prompt
from rewards.combine import UncertaintyDiscount
from rewards.views import Blurred, Noised, ViewReward, quantized
from tests.rewards.gray_images import grays, named

GROUP = torch.zeros(4, dtype=torch.long)


def contrast(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return samples.flatten(1).std(1)


def test_samples_whose_views_disagree_are_discounted() -> None:
    views = torch.tensor([[1.0, 1.0], [2.0, 3.0], [3.0, 2.0], [6.0, 6.0]])
    large = RoundScores(views * 1e7, (0.5, 0.5), GROUP)  # the 1e-4 beside their standard deviation does not count
    credit, plain = UncertaintyDiscount(GroupRelative())(large), GroupRelative()(large)
    assert (credit / plain).tolist() == pytest.approx([1, 0.7654730717, 0.7654730717, 1], abs=1e-6)
    factors = credit / plain * GroupRelative()(RoundScores(views, (0.5, 0.5), GROUP))
    assert factors.tolist() == pytest.approx([-1.0886028519, -0.2083240422, -0.2083240422, 1.6329042778], abs=1e-6)
    stronger = UncertaintyDiscount(GroupRelative(), strength=2.0)(large)
    assert (stronger / plain).tolist() == pytest.approx([1, 0.7654730717**2, 0.7654730717**2, 1], abs=1e-6)


def test_views_that_agree_change_no_credit() -> None:
    images, prompts = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)), [Prompt("a")] * 4
    for view in (Blurred(0.0), Noised(0.0)):
        scores = torch.stack([contrast(images, prompts), ViewReward(contrast, view)(images, prompts)], 1)
        outcome = RoundScores(scores, (0.5, 0.5), GROUP)
        assert UncertaintyDiscount(GroupRelative())(outcome).tolist() == GroupRelative()(outcome).tolist()


@pytest.mark.parametrize("view", [Blurred(1.5), Noised(0.05), quantized], ids=["blurred", "noised", "quantized"])
def test_rewards_of_views_hold_the_contract(view: object) -> None:
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    failed = [result for result in check(ViewReward(contrast, view), Probe(images, named(4))) if result.passed is False]
    assert failed == []


def test_what_the_views_do() -> None:
    image = torch.zeros(1, 3, 15, 15)
    image[..., 7, 7] = 1
    blurred = Blurred(1.0)(image)
    assert float(blurred.sum()) == pytest.approx(3.0, abs=1e-5)
    assert float(blurred[0, 0, 7, 7] / blurred[0, 0, 7, 8]) == pytest.approx(torch.tensor(0.5).exp().item(), rel=1e-5)
    gray = torch.full((2, 3, 64, 64), 0.5)
    noised = Noised(0.02)(gray)
    assert torch.equal(noised[0], noised[1]) and float((noised - 0.5).std()) == pytest.approx(0.02, rel=0.05)
    assert not torch.equal(noised, Noised(0.02, seed=1)(gray))
    assert quantized(torch.full((1, 3, 2, 2), 0.501))[0, 0, 0, 0] == torch.tensor(128 / 255)


def test_impossible_views_are_refused() -> None:
    for make in (Blurred, Noised):
        with pytest.raises(ValueError, match="must be a finite number of at least 0, not -1"):
            make(-1.0)
    with pytest.raises(ValueError, match="the view made 1 samples of 2"):
        ViewReward(contrast, lambda images: images[:1])(grays(0.1, 0.2), named(2))
