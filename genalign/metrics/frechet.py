"""The Frechet distance between two sets of features.

A set is n features (n, d). Arithmetic is in float64 on the CPU, wherever the features are, and without gradients.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gaussian:
    """A Gaussian as its ``mean`` (d,) and a ``factor`` A (d, r) of its covariance A A^T, both float64."""

    mean: Tensor
    factor: Tensor

    @classmethod
    def fit(cls, features: Tensor) -> Gaussian:
        """Fit a set (n, d), with the unbiased covariance and r = min(n, d). Raises ValueError for n < 2."""
        features = as_features(features, at_least=2)
        mean = features.mean(0)
        rows = (features - mean) / math.sqrt(len(features) - 1)
        if len(rows) > rows.shape[1]:
            rows = torch.linalg.qr(rows, mode="r").R
        return cls(mean, rows.T)


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Compute the squared Frechet distance (FID, FAD) of x (n, d) and y (m, d); see ``gaussian_distance``.

    It is biased upwards by about 1 / n: compare sets of equal size only. Raises ValueError for n or m below 2.
    """
    return gaussian_distance(Gaussian.fit(x), Gaussian.fit(y))


def gaussian_distance(x: Gaussian, y: Gaussian) -> float:
    """Compute |mu_x - mu_y|^2 + tr S_x + tr S_y - 2 tr (S_x S_y)^(1/2) (Dowson and Landau, 1982).

    With S = A A^T the last trace is the sum of the singular values of A_x^T A_y, exact for covariances of any rank.
    """
    require_same_width(x.mean, y.mean)
    overlap = torch.linalg.svdvals(x.factor.T @ y.factor).sum()
    spread = x.factor.square().sum() + y.factor.square().sum()
    return max(0.0, float((x.mean - y.mean).square().sum() + spread - 2 * overlap))


def as_features(features: Tensor, at_least: int) -> Tensor:
    """Convert ``features`` (n, d) to float64 on the CPU, detached.

    Raises ValueError for another shape, fewer than ``at_least`` rows, or values that are not finite.
    """
    if features.ndim != 2 or features.shape[1] < 1:
        raise ValueError(f"features must be (n, d), not {tuple(features.shape)}")
    if len(features) < at_least:
        raise ValueError(f"a set metric needs at least {at_least} samples, got {len(features)}: score a larger set")
    if not bool(features.isfinite().all()):
        raise ValueError("features must be finite: leave failed samples out of the set")
    return features.detach().cpu().double()


def require_same_width(x: Tensor, y: Tensor) -> None:
    """Raise ValueError where the features of two sets differ in width d."""
    if x.shape[-1] != y.shape[-1]:
        raise ValueError(
            f"the two sets have features of different width, {x.shape[-1]} and {y.shape[-1]}: use one encoder for both"
        )
