"""The balance of rewards by their gradients, on numbers worked by hand and on random gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from genalign.algorithms.gradient_balance import Direction, GradientBalance, min_norm_weights
from genalign.algorithms.recipe_changes import with_gradient_balance
from genalign.algorithms.recipes import flow_grpo

GRADIENTS = torch.tensor([[1, 0, 0], [-0.5, 0.6, 0.2], [0.8, 0.4, -1]], dtype=torch.float64)


def _gram(vectors: Tensor) -> Tensor:
    return vectors @ vectors.T


def _weights(*vectors: tuple[float, ...]) -> list[float]:
    weights: list[float] = min_norm_weights(_gram(torch.tensor(vectors, dtype=torch.float64))).tolist()
    return weights


def _direction(gradients: Tensor) -> Direction:
    direction = Direction.of(_gram(gradients))
    assert direction is not None
    return direction


def test_three_gradients_worked_by_hand() -> None:
    direction = _direction(GRADIENTS)
    assert direction.weights.tolist() == pytest.approx([0.430652426, 0.4812009788, 0.0881465952], abs=1e-8)
    step = direction.factors @ GRADIENTS
    assert step.tolist() == pytest.approx([0.193892549, 0.4033403935, 0.0563160447], abs=1e-8)
    cosines = GRADIENTS @ step / GRADIENTS.norm(dim=1) / step.norm()
    assert cosines.tolist() == pytest.approx([0.4298659348] * 3, abs=1e-8)
    assert direction.least_cosine == pytest.approx(0.4298659348, abs=1e-8)


def test_special_cases_worked_by_hand() -> None:
    assert _weights((1, 0), (0.8, 0.6), (0.6, 0.8)) == pytest.approx([0.5, 0, 0.5])
    assert _weights((2, 0), (1, 1)) == pytest.approx([0, 1])
    assert _weights((1, 0), (0.3, 0.91**0.5)) == pytest.approx([0.5, 0.5])
    u, v = (1.0, 0.0), (0.3, (1 - 0.09) ** 0.5)
    assert _weights(u, u, v) == pytest.approx([0.25, 0.25, 0.5])  # twins share
    assert _weights((3.0, 4.0)) == [1.0]


def test_opposite_gradients_leave_no_step() -> None:
    direction = _direction(torch.tensor([[1.0, 0.0], [-2.0, 0.0]], dtype=torch.float64))
    assert direction.weights.tolist() == pytest.approx([0.5, 0.5])
    assert direction.factors.tolist() == [0.0, 0.0] and direction.least_cosine == 0.0


def test_a_reward_without_a_gradient_is_left_out() -> None:
    for small in (0.0, 1e-9):
        gradients = torch.cat([GRADIENTS, torch.full((1, 3), small, dtype=torch.float64)])
        with_silent, alone = _direction(gradients), _direction(GRADIENTS)
        assert with_silent.weights.tolist() == pytest.approx([*alone.weights.tolist(), 0.0])
        assert with_silent.factors.tolist() == pytest.approx([*alone.factors.tolist(), 0.0])
    assert Direction.of(torch.zeros(2, 2)) is None
    assert Direction.of(torch.tensor([[1.0, torch.nan], [torch.nan, 1.0]])) is None


@pytest.mark.parametrize("seed", range(8))
def test_no_gradient_is_improved_less_than_the_weighted_ones(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for count in (2, 3, 5):
        vectors = torch.randn(count, 4, dtype=torch.float64, generator=generator)
        weights = min_norm_weights(_gram(vectors))
        shortest = weights @ vectors
        gains = vectors @ shortest  # Karush-Kuhn-Tucker
        assert float(weights.sum()) == pytest.approx(1) and bool((weights >= 0).all())
        assert bool((gains >= shortest.square().sum() - 1e-9).all())
        squared = shortest.square().sum().expand(count)
        torch.testing.assert_close(gains[weights > 1e-6], squared[weights > 1e-6])
        order = torch.randperm(count, generator=generator)
        torch.testing.assert_close(min_norm_weights(_gram(vectors[order])), weights[order], atol=1e-8, rtol=0)
        scaled = vectors * torch.rand(count, 1, dtype=torch.float64, generator=generator).add(0.1)
        torch.testing.assert_close(_direction(scaled).weights, _direction(vectors).weights, atol=1e-8, rtol=0)


def test_updates_with_own_gradients_are_counted() -> None:
    balance = GradientBalance(every=3)
    assert [balance.times(update, 1) for update in range(7)] == [1, 0, 0, 1, 0, 0, 1]
    assert balance.times(1, 2) == 0 and balance.times(2, 5) == 2


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="every of at least 1"):
        with_gradient_balance(flow_grpo(), every=0)
    with pytest.raises(ValueError, match=r"gram must be \(K, K\) for 1 to 8 vectors"):
        min_norm_weights(torch.eye(9))
