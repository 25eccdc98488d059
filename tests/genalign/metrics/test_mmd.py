"""The maximum mean discrepancy against sums written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from genalign.metrics.mmd import GaussianKernel, MMDToReference, median_distance, polynomial_kernel


def normal(n: int, d: int, seed: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kernel_distance(x: Tensor, y: Tensor) -> float:
    return MMDToReference(y, polynomial_kernel).unbiased(x)


def test_kid_worked_by_hand() -> None:
    # k(1, 2) = 27, k(0, 0) = 1, k(., 0) = 1
    assert kernel_distance(torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [0.0]])) == pytest.approx(27 + 1 - 2)


def test_mmd_is_the_mean_over_pairs() -> None:
    x, y, kernel = normal(4, 3, 0), normal(5, 3, 1), GaussianKernel(2.0)

    def mean(a: Tensor, b: Tensor, apart: bool) -> float:
        pairs = [(i, j) for i in range(len(a)) for j in range(len(b)) if not (apart and i == j)]
        return sum(math.exp(-float((a[i] - b[j]).square().sum()) / 8) for i, j in pairs) / len(pairs)

    assert MMDToReference(y, kernel).unbiased(x) == pytest.approx(
        mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)
    )


def test_kid_has_no_bias() -> None:
    values = torch.tensor([kernel_distance(normal(6, 4, 2 * i), normal(9, 4, 2 * i + 1)) for i in range(400)])
    assert abs(float(values.mean())) < 4 * float(values.std()) / 20
    assert float(values.min()) < 0


def test_median_distance() -> None:
    assert median_distance(torch.tensor([[0.0], [1.0], [3.0]])) == 2.0
    with pytest.raises(ValueError, match="the same sample over again"):
        median_distance(torch.zeros(3, 1))
