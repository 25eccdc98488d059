"""Balancing several rewards by their gradients: MARBLE (arXiv 2605.06507), as its public reports describe it.

Each of K rewards has a gradient of its own, and the step is taken in the direction that maximizes the improvement of
the least improved reward: the shortest convex combination of their unit gradients.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

MOST_REWARDS = 8
"""The largest number of rewards whose weights are found exactly, by trying every subset."""
_NEGLIGIBLE = 1e-8  # a shorter gradient, relative to the longest, is rounding
_STATIONARY = 1e-12  # the squared length of a combination of unit vectors that counts as 0
_TIE = 1e-12


@dataclass(frozen=True)
class GradientBalance:
    """Weights of the rewards that balance their gradients, recomputed at intervals and averaged.

    Args:
        every: The number of updates from one computation of every reward's own gradient to the next.
        decay: The decay of the averaged weights at such an update.
    """

    every: int = 10
    decay: float = 0.7

    def __post_init__(self) -> None:
        if self.every < 1 or not 0 <= self.decay < 1:
            raise ValueError(f"a balance needs every of at least 1 and a decay in [0, 1), not {self}")

    def times(self, first: int, count: int) -> int:
        """Return in how many of ``count`` updates from ``first`` on every reward's own gradient is computed."""
        return -(-(first + count) // self.every) - -(-first // self.every)


def min_norm_weights(gram: Tensor) -> Tensor:
    """Return the weights a of the simplex that minimize |sum_k a_k v_k|^2, exactly, (K,) float64.

    For every subset of the vectors the stationary point of the quadratic program is computed, and the best one with
    non-negative weights is taken; ties go to the one with the most even weights, so equal vectors share.

    Args:
        gram: The products (K, K) of the vectors, v_k . v_l.

    Raises:
        ValueError: There are no vectors, or more than ``MOST_REWARDS``.
    """
    products, count = gram.detach().double().cpu(), len(gram)
    if products.shape != (count, count) or not 1 <= count <= MOST_REWARDS:
        raise ValueError(f"gram must be (K, K) for 1 to {MOST_REWARDS} vectors, not {tuple(gram.shape)}")
    best, least = torch.full((count,), 1 / count, dtype=torch.float64), (torch.inf, torch.inf)
    for size in range(1, count + 1):
        for support in itertools.combinations(range(count), size):
            rows = list(support)
            system = torch.ones(size + 1, size + 1, dtype=torch.float64)
            system[:size, :size], system[size, size] = products[rows][:, rows], 0.0
            target = torch.zeros(size + 1, 1, dtype=torch.float64)
            target[size] = 1.0
            own = torch.linalg.lstsq(system, target, driver="gelsd").solution[:size, 0]
            if bool((own < -1e-9).any()) or abs(float(own.sum()) - 1) > 1e-9:
                continue
            weights = products.new_zeros(count)
            weights[rows] = own.clamp(min=0) / own.clamp(min=0).sum()
            value = float(weights @ products @ weights), float(weights @ weights)
            if value[0] < least[0] - _TIE or (value[0] <= least[0] + _TIE and value[1] < least[1] - _TIE):
                best, least = weights, value
    return best


@dataclass(frozen=True)
class Direction:
    """The direction d = sum_k a_k u_k in which the rewards with unit gradients u_k = g_k / |g_k| improve together.

    Attributes:
        weights: The weights a (K,) float64, which sum to 1; 0 for a reward without a gradient.
        factors: The factors (K,) float64 of the gradients g_k for a step of d times their mean length; 0 where no
            direction improves all.
        least_cosine: The least cosine between d and a gradient; 0 where no direction improves all.
    """

    weights: Tensor
    factors: Tensor
    least_cosine: float

    @classmethod
    def of(cls, gram: Tensor) -> Self | None:
        """Compute the direction from the products (K, K) of the gradients; None if none is finite and above 0."""
        gram = gram.detach().double().cpu()
        norms = gram.diagonal().clamp(min=0).sqrt()
        if not bool(gram.isfinite().all()) or not bool((norms > 0).any()):
            return None
        live = norms > _NEGLIGIBLE * norms.max()
        cosines = (gram / norms.clamp(min=1e-300).outer(norms.clamp(min=1e-300)))[live][:, live]
        own, weights, factors = min_norm_weights(cosines), torch.zeros_like(norms), torch.zeros_like(norms)
        weights[live] = own
        squared = float(own @ cosines @ own)
        if squared < _STATIONARY:
            return cls(weights, factors, 0.0)
        factors[live] = own * norms[live].mean() / norms[live]
        return cls(weights, factors, float((cosines @ own).min()) / squared**0.5)
