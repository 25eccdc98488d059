"""Losses of the matching family against worked numbers, closed forms and identities."""

from __future__ import annotations

import math

import pytest
import torch

from genalign.algorithms.matching_losses import awm_log_probability, dpo_loss, kto_loss, nft_loss
from tests.genalign.algorithms.updates import randn


def test_dpo_at_the_reference_and_swapped() -> None:
    errors, other = randn(6, seed=0).abs().requires_grad_(True), randn(6, seed=1).abs()
    loss = dpo_loss(errors, errors.detach(), other, other, beta=50.0)
    assert loss.tolist() == pytest.approx([math.log(2)] * 6)
    slope = torch.autograd.grad(loss.sum(), errors)[0]
    assert slope.tolist() == pytest.approx([50.0 / 4] * 6)  # beta / 2 times sigmoid(0): the loss falls with the error
    moved = dpo_loss(errors + 0.01, errors, other, other, 50.0)
    swapped = dpo_loss(other, other, errors + 0.01, errors, 50.0)
    torch.testing.assert_close(torch.exp(-moved) + torch.exp(-swapped), torch.ones(6, dtype=torch.float64))
    improved = dpo_loss(errors - 0.01, errors, other, other, 50.0)
    assert bool((improved < math.log(2)).all()) and bool((moved > math.log(2)).all())


def test_kto_at_the_reference_and_of_one_kind() -> None:
    errors = randn(4, seed=0).abs().requires_grad_(True)
    for desirable, sign in ((True, 1.0), (False, -1.0)):
        loss = kto_loss(errors, errors.detach(), torch.full((4,), desirable), beta=8.0)
        assert loss.tolist() == pytest.approx([0.5] * 4)
        assert torch.autograd.grad(loss.sum(), errors)[0].tolist() == pytest.approx([sign * 8.0 / 4] * 4)


def test_kto_by_hand() -> None:
    reference = torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64)
    errors = torch.tensor([0.9, 1.0, 0.8], dtype=torch.float64, requires_grad=True)
    desirable = torch.tensor([True, True, False])
    loss = kto_loss(errors, reference, desirable, beta=10.0)
    z = 0.1  # the mean of 0.1, 0 and 0.2
    signed = (0.1 - z, 0.0 - z, -(0.2 - z))
    assert loss.tolist() == pytest.approx([1 - 1 / (1 + math.exp(-10 * value)) for value in signed])
    slopes = torch.autograd.grad(loss.sum(), errors)[0]
    assert bool((slopes[:2] > 0).all()) and float(slopes[2]) < 0  # the baseline carries no gradient
    assert float(kto_loss(errors.detach() + 1, reference, desirable, 10.0)[0]) == pytest.approx(
        1 - 1 / (1 + math.exp(9.0))
    )


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_nft_on_policy_is_advantage_weighted_matching(beta: float) -> None:
    x0, eps, old = randn(4, 2, 3, seed=0), randn(4, 2, 3, seed=1), randn(4, 2, 3, seed=2)
    sigma = torch.tensor([0.2, 0.5, 0.7, 0.9], dtype=torch.float64)
    wide = sigma.view(-1, 1, 1)
    x = (1 - wide) * x0 + wide * eps
    optimality = torch.tensor([0.0, 0.3, 0.5, 1.0], dtype=torch.float64)
    velocity = old.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(nft_loss(x - wide * velocity, x - wide * old, x0, optimality, beta).sum(), velocity)
    matching = old.clone().requires_grad_(True)
    difference = x - wide * matching - x0
    weighted = difference.square().mean((1, 2)) / difference.detach().abs().mean((1, 2))
    advantage = 2 * optimality - 1
    (expected,) = torch.autograd.grad((advantage * weighted).sum(), matching)
    torch.testing.assert_close(slope, expected)


def test_nft_matches_clean_samples_by_the_velocity() -> None:
    x0, eps, v = randn(3, 5, seed=0), randn(3, 5, seed=1), randn(3, 5, seed=2)
    sigma = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    x = (1 - sigma[:, None]) * x0 + sigma[:, None] * eps
    miss = sigma[:, None] * (v - (eps - x0))  # the distance of the clean sample that v points to
    loss = nft_loss(x - sigma[:, None] * v, x, x0, torch.ones(3, dtype=torch.float64), 1.0)
    torch.testing.assert_close(loss, miss.square().mean(1) / miss.abs().mean(1))
    exact = nft_loss(x - sigma[:, None] * (eps - x0), x0, x0, torch.ones(3, dtype=torch.float64), 1.0)
    assert exact.tolist() == pytest.approx([0.0] * 3, abs=1e-20)


def test_awm_on_policy_is_advantage_weighted_matching() -> None:
    target, sigma = randn(4, 5, seed=0), torch.tensor([0.2, 0.5, 0.7, 0.9], dtype=torch.float64)
    advantages = randn(4, seed=1)
    prediction = randn(4, 5, seed=2).requires_grad_(True)
    errors = (prediction - target).square().mean(1)
    likelihood = awm_log_probability(errors, sigma)
    surrogate = -(advantages * (likelihood - likelihood.detach()).exp()).sum()
    (slope,) = torch.autograd.grad(surrogate, prediction, retain_graph=True)
    weight = sigma * (errors.detach() + 1e-10) ** -0.75
    (expected,) = torch.autograd.grad((advantages * weight * errors).sum(), prediction)
    torch.testing.assert_close(slope, expected)


def test_awm_falls_with_the_error_and_is_zero_without() -> None:
    errors = torch.tensor([0.0, 0.1, 1.0], dtype=torch.float64, requires_grad=True)
    value = awm_log_probability(errors, torch.full((3,), 0.5))
    assert value.tolist() == pytest.approx([0.0, -2 * (0.1**0.25 - 10**-2.5), -2 * (1 - 10**-2.5)], abs=1e-6)
    slopes = torch.autograd.grad(value.sum(), errors)[0]
    assert slopes[1:].tolist() == pytest.approx([-0.5 * 0.1**-0.75, -0.5], rel=1e-6)
