"""Losses, weights and penalties of stored transitions, per element; the caller averages them over a batch.

N counts transitions, B samples and S stored steps; D = sigma - sigma_next is the size of a step.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from genalign.diffusion.paths import expand, promote
from genalign.diffusion.transitions import Transition
from genalign.types import NoiseStep

KLForm = Literal["exact", "no_dt", "x", "v"]
_LARGEST_EXPONENT = 20.0

ClipRange = float | tuple[float, float]
"""The range of ratios: e for [1 - e, 1 + e], or (low, high) for [1 - low, 1 + high]; all in (0, 1)."""


def clipped_surrogate(log_ratio: Tensor, advantages: Tensor, clip_range: ClipRange) -> Tensor:
    """PPO's clipped loss max(-A r, -A clip(r, 1 - e, 1 + e)) with r = exp(log_ratio) (arXiv 1707.06347, eq. 7).

    Flow-GRPO (arXiv 2505.05470, section 4.1) applies it to each stored transition. The logarithm is clipped instead of
    r: the clip ranges in use (1e-4 and less, for a log_ratio averaged over dimensions) are close to the resolution of
    float32 near 1. Where A = 0, the loss and its gradient are 0 for any ratio.

    Args:
        log_ratio: Log r (N,) of new to old density.
        advantages: A (N,).
        clip_range: The range e, or (low, high) for different ranges below and above 1, as in NGRPO.

    Returns:
        The loss (N,).
    """
    require_per_sample(len(log_ratio), log_ratio=log_ratio, advantages=advantages)
    low, high = _log_bounds(clip_range)
    pessimistic = torch.where(advantages >= 0, log_ratio.clamp(max=high), log_ratio.clamp(min=low))
    return -advantages * pessimistic.exp()


def clip_fraction(log_ratio: Tensor, clip_range: ClipRange) -> Tensor:
    """Fraction () of the ratios (N,) outside the clip range, for any advantage."""
    low, high = _log_bounds(clip_range)
    return ((log_ratio < low) | (log_ratio > high)).float().mean()


def guarded_log_ratio(new: Transition, old: Transition, x_next: Tensor) -> Tensor:
    """GRPO-Guard's normalized log-ratio std (log r + KL), (N,) (arXiv 2510.22319, eq. 8).

    Log r and KL are means over dimensions, so this is mean(noise (m_new - m_old)) for the means m. Unlike log r it
    has no bias below 0 and the same scale at every step, so one clip range suits all steps and both signs of the
    advantage. GRPO-Guard divides the loss on it by D, which equalizes the steps.
    """
    ratio = new.log_ratio(old, x_next) + new.kl(old)
    return expand(new.std, ratio) * ratio


def dppo_mask(log_ratio: Tensor, kl: Tensor, advantages: Tensor, limit: float) -> Tensor:
    """Flow-DPPO's mask (N,) bool of the transitions to train (arXiv 2606.11025).

    It is False where a transition is further than ``limit`` in KL from the sampling policy and its gradient would push
    it further away: r > 1 with A > 0, or r < 1 with A < 0.

    Args:
        log_ratio: Log r (N,) of new to old density.
        kl: KL divergence (N,) from the sampling policy, a mean over dimensions.
        advantages: A (N,).
        limit: The trust region, in KL.
    """
    require_per_sample(len(log_ratio), log_ratio=log_ratio, kl=kl, advantages=advantages)
    # Compare the signs: the product of log_ratio and advantages could underflow.
    away = ((log_ratio > 0) & (advantages > 0)) | ((log_ratio < 0) & (advantages < 0))
    return ~((kl > limit) & away)


def kl_penalty(
    form: KLForm,
    current: Transition,
    reference: Transition,
    prediction: Tensor,
    reference_prediction: Tensor,
    step: NoiseStep,
) -> Tensor:
    """Distance (N,) between the moves of the current and the reference policy from the same x, a mean over dimensions.

    For means m and network outputs v the forms are:

    - "exact": (m - m_ref)^2 / (2 std^2), the Kullback-Leibler divergence (Flow-GRPO's Wan code).
    - "no_dt": D times "exact". For std = g sqrt(D) this is the division by 2 g^2 of Flow-GRPO's other code. On a
      10-step grid it is 4 to 25 times smaller than "exact", and even smaller at a short last step.
    - "x": (m - m_ref)^2.
    - "v": (v - v_ref)^2, which does not depend on the kernel.

    Args:
        form: The form; "exact" and "no_dt" need a stochastic step.
        current: Transitions (N, ...) of the current policy, with a gradient.
        reference: Transitions (N, ...) of the reference policy, without a gradient.
        prediction: Network outputs (N, ...) of the current policy.
        reference_prediction: Network outputs (N, ...) of the reference policy.
        step: The steps of the grid.

    Raises:
        ValueError: ``form`` is unknown, or needs a density that a deterministic step does not have.
    """
    if form in ("exact", "no_dt"):
        exact = current.kl(reference)
        return exact if form == "exact" else exact * expand(step.sigma - step.sigma_next, exact)
    if form == "x":
        return mean_square(current.mean, reference.mean)
    if form == "v":
        return mean_square(prediction, reference_prediction)
    raise ValueError(f'form must be "exact", "no_dt", "x" or "v", not {form!r}')


def chi_squared(kl: Tensor, sharpness: float) -> Tensor:
    """Chi-squared penalty (N,) of a divergence: expm1(2 k KL) / (2 k), and the KL itself for k = 0.

    The chi-squared divergence of two Gaussians of equal std, the regularizer of arXiv 2403.03185, is expm1(2 KL) with
    the KL summed over dimensions. The KL here is a mean over D dimensions, so k = D gives that divergence over 2 D;
    smaller k interpolate between it and the KL (our choice). The penalty grows fastest where a transition is far from
    the reference policy: choose k so that 2 k KL is about 1 at the largest acceptable KL.

    Args:
        kl: KL divergences (N,), means over dimensions.
        sharpness: The sharpness k, 0 or more.
    """
    return capped_expm1(2 * sharpness * kl) / (2 * sharpness) if sharpness else kl


def capped_expm1(x: Tensor) -> Tensor:
    """exp(x) - 1, continued as a straight line above x = 20, where neither it nor its gradient overflows."""
    above = x > _LARGEST_EXPONENT
    line = math.expm1(_LARGEST_EXPONENT) + math.exp(_LARGEST_EXPONENT) * (x - _LARGEST_EXPONENT)
    return torch.where(above, line, torch.where(above, 0.0, x).expm1())


def mean_square(value: Tensor, reference: Tensor) -> Tensor:
    """Mean squared difference (B,) over all dimensions but the first, in float32 or float64."""
    if value.shape != reference.shape:
        raise ValueError(f"expected equal shapes, not {tuple(value.shape)} and {tuple(reference.shape)}")
    value, reference = promote(value, reference)
    return (value - reference).square().flatten(1).mean(1)


def clip_sides(clip_range: ClipRange) -> tuple[float, float]:
    """Return the ranges below and above 1. Raises ValueError for one outside (0, 1)."""
    low, high = clip_range if isinstance(clip_range, tuple) else (clip_range, clip_range)
    if not (0 < low < 1 and 0 < high < 1):
        raise ValueError(f"clip_range must be in (0, 1), not {clip_range}")
    return low, high


def _log_bounds(clip_range: ClipRange) -> tuple[float, float]:
    low, high = clip_sides(clip_range)
    return math.log1p(-low), math.log1p(high)


def require_per_sample(count: int, **tensors: Tensor) -> None:
    """Raise ValueError for a tensor that is not of shape (count,)."""
    for name, tensor in tensors.items():
        if tensor.shape != (count,):
            raise ValueError(f"{name} must be ({count},), one entry per sample, not {tuple(tensor.shape)}")


def optimality(credit: Tensor, largest: float = 5.0) -> Tensor:
    """Map credit (N,) to [0, 1], linearly between +-``largest``: DiffusionNFT's probability of being right."""
    return credit.clamp(-largest, largest) / (2 * largest) + 0.5
