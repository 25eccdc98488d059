"""Resampling: K particles are replaced by K of themselves, particle k on average by K W_k of them.

W (K,) are normalized weights. All schemes are unbiased, E[offspring of k] = K W_k; they differ in the noise that they
add. Ancestors say which particle each place is taken by.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Resampler = Callable[[Tensor, torch.Generator], Tensor]
"""From normalized weights (K,) float64 on the CPU to ancestors (K,) long. Raises ValueError for other weights."""

ResamplerName = Literal["multinomial", "stratified", "systematic", "residual", "ssp"]

# Below this, what K W_k is above or below a whole number is a rounding error.
_RESOLUTION = 1e-9
_BELOW_ONE = 1 - 2.0**-53


def normalized_weights(log_weights: Tensor) -> Tensor:
    """The weights (K,) float64 on the CPU, of sum 1, from their logarithms (K,) up to a constant.

    NaN counts as -inf, which is weight 0; where nothing has any weight, all are equal. Raises ValueError for +inf.
    """
    if log_weights.ndim != 1 or len(log_weights) == 0:
        raise ValueError(f"log weights must be (K,) with K > 0, not {tuple(log_weights.shape)}")
    known = log_weights.detach().cpu().double()
    known = torch.where(known.isnan(), -math.inf, known)
    top = known.max()
    if top == math.inf:
        raise ValueError("a log weight is +inf: no other particle would count; look for a division by 0 before it")
    return torch.softmax(known, dim=0) if top > -math.inf else torch.full_like(known, 1 / len(known))


def effective_size(log_weights: Tensor) -> float:
    """How many equal particles the weights are worth, 1 / sum W^2, from 1 to K."""
    return 1 / float(normalized_weights(log_weights).square().sum())


def multinomial(weights: Tensor, generator: torch.Generator) -> Tensor:
    """K independent draws."""
    return _inverse(weights, torch.rand(len(weights), generator=generator, dtype=torch.float64))


def stratified(weights: Tensor, generator: torch.Generator) -> Tensor:
    """One draw in each of K equal strata of the cumulative weights (Kitagawa 1996)."""
    return _inverse(weights, _strata(torch.rand(len(weights), generator=generator, dtype=torch.float64)))


def systematic(weights: Tensor, generator: torch.Generator) -> Tensor:
    """One draw, at the same place in all strata: the offspring of k are K W_k, rounded up or down (Carpenter et
    al. 1999).
    """
    shift = torch.rand(1, generator=generator, dtype=torch.float64)
    return _inverse(weights, _strata(shift.expand(len(weights))))


def residual(weights: Tensor, generator: torch.Generator) -> Tensor:
    """As many offspring as the whole part of K W_k, the others by multinomial draws (Liu and Chen 1998)."""
    whole, rest = _parts(weights)
    left = len(weights) - int(whole.sum())
    certain = _repeated(whole)
    if left == 0:
        return certain
    drawn = _inverse(rest / rest.sum(), torch.rand(left, generator=generator, dtype=torch.float64))
    return torch.cat([certain, drawn]).sort().values


def ssp(weights: Tensor, generator: torch.Generator) -> Tensor:
    """Srinivasan sampling process (Gerber, Chopin and Whiteley 2019, arXiv 1707.01845): the offspring of k are K W_k,
    rounded up or down, and negatively associated.

    Two particles share the sum of what they have beyond whole offspring, so that one of them is settled at 0 or 1 and
    the mean of neither changes; the other goes on to meet the next particle.
    """
    whole, rest = _parts(weights)
    beyond = rest.tolist()
    unsettled = 0
    draws = torch.rand(len(beyond) - 1, generator=generator, dtype=torch.float64)
    for other, draw in enumerate(draws.tolist(), start=1):
        mine, yours = beyond[unsettled], beyond[other]
        both = mine + yours
        keeps = draw * both < mine if both < 1 else draw * (2 - both) < 1 - yours
        gains, gives = (unsettled, other) if keeps else (other, unsettled)
        beyond[gains], beyond[gives] = min(both, 1.0), max(both - 1, 0.0)
        unsettled = gains if both < 1 else gives
    return _repeated(whole + torch.tensor(beyond, dtype=torch.float64).round().long())


RESAMPLERS: dict[ResamplerName, Resampler] = {
    "multinomial": multinomial,
    "stratified": stratified,
    "systematic": systematic,
    "residual": residual,
    "ssp": ssp,
}


def _inverse(weights: Tensor, points: Tensor) -> Tensor:
    """The particles in whose share of the cumulative weights (K,) the points (M,) of [0, 1) lie; none of weight 0."""
    _require_normalized(weights)
    cumulative = weights.cumsum(0)
    return torch.searchsorted(cumulative / cumulative[-1], points.clamp(max=_BELOW_ONE), right=True)


def _strata(places: Tensor) -> Tensor:
    return (torch.arange(len(places)) + places) / len(places)


def _parts(weights: Tensor) -> tuple[Tensor, Tensor]:
    """The whole parts (K,) long of K W, and what is beyond them, (K,) float64."""
    _require_normalized(weights)
    expected = len(weights) * weights
    whole = (expected + _RESOLUTION).floor()
    return whole.long(), (expected - whole).clamp(min=0)


def _repeated(offspring: Tensor) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(offspring)), offspring)


def _require_normalized(weights: Tensor) -> None:
    valid = weights.ndim == 1 and len(weights) > 0 and weights.dtype == torch.float64
    if not valid or not bool((weights >= 0).all()) or abs(float(weights.sum()) - 1) > 1e-6:
        raise ValueError(
            "weights must be (K,) float64, none negative or NaN, of sum 1: use normalized_weights(log_weights)"
        )
