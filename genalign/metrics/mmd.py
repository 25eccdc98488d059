"""The maximum mean discrepancy (MMD) between two sets of features, with the kernels of KID, KAD and CMMD.

A set is n features (n, d). Arithmetic is as in ``genalign.metrics.frechet``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from genalign.metrics.frechet import as_features, require_same_width

Kernel = Callable[[Tensor, Tensor], Tensor]
"""A positive definite kernel: from (n, d) and (m, d) to (n, m)."""


def polynomial_kernel(x: Tensor, y: Tensor) -> Tensor:
    """Compute (x . y / d + 1)^3, the kernel of KID (arXiv 1801.01401, section 4)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


@dataclass(frozen=True)
class GaussianKernel:
    """The kernel exp(-|x - y|^2 / (2 bandwidth^2))."""

    bandwidth: float

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        squares = x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T
        return torch.exp(-squares.clamp(min=0) / (2 * self.bandwidth**2))


def median_distance(features: Tensor) -> float:
    """Compute the median distance between two members of a set (m, d). Raises ValueError where it is 0, or m < 2."""
    distances = torch.pdist(as_features(features, at_least=2))
    # quantile() averages the two middle values, but takes at most 2^24 of them
    median = float(distances.quantile(0.5) if len(distances) < 2**24 else distances.median())
    if median == 0:
        raise ValueError("most of the reference set is the same sample over again: give different ones")
    return median


class MMDToReference:
    """The squared MMD of sets to one reference set (m, d), all of it at once: the kernel takes (m, m) of memory.

    Raises ValueError for m < 2.
    """

    def __init__(self, reference: Tensor, kernel: Kernel) -> None:
        self.reference, self.kernel = as_features(reference, at_least=2), kernel
        self._within = _off_diagonal_sum(kernel(self.reference, self.reference))

    def unbiased(self, features: Tensor) -> float:
        """Estimate the squared MMD of a set (n, d) without bias; it may be negative (Gretton et al., 2012, eq. 3).

        The mean of k(x_i, x_j), i != j, plus the same of y, minus twice the mean of k(x_i, y_j).
        """
        within, across, n, m = self._sums(features)
        return within / (n * (n - 1)) + self._within / (m * (m - 1)) - 2 * across / (n * m)

    def biased(self, features: Tensor) -> float:
        """Estimate the squared MMD of a set (n, d) with the pairs i = j, for a kernel with k(x, x) = 1; 0 or more."""
        within, across, n, m = self._sums(features)
        return (within + n) / n**2 + (self._within + m) / m**2 - 2 * across / (n * m)

    def _sums(self, features: Tensor) -> tuple[float, float, int, int]:
        """Sum k(x_i, x_j), i != j, and k(x_i, y_j); also return n and m."""
        features = as_features(features, at_least=2)
        require_same_width(features, self.reference)
        within = _off_diagonal_sum(self.kernel(features, features))
        across = float(self.kernel(features, self.reference).sum())
        return within, across, len(features), len(self.reference)


def _off_diagonal_sum(matrix: Tensor) -> float:
    return float(matrix.sum() - matrix.diagonal().sum())
