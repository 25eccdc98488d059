"""Resampling: K particles are replaced by K copies of particles, on average K W_k copies of particle k.

W (K,) are normalized weights. All schemes are unbiased, E[copies of k] = K W_k, and differ in the noise that they add.
``ancestors`` (K,) are the particles that the places get copies of.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Resampler = Callable[[Tensor, torch.Generator], Tensor]
"""Draws ancestors (K,) long by ``normalized_weights`` (K,) float64 on the CPU."""

ResamplerName = Literal["multinomial", "stratified", "systematic", "residual", "ssp"]

# Distances of K W_k from a whole number below this are rounding errors.
_RESOLUTION = 1e-9
_BELOW_ONE = 1 - 2.0**-53


def normalized_weights(log_weights: Tensor) -> Tensor:
    """Return weights (K,) float64 of sum 1 on the CPU from log weights (K,), which may lack a constant.

    NaN counts as -inf, which is weight 0; if all weights are 0, they become equal. Raises ValueError for +inf.
    """
    values = log_weights.detach().cpu().double()
    values = torch.where(values.isnan(), -math.inf, values)
    top = values.max()
    if top == math.inf:
        raise ValueError("a log weight is +inf: no other particle would count; look for a division by 0 before it")
    return torch.softmax(values, dim=0) if top > -math.inf else torch.full_like(values, 1 / len(values))


def effective_size(log_weights: Tensor) -> float:
    """Return the effective number of particles, 1 / sum W^2, from 1 to K."""
    return 1 / float(normalized_weights(log_weights).square().sum())


def multinomial(weights: Tensor, generator: torch.Generator) -> Tensor:
    """Draw K ancestors independently."""
    return _inverse(weights, torch.rand(len(weights), generator=generator, dtype=torch.float64))


def stratified(weights: Tensor, generator: torch.Generator) -> Tensor:
    """Draw one ancestor in each of K equal strata of the cumulative weights (Kitagawa 1996)."""
    return _inverse(weights, _points(torch.rand(len(weights), generator=generator, dtype=torch.float64)))


def systematic(weights: Tensor, generator: torch.Generator) -> Tensor:
    """Draw ancestors at the same place in all strata: K W_k copies of k, rounded up or down (Carpenter et al. 1999)."""
    shift = torch.rand(1, generator=generator, dtype=torch.float64)
    return _inverse(weights, _points(shift.expand(len(weights))))


def residual(weights: Tensor, generator: torch.Generator) -> Tensor:
    """Make floor(K W_k) copies of k, and draw the other ancestors independently (Liu and Chen 1998)."""
    whole, rest = _parts(weights)
    left = len(weights) - int(whole.sum())
    certain = _ancestors_of(whole)
    if left == 0:
        return certain
    drawn = _inverse(rest / rest.sum(), torch.rand(left, generator=generator, dtype=torch.float64))
    return torch.cat([certain, drawn]).sort().values


def ssp(weights: Tensor, generator: torch.Generator) -> Tensor:
    """Draw ancestors by the Srinivasan sampling process (Gerber, Chopin and Whiteley 2019, arXiv 1707.01845).

    K W_k copies of k are made, rounded up or down, with negative association. Two particles pool the fractional parts
    of K W_k, so one of them gets 0 or 1 and the mean of neither changes; the other meets the next particle.
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
    return _ancestors_of(whole + torch.tensor(beyond, dtype=torch.float64).round().long())


RESAMPLERS: dict[ResamplerName, Resampler] = {
    "multinomial": multinomial,
    "stratified": stratified,
    "systematic": systematic,
    "residual": residual,
    "ssp": ssp,
}


def _inverse(weights: Tensor, points: Tensor) -> Tensor:
    """Invert the cumulative weights at points (M,) of [0, 1); a particle of weight 0 is never drawn."""
    cumulative = weights.cumsum(0)
    return torch.searchsorted(cumulative / cumulative[-1], points.clamp(max=_BELOW_ONE), right=True)


def _points(places: Tensor) -> Tensor:
    return (torch.arange(len(places)) + places) / len(places)


def _parts(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Split K W into whole parts (K,) long and fractional parts (K,) float64."""
    expected = len(weights) * weights
    whole = (expected + _RESOLUTION).floor()
    return whole.long(), (expected - whole).clamp(min=0)


def _ancestors_of(copies: Tensor) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(copies)), copies)
