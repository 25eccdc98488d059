"""CRD, GDRO, DGPO and RPO against their closed forms, by value and by gradient (fixtures F3 to F6)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from genalign.algorithms.group_losses import (
    CenteredRewardLoss,
    GroupPreferenceLoss,
    RankedPreferenceLoss,
    ReferencePreferenceLoss,
    ranking_loss,
)
from genalign.algorithms.matching import NoisedSamples
from genalign.algorithms.matching_losses import DPOLoss
from genalign.diffusion.paths import FlowPath
from genalign.types import NoiseLevel

GROUP = torch.tensor([0, 0, 0, 1, 1, 1])
ADVANTAGES = torch.tensor([1.2, -0.6, -0.6, 7.0, -2.0, -5.0], dtype=torch.float64)
NEW = torch.tensor([0.30, 0.50, 0.40, 0.70, 0.20, 0.60], dtype=torch.float64)
OLD = torch.tensor([0.35, 0.45, 0.40, 0.60, 0.30, 0.55], dtype=torch.float64)


def _noised(new: Tensor, old: Tensor, reference: Tensor) -> NoisedSamples:
    """Samples of one value with the target 0, whose predictions are given (N,)."""
    zero, half = torch.zeros(len(new), 1, dtype=torch.float64), torch.full((len(new),), 0.5, dtype=torch.float64)
    level = NoiseLevel(half, half, half)
    return NoisedSamples(FlowPath(), zero, zero, level, zero, new[:, None], reference[:, None], old[:, None])


@pytest.mark.parametrize(
    ("loss", "value"),
    [
        (CenteredRewardLoss(1.0), 0.544666666667),
        (CenteredRewardLoss(2.0), 0.338444444444),
        (CenteredRewardLoss(1.0, temperature=0.5), 0.82057879509),
    ],
)
def test_centered_reward_distillation(loss: CenteredRewardLoss, value: float) -> None:
    """An error of one value over its own mean absolute value is that value."""
    noised = _noised(NEW, OLD, OLD)
    assert float(loss(noised, ADVANTAGES, GROUP).mean()) == pytest.approx(value, abs=1e-9)


def test_centered_rewards_pull_by_the_difference_of_gain_and_advantage() -> None:
    """d L / d e of sample i is -10 (r_c - a_c) / N, where the mean of r has no gradient."""
    new = NEW.clone().requires_grad_()
    CenteredRewardLoss(1.0)(_noised(new, OLD, OLD), ADVANTAGES, GROUP).mean().backward()
    gain, aim = OLD - NEW, ADVANTAGES.clamp(-5, 5) / 10 + 0.5
    centered = [x - torch.stack([x[k == GROUP].mean() for k in (0, 1)])[GROUP] for x in (gain, aim)]
    # a prediction p has the error p^2 / sg(p), whose slope is 2
    torch.testing.assert_close(new.grad, -10 / 6 * 2 * (centered[0] - centered[1]))


def test_without_centres_the_gains_are_regressed_as_they_are() -> None:
    aim = ADVANTAGES.clamp(-5, 5) / 10 + 0.5
    expected = 5 * (OLD - NEW - aim + torch.stack([aim[k == GROUP].mean() for k in (0, 1)])[GROUP]).square()
    torch.testing.assert_close(CenteredRewardLoss(centered=False)(_noised(NEW, OLD, OLD), ADVANTAGES, GROUP), expected)


def test_at_the_old_policy_the_loss_is_the_variance_of_the_advantages() -> None:
    aim = ADVANTAGES.clamp(-5, 5) / 10 + 0.5
    variance = (aim[:3].var(correction=0) + aim[3:].var(correction=0)) / 2
    loss = CenteredRewardLoss(1.0)(_noised(OLD, OLD, OLD), ADVANTAGES, GROUP).mean()
    assert float(loss) == pytest.approx(5 * float(variance))


@pytest.mark.parametrize(("temperature", "value"), [(0.05, 2.92300457024), (0.5, 3.15846568553), (0.0, 2.6831952163)])
def test_a_ranking_by_rewards(temperature: float, value: float) -> None:
    rewards = torch.tensor([0.2, 0.9, 0.5, 0.5], dtype=torch.float64)
    new = torch.tensor([0.42, 0.38, 0.40, 0.45], dtype=torch.float64).sqrt()
    reference = torch.tensor([0.40, 0.41, 0.40, 0.41], dtype=torch.float64).sqrt()
    loss = RankedPreferenceLoss(beta=12.0, temperature=temperature, sft=0.0)
    noised, group = _noised(new, new, reference), torch.zeros(4, dtype=torch.long)
    assert float(loss(noised, rewards, group).sum()) == pytest.approx(value, abs=1e-9)
    best = RankedPreferenceLoss(beta=12.0, temperature=temperature, sft=0.5)(noised, rewards, group)
    assert float(best.sum()) == pytest.approx(value + 0.5 * 0.38, abs=1e-9)


def test_a_ranking_without_differences_and_of_two() -> None:
    """log 4! for four equal implicit rewards; two samples are Diffusion-DPO at twice the beta."""
    falling = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    assert float(ranking_loss(torch.zeros(4, dtype=torch.float64), falling, 0.05)) == pytest.approx(math.log(24))
    pair = torch.tensor([0.3, -0.2], dtype=torch.float64)
    assert float(ranking_loss(pair, falling[:2], 0.0)) == pytest.approx(0.47407698418)
    new, reference = NEW[:2].sqrt(), OLD[:2].sqrt()
    noised, group = _noised(new, new, reference), torch.zeros(2, dtype=torch.long)
    ranked = RankedPreferenceLoss(beta=3.0, temperature=0.0, sft=0.0)(noised, torch.tensor([1.0, 0.0]), group)
    torch.testing.assert_close(ranked, DPOLoss(beta=6.0)(noised, torch.tensor([1.0, -1.0]), group))


def test_the_first_term_of_a_ranking_is_about_the_best_sample_alone() -> None:
    """Fixture F4's top 1: the ranking of all samples, less that of those below the best."""
    rewards = torch.tensor([0.9, 0.5, 0.5, 0.2], dtype=torch.float64)
    implicit = -12 * torch.tensor([0.38 - 0.41, 0.0, 0.45 - 0.41, 0.42 - 0.40], dtype=torch.float64)
    first = ranking_loss(implicit, rewards, 0.05) - ranking_loss(implicit[1:], rewards[1:], 0.05)
    assert float(first) == pytest.approx(0.985547145121, abs=1e-9)


def test_a_ranking_leaves_out_what_has_no_score() -> None:
    credit = torch.tensor([0.2, math.nan, 0.5, 0.1, math.nan, math.nan])
    loss = RankedPreferenceLoss()
    assert loss.terms(credit, GROUP) == 1 and loss.used(credit).tolist() == [True, False, True, True, False, False]
    whole = loss(_noised(NEW, OLD, OLD), credit, GROUP)
    rows = torch.tensor([0, 2])
    alone = loss(_noised(NEW, OLD, OLD).where(rows), credit[rows], GROUP[rows])
    torch.testing.assert_close(whole, alone)


def test_direct_group_preferences() -> None:
    """The weights sigmoid(beta / 3 sum A (e - e_ref)), the loss, its gradient, and which samples stop."""
    weights = torch.tensor([0.0474258731776, 0.999999694098], dtype=torch.float64)[GROUP]
    capped = ADVANTAGES.clamp(-5, 5)
    new = NEW.sqrt().requires_grad_()
    noised = _noised(new, OLD.sqrt(), OLD.sqrt())
    whole = GroupPreferenceLoss(beta=100.0, clip_range=10.0)(noised, capped, GROUP)
    torch.testing.assert_close(whole.detach(), weights * capped * NEW)
    assert float(whole.detach().mean()) == pytest.approx(0.015243885373, abs=1e-9)
    stopping = GroupPreferenceLoss(beta=100.0, clip_range=1e-2)(noised, capped, GROUP)
    torch.testing.assert_close(stopping, whole)
    (slope,) = torch.autograd.grad(stopping.sum(), new)
    assert (slope == 0).tolist() == [True, True, False, False, False, True]


def test_samples_without_credit_count_in_the_size_of_their_group() -> None:
    """K is 3 where one of three samples is at the mean; a group without any credit has no term."""
    credit, loss = torch.tensor([1.2, 0.0, -1.2, 0.0, 0.0, 0.0]), GroupPreferenceLoss(beta=100.0, clip_range=10.0)
    losses = loss(_noised(NEW.sqrt(), OLD.sqrt(), OLD.sqrt()), credit, GROUP)
    weight = 1 / (1 + math.exp(-100 / 3 * 1.2 * (-0.05 - 0.0)))  # e - e_ref is -0.05, and 0 of the third
    assert losses.tolist() == pytest.approx([weight * 1.2 * 0.30, 0.0, -weight * 1.2 * 0.40], rel=1e-6)
    assert loss.terms(credit, GROUP) == 3 and bool(loss.used(credit).all())


def test_a_reference_and_a_generated_image() -> None:
    """Fixture F6: the first reference is preferred, and the second generated image; references' errors are added."""
    new = torch.tensor([0.20, 0.40, 0.30, 0.25], dtype=torch.float64).sqrt()
    base = torch.tensor([0.22, 0.39, 0.29, 0.27], dtype=torch.float64).sqrt()
    credit, group = torch.tensor([2.0, -1.0, -2.0, 1.0]), torch.tensor([0, 0, 1, 1])
    loss = ReferencePreferenceLoss()(_noised(new, new, base), credit, group)
    assert float(loss.mean()) == pytest.approx(0.928259676341, abs=1e-8)
    alone = ReferencePreferenceLoss(sft=0.0)(_noised(new, new, base), credit, group)
    torch.testing.assert_close(loss - alone, torch.tensor([0.20, 0.30], dtype=torch.float64))
    at_base = ReferencePreferenceLoss(sft=0.0)(_noised(base, base, base), credit, group)
    torch.testing.assert_close(at_base, torch.full((2,), math.log(2), dtype=torch.float64))
