"""The Frechet distance against closed forms and scipy."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor

from genalign.metrics.frechet import Gaussian, frechet_distance, gaussian_distance
from genalign.metrics.mmd import MMDToReference, polynomial_kernel


def drawn(n: int, d: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.linspace(1.0, 0.1, d, dtype=torch.float64)
    mixing = torch.randn(d, d, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) @ mixing * spread * scale + shift


def kernel_distance(x: Tensor, y: Tensor) -> float:
    return MMDToReference(y, polynomial_kernel).unbiased(x)


def test_frechet_distance_worked_by_hand() -> None:
    x = torch.tensor([[0.0, 0.0], [2.0, 0.0]])  # mean (1, 0), covariance diag(2, 0)
    assert frechet_distance(x, torch.tensor([[0.0, 1.0], [0.0, 3.0]])) == pytest.approx(5 + 2 + 2, abs=1e-12)
    assert frechet_distance(x, torch.tensor([[0.0, 1.0], [4.0, 1.0]])) == pytest.approx(2 + 2 + 8 - 8, abs=1e-12)


@pytest.mark.parametrize(("n", "m", "d"), [(40, 30, 8), (200, 9, 8), (5, 300, 1)])
def test_frechet_distance_equals_scipy_matrix_square_root(n: int, m: int, d: int) -> None:
    x, y = drawn(n, d, 0), drawn(m, d, 1, scale=2.0, shift=0.5)
    a, b = x.T.cov().reshape(d, d), y.T.cov().reshape(d, d)
    root = torch.from_numpy(sqrtm((a @ b).numpy()).real)
    expected = float((x.mean(0) - y.mean(0)).square().sum() + a.trace() + b.trace() - 2 * root.trace())
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("n", "d"), [(50, 6), (6, 50), (2, 3)])
def test_a_set_has_distance_zero_to_itself(n: int, d: int) -> None:
    x = drawn(n, d, 0, shift=3.0)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, x + 1) == pytest.approx(d, rel=1e-9)


def test_distance_of_diagonal_gaussians() -> None:
    x = Gaussian(torch.zeros(3), torch.tensor([2.0, 3.0, 0.0]).diag())
    y = Gaussian(torch.ones(3), torch.tensor([1.0, 4.0, 5.0]).diag())
    assert gaussian_distance(x, y) == pytest.approx(3 + 1 + 1 + 25)


@pytest.mark.parametrize("n", [5, 60])
def test_factor_gives_the_unbiased_covariance_of_any_rank(n: int) -> None:
    x = drawn(n, 20, 0)
    gaussian = Gaussian.fit(x.float().requires_grad_())
    assert gaussian.factor.shape == (20, min(n, 20)) and gaussian.factor.dtype == torch.float64
    assert not gaussian.factor.requires_grad
    assert torch.allclose(gaussian.factor @ gaussian.factor.T, x.T.cov(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("score", [frechet_distance, kernel_distance])
def test_sets_without_a_distance_are_refused(score: Callable[[Tensor, Tensor], float]) -> None:
    y = drawn(10, 3, 0)
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        score(y[:1], y)
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        score(y, y[:1])
    with pytest.raises(ValueError, match="must be finite"):
        score(torch.full((4, 3), math.nan), y)
    with pytest.raises(ValueError, match="different width"):
        score(y[:, :2], y)
    with pytest.raises(ValueError, match=r"must be \(n, d\)"):
        score(y[0], y)
