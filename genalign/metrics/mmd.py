"""The maximum mean discrepancy (MMD) of two sets of features, and of one whose members are replaced one by one.

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
    """(x . y / d + 1)^3, the kernel of KID (arXiv 1801.01401, section 4)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


@dataclass(frozen=True)
class GaussianKernel:
    """exp(-|x - y|^2 / (2 bandwidth^2))."""

    bandwidth: float

    def __post_init__(self) -> None:
        if not self.bandwidth > 0:
            raise ValueError(f"bandwidth must be positive, not {self.bandwidth}")

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        squares = x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T
        return torch.exp(-squares.clamp(min=0) / (2 * self.bandwidth**2))

    @classmethod
    def at_median(cls, reference: Tensor) -> GaussianKernel:
        """Bandwidth = the median distance of two members of the reference set (m, d) (KAD, arXiv 2502.15602)."""
        distances = torch.pdist(as_features(reference, at_least=2))
        median = float(distances.quantile(0.5) if len(distances) < 2**24 else distances.median())
        if median == 0:
            raise ValueError("most of the reference set is the same sample over again: give different ones")
        return cls(median)


def mmd(x: Tensor, y: Tensor, kernel: Kernel) -> float:
    """The unbiased estimate of the squared maximum mean discrepancy of x (n, d) and y (m, d); it may be negative.

    mean of k(x_i, x_j), i != j, + the same of y - 2 mean of k(x_i, y_j) (Gretton et al., 2012, eq. 3). ValueError for n
    or m below 2.
    """
    return MMDStatistic(x, MMDReference.of(y, kernel)).distance


def kid(x: Tensor, y: Tensor) -> float:
    """The kernel inception distance of the whole sets, without subsets: ``mmd`` with ``polynomial_kernel``."""
    return mmd(x, y, polynomial_kernel)


@dataclass(frozen=True)
class MMDReference:
    """A reference set (m, d) with its kernel and the mean ``within`` of k(y_i, y_j), i != j."""

    features: Tensor
    kernel: Kernel
    within: float

    @classmethod
    def of(cls, features: Tensor, kernel: Kernel) -> MMDReference:
        """ValueError for m < 2. Takes memory for an (m, m) matrix."""
        values = as_features(features, at_least=2)
        return cls(values, kernel, float(_off_diagonal_sum(kernel(values, values))) / (len(values) * (len(values) - 1)))


class MMDStatistic:
    """-MMD^2 of n features (n, d) to a reference set, in O((n + m) d) per replacement."""

    def __init__(self, features: Tensor, reference: MMDReference) -> None:
        self._rows, self._reference = as_features(features, at_least=2).clone(), reference
        require_same_width(self._rows, reference.features)
        self._within = float(_off_diagonal_sum(reference.kernel(self._rows, self._rows)))
        self._across = float(reference.kernel(self._rows, reference.features).sum())

    @property
    def distance(self) -> float:
        return self._distance(self._within, self._across)

    @property
    def value(self) -> float:
        return -self.distance

    @property
    def resolution(self) -> float:
        return 1e-12 * (abs(self._within) / len(self._rows) ** 2 + abs(self._reference.within))

    def swapped(self, index: int, new: Tensor) -> float:
        return -self._distance(*self._sums(index, new))

    def swap(self, index: int, new: Tensor) -> None:
        self._within, self._across = self._sums(index, new)
        self._rows[index] = new

    def settle(self) -> None:
        """Nothing to do."""

    def _sums(self, index: int, new: Tensor) -> tuple[float, float]:
        """The sums of k(x_i, x_j), i != j, and of k(x_i, y_j) after the replacement."""
        pair = torch.stack([new, self._rows[index]])
        within = self._reference.kernel(pair, self._rows)
        within[:, index] = 0
        across = self._reference.kernel(pair, self._reference.features)
        return (
            self._within + 2 * float(within[0].sum() - within[1].sum()),
            self._across + float(across[0].sum() - across[1].sum()),
        )

    def _distance(self, within: float, across: float) -> float:
        n, m = len(self._rows), len(self._reference.features)
        return within / (n * (n - 1)) + self._reference.within - 2 * across / (n * m)


def _off_diagonal_sum(matrix: Tensor) -> Tensor:
    return matrix.sum() - matrix.diagonal().sum()
