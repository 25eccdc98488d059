"""How unsure a learned reward is: a Laplace approximation of the last layer's weights.

The weights (w,) of the last layer that preferences determine have the posterior N(weights, H^-1), where H is the
Hessian of Bradley-Terry's negative log likelihood plus a prior precision. A score is unsure by the deviation of
weights . (features - center): preferences determine differences alone, so deviations are those of the difference
to the mean training item.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

_PRECISIONS = torch.logspace(-3, 5, 33, dtype=torch.float64)
_LEAST_VARIANCE = 1e-24  # of a score: below it the root has no gradient


@dataclass(frozen=True)
class LastLayerLaplace:
    """A Laplace approximation of the last layer (arXiv 2106.14806), for a single member trained on pairs.

    Args:
        precision: Prior precision of a weight; "evidence" takes the one with the largest marginal likelihood of the
            training pairs, and "held-out" the one with the largest likelihood of the held-out pairs.
    """

    precision: float | Literal["evidence", "held-out"] = "evidence"

    def __post_init__(self) -> None:
        if isinstance(self.precision, str):
            if self.precision not in ("evidence", "held-out"):
                raise ValueError(f'precision must be "evidence", "held-out" or a number, not {self.precision!r}')
        elif not self.precision > 0:
            raise ValueError(f"precision must be positive, not {self.precision}")


@dataclass(frozen=True)
class PairFeatures:
    """Differences (N, w) of the last layer's features of pairs, and the preferences (N,) for the first items."""

    differences: Tensor
    preferred: Tensor


def posterior_deviation(features: Tensor, covariance: Tensor, center: Tensor) -> Tensor:
    """Compute the standard deviation (B,) of scores in float64, differentiably in the features.

    Its gradient is 0 at the center, where the root has none.

    Args:
        features: What the last layer reads (B, w).
        covariance: The covariance (w, w) of its weights.
        center: The features (w,) whose score has no deviation.
    """
    offset = features.to(covariance) - center
    return ((offset @ covariance) * offset).sum(1).clamp(min=_LEAST_VARIANCE).sqrt()


@dataclass(frozen=True)
class LaplacePosterior:
    """The posterior of the weights of one output, in float64.

    Attributes:
        covariance: The covariance (w, w).
        center: The mean features (w,) of the training items.
        precision: The prior precision.
    """

    covariance: Tensor
    center: Tensor
    precision: float

    def deviation(self, features: Tensor) -> Tensor:
        """Return the standard deviation (B,) of scores by features (B, w)."""
        return posterior_deviation(features, self.covariance, self.center)


def bradley_terry_hessian(weights: Tensor, differences: Tensor) -> Tensor:
    """Compute the Hessian (w, w) of -sum log sigmoid(weights . difference): sum p (1 - p) difference difference^T.

    Args:
        weights: The weights (w,).
        differences: Differences of features (N, w).
    """
    probability = (differences @ weights).sigmoid()
    return (differences * (probability * (1 - probability))[:, None]).T @ differences


def log_evidence(weights: Tensor, pairs: PairFeatures, eigenvalues: Tensor, precision: float) -> float:
    """Compute Laplace's log marginal likelihood of pairs (MacKay, 1992).

    It is the log likelihood at the weights, minus precision |weights|^2 / 2, plus w / 2 log(precision), minus half the
    log determinant of the Hessian plus the precision.

    Args:
        weights: The weights (w,).
        pairs: The training pairs.
        eigenvalues: The eigenvalues (w,) of ``bradley_terry_hessian``.
        precision: The prior precision.
    """
    likelihood = -F.binary_cross_entropy_with_logits(pairs.differences @ weights, pairs.preferred, reduction="sum")
    prior = len(weights) / 2 * math.log(precision) - precision / 2 * weights.square().sum()
    return float(likelihood + prior - 0.5 * (eigenvalues + precision).log().sum())


def predictive_probability(lead: Tensor, variance: Tensor) -> Tensor:
    """Average sigmoid over N(lead, variance), by MacKay's approximation sigmoid(lead / sqrt(1 + pi variance / 8))."""
    return (lead / (1 + math.pi / 8 * variance).sqrt()).sigmoid()


def fit_laplace(
    settings: LastLayerLaplace, weights: Tensor, center: Tensor, training: PairFeatures, held_out: PairFeatures | None
) -> LaplacePosterior:
    """Approximate the posterior of trained weights (w,).

    Args:
        settings: How the prior precision is chosen.
        weights: The weights of one output.
        center: The mean features (w,) of the training items.
        training: The training pairs.
        held_out: The held-out pairs, for "held-out".

    Raises:
        ValueError: "held-out" without a held-out pair.
    """
    weights, differences, preferred = weights.double(), training.differences.double(), training.preferred.double()
    values, vectors = torch.linalg.eigh(bradley_terry_hessian(weights, differences))
    values = values.clamp(min=0)
    if settings.precision == "evidence":
        pairs = PairFeatures(differences, preferred)
        scores = [log_evidence(weights, pairs, values, tau) for tau in _PRECISIONS.tolist()]
        precision = float(_PRECISIONS[max(range(len(scores)), key=scores.__getitem__)])
    elif settings.precision == "held-out":
        if held_out is None or not len(held_out.preferred):
            raise ValueError('LastLayerLaplace(precision="held-out") needs held-out pairs: hold out more prompts')
        along, wanted = held_out.differences.double() @ vectors, held_out.preferred.double()
        lead, losses = held_out.differences.double() @ weights, list[float]()
        for tau in _PRECISIONS:
            variance = (along.square() / (values + tau)).sum(1)
            losses.append(float(F.binary_cross_entropy(predictive_probability(lead, variance), wanted)))
        precision = float(_PRECISIONS[min(range(len(losses)), key=losses.__getitem__)])
    else:
        assert not isinstance(settings.precision, str)
        precision = settings.precision
    return LaplacePosterior((vectors / (values + precision)) @ vectors.T, center.double(), precision)
