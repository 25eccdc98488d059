"""PRDP's loss against worked numbers and closed forms, and the two passes of its objective."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from genalign.algorithms.coupled import PRDPLoss, prdp_loss


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


ONE = torch.zeros(3, dtype=torch.long)


def table(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


CURRENT = table([0.10, -0.20], [0.05, 0.0], [-0.30, 0.40])
OLD = table([0.0, -0.10], [0.10, 0.05], [-0.25, 0.20])
REFERENCE = table([-0.05, -0.05], [0.0, 0.10], [-0.20, 0.10])
REWARDS = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("steps", "clip_range", "expected"),
    [
        ("mean", 1e9, 0.18375),
        ("mean", 0.02, 0.18855),
        ("sum", 1e9, 0.26),
        ("sum", 0.02, 0.2692),
    ],
)
def test_worked_numbers_of_prdp(steps: str, clip_range: float, expected: float) -> None:
    loss = prdp_loss(CURRENT - REFERENCE, OLD - REFERENCE, REWARDS, ONE, 2.0, clip_range, steps)
    assert float(loss) == pytest.approx(expected, abs=1e-9)


def test_ties_are_dropped() -> None:
    ratios, old = CURRENT - REFERENCE, OLD - REFERENCE
    tied = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    assert float(prdp_loss(ratios, old, tied, ONE, 2.0, 1e9)) == pytest.approx(0.3753125, abs=1e-9)
    ratios.requires_grad_(True)
    nothing = prdp_loss(ratios, old, torch.ones(3), ONE, 2.0, 1e9)
    assert float(nothing.detach()) == 0.0 and not bool(torch.autograd.grad(nothing, ratios)[0].any())
    assert PRDPLoss(2.0, 0.1).terms(torch.tensor([1.0, 1.0, 2.0, 3.0]), torch.tensor([0, 0, 1, 1])) == 1


def test_the_variance_identity_and_prompts_add_up() -> None:
    ratios, rewards = randn(10, 3, seed=2), randn(10, seed=3)
    group = torch.tensor([0] * 4 + [1] * 6)
    expected = sum(2 * (ratios.mean(1) - rewards / 0.7)[group == key].var() for key in (0, 1))
    assert float(prdp_loss(ratios, ratios, rewards, group, 0.7, 1e9)) == pytest.approx(float(expected))


def test_the_gradient_is_the_closed_form() -> None:
    ratios, old, rewards = randn(5, 3, seed=4).requires_grad_(True), randn(5, 3, seed=5), randn(5, seed=6)
    beta, clip = 0.8, 0.4
    group = torch.zeros(5, dtype=torch.long)
    (slopes,) = torch.autograd.grad(prdp_loss(ratios, old, rewards, group, beta, clip), ratios)
    with torch.no_grad():
        held = torch.clamp(ratios, old - clip, old + clip)
        inside = ((ratios - old).abs() <= clip).double()
        expected = torch.zeros(5, 3, dtype=torch.float64)
        pairs = [(a, b) for a in range(5) for b in range(5) if rewards[a] > rewards[b]]
        for a, b in pairs:
            target = (rewards[a] - rewards[b]) / beta
            plain = ratios[a].mean() - ratios[b].mean() - target
            clipped = held[a].mean() - held[b].mean() - target
            free = bool(plain**2 >= clipped**2)
            for row, sign in ((a, 1), (b, -1)):
                pull = 2 * (plain if free else clipped) / len(pairs) / 3 * sign
                expected[row] += pull * (1.0 if free else inside[row])
    torch.testing.assert_close(slopes, expected, rtol=0, atol=1e-10)


def test_a_sample_that_failed_altogether_leaves_no_trace() -> None:
    ratios, old = randn(4, 2, seed=0), randn(4, 2, seed=1)
    ratios[1], rewards = math.nan, torch.tensor([1.0, math.nan, 0.5, 0.0])
    keep = [0, 2, 3]
    expected = prdp_loss(ratios[keep], old[keep], rewards[keep], ONE, 2.0, 0.1)
    ratios.requires_grad_(True)
    loss = prdp_loss(ratios, old, rewards, torch.zeros(4, dtype=torch.long), 2.0, 0.1)
    (slopes,) = torch.autograd.grad(loss, ratios)
    assert float(loss.detach()) == pytest.approx(float(expected)) and bool(slopes.isfinite().all())
    assert not bool(slopes[1].any()) and bool(slopes[keep].any())


def test_prdp_in_float32_with_the_published_coefficients() -> None:
    ratios, old = 1e-4 * randn(8, 5, seed=0), 1e-4 * randn(8, 5, seed=1)
    rewards, group = randn(8, seed=2).float(), torch.tensor([0, 1] * 4)
    exact = prdp_loss(ratios, old, rewards, group, 3e-5, 1e-6)
    rounded = prdp_loss(ratios.float(), old.float(), rewards, group, 3e-5, 1e-6)
    assert rounded.dtype == torch.float32
    assert float(rounded) == pytest.approx(float(exact), rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"old_log_ratios": torch.zeros(2, 2)}, r"must both be \(B, S\)"),
        ({"rewards": torch.zeros(2)}, r"rewards must be \(3,\)"),
        ({"beta": 0.0}, "beta and clip_range must be positive"),
        ({"steps": "median"}, "steps must be"),
    ],
)
def test_inputs_of_prdp_are_checked(changes: dict[str, Any], message: str) -> None:
    valid = {"log_ratios": torch.zeros(3, 2), "old_log_ratios": torch.zeros(3, 2), "rewards": torch.zeros(3)}
    with pytest.raises(ValueError, match=message):
        prdp_loss(**{**valid, "group": ONE, "beta": 1.0, "clip_range": 0.1, **changes})
