"""The Frechet distance between sets of features, and the diversity of one.

A set is n features (n, d). Arithmetic is in float64 on the CPU wherever the features are, and without gradients.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_SPURIOUS = 1e-12  # an eigenvalue below this share of the trace is round-off


def as_features(features: Tensor, at_least: int) -> Tensor:
    """``features`` (n, d) in float64 on the CPU. ValueError for fewer than ``at_least``, and for what is not finite."""
    if features.ndim != 2 or features.shape[1] < 1:
        raise ValueError(f"features must be (n, d), not {tuple(features.shape)}")
    if len(features) < at_least:
        raise ValueError(f"needs at least {at_least} samples, got {len(features)}: score a larger set")
    if not bool(features.isfinite().all()):
        raise ValueError("features must be finite: leave failed samples out of the set")
    return features.detach().cpu().double()


@dataclass(frozen=True)
class Gaussian:
    """The statistics of a set: ``mean`` (d,), and ``factor`` (d, r) of its covariance, factor factor^T; float64."""

    mean: Tensor
    factor: Tensor

    def __post_init__(self) -> None:
        if self.mean.ndim != 1 or self.factor.ndim != 2 or len(self.factor) != len(self.mean):
            shapes = f"{tuple(self.mean.shape)} and {tuple(self.factor.shape)}"
            raise ValueError(f"mean must be (d,) and factor (d, r), not {shapes}")

    @classmethod
    def of(cls, features: Tensor) -> Gaussian:
        """Of a set (n, d), with the unbiased covariance; r = min(n, d). ValueError for n < 2."""
        values = as_features(features, at_least=2)
        mean = values.mean(0)
        rows = (values - mean) / math.sqrt(len(values) - 1)
        if len(rows) > rows.shape[1]:
            rows = torch.linalg.qr(rows, mode="r").R
        return cls(mean, rows.T)

    @classmethod
    def from_covariance(cls, mean: Tensor, covariance: Tensor) -> Gaussian:
        """From a mean (d,) and a covariance (d, d). ValueError where that is not symmetric positive semi-definite."""
        mean, covariance = mean.detach().cpu().double(), covariance.detach().cpu().double()
        if covariance.shape != (len(mean), len(mean)):
            raise ValueError(f"covariance must be (d, d) for d = {len(mean)}, not {tuple(covariance.shape)}")
        if not bool(covariance.isfinite().all() & mean.isfinite().all()):
            raise ValueError("mean and covariance must be finite")
        tolerance = 1e-6 * float(covariance.abs().max())
        values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
        if float((covariance - covariance.T).abs().max()) > tolerance or float(values[0]) < -tolerance:
            raise ValueError("covariance must be symmetric and have no negative eigenvalue")
        return cls(mean, vectors * values.clamp(min=0).sqrt())

    @property
    def covariance(self) -> Tensor:
        """(d, d)."""
        return self.factor @ self.factor.T


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """The Frechet distance (squared; FID, FAD) of the Gaussians of x (n, d) and y (m, d); see ``gaussian_distance``.

    It is biased upwards by about 1 / n: compare sets of equal size only. ValueError for n or m below 2.
    """
    return gaussian_distance(Gaussian.of(x), Gaussian.of(y))


def gaussian_distance(x: Gaussian, y: Gaussian) -> float:
    """|mu_x - mu_y|^2 + tr S_x + tr S_y - 2 tr (S_x S_y)^(1/2) (Dowson and Landau, 1982).

    With S = A A^T the last trace is the sum of the singular values of A_x^T A_y, exact for covariances of any rank.
    """
    require_same_width(x.mean, y.mean)
    overlap = torch.linalg.svdvals(x.factor.T @ y.factor).sum()
    spread = x.factor.square().sum() + y.factor.square().sum()
    return max(0.0, float((x.mean - y.mean).square().sum() + spread - 2 * overlap))


def vendi(x: Tensor, order: float = 1.0) -> float:
    """The Vendi score of n features (n, d) with the cosine kernel, in [1, n] (arXiv 2210.02410; orders: 2310.12952).

    The exponential of the Renyi entropy of ``order`` >= 0, infinity included, of the eigenvalues of K / n. Falls when a
    set is smaller: compare sets of equal size only. ValueError for a feature of length 0, which has no direction.
    """
    if not order >= 0:
        raise ValueError(f"order must be 0 or more, not {order}")
    rows = directions(x)
    values = torch.linalg.eigvalsh(small_gram(rows))
    return math.exp(_renyi_entropy(values[values > _SPURIOUS], order))


def directions(x: Tensor) -> Tensor:
    """Rows (n, d) of length 1 / sqrt(n). ValueError for a feature of length 0."""
    values = as_features(x, at_least=1)
    norm = torch.linalg.vector_norm(values, dim=1, keepdim=True)
    if bool((norm == 0).any()):
        raise ValueError("a feature of length 0 has no direction: leave such samples out of the set")
    directions: Tensor = values / norm / math.sqrt(len(values))
    return directions


def _renyi_entropy(p: Tensor, order: float) -> float:
    if order == math.inf:
        return -math.log(float(p.max()))
    if math.isclose(order, 1.0, rel_tol=1e-8):
        return float(torch.special.entr(p).sum())
    return math.log(float((p**order).sum())) / (1 - order)


def small_gram(rows: Tensor) -> Tensor:
    """X^T X or X X^T, whichever is smaller: their eigenvalues other than 0 are the same."""
    return rows.T @ rows if len(rows) > rows.shape[1] else rows @ rows.T


def require_same_width(x: Tensor, y: Tensor) -> None:
    """ValueError for features of different width."""
    if x.shape[-1] != y.shape[-1]:
        raise ValueError(f"the two sets have features of different width, {x.shape[-1]} and {y.shape[-1]}")
