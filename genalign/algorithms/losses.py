"""Losses, per element: what a batch is averaged with is the caller's."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from genalign.diffusion.paths import promote
from genalign.diffusion.transitions import Transition
from genalign.types import NoiseStep

KLForm = Literal["exact", "no_dt", "x", "v"]


def clipped_surrogate(log_ratio: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """PPO's loss max(-A r, -A clip(r, 1 - e, 1 + e)) for r = exp(log_ratio), all (N,) (arXiv 1707.06347, eq. 7).

    Clipped as a logarithm: the ranges in use (1e-4 and less, where log_ratio is a mean over dimensions) are close to
    the resolution of a float32 near 1. Where A = 0 the loss and its gradient are 0, whatever the ratio.
    """
    _require_pairs(log_ratio, advantages)
    low, high = _log_bounds(clip_range)
    pessimistic = torch.where(advantages >= 0, log_ratio.clamp(max=high), log_ratio.clamp(min=low))
    return -advantages * pessimistic.exp()


def clip_fraction(log_ratio: Tensor, clip_range: float) -> Tensor:
    """The share () of ratios outside [1 - e, 1 + e], whatever their advantage."""
    low, high = _log_bounds(clip_range)
    return ((log_ratio < low) | (log_ratio > high)).float().mean()


def guarded_log_ratio(new: Transition, old: Transition, x_next: Tensor) -> Tensor:
    """GRPO-Guard's normalised log-ratio (arXiv 2510.22319, eq. 8), (N,): std (log r + KL), with the plain log-ratio and
    KL as means over dimensions.

    That is mean(noise (m_new - m_old)): without the KL's bias below 0 and of one scale at every step, so that one clip
    range holds symmetrically for all. The loss on it is divided by D = sigma - sigma_next, which equalises the steps.
    """
    std = new.std.flatten()
    scale = std if len(std) == len(x_next) else std.expand(len(x_next))
    return scale.to(new.mean.dtype) * (new.log_ratio(old, x_next) + new.kl(old))


def dppo_mask(log_ratio: Tensor, kl: Tensor, advantages: Tensor, limit: float) -> Tensor:
    """Flow-DPPO's mask (arXiv 2606.11025), (N,) bool: False where a step is further than ``limit`` in ``kl`` from the
    sampling policy and its gradient would move it further: r > 1 with A > 0, or r < 1 with A < 0."""
    _require_pairs(log_ratio, advantages)
    _require_pairs(kl, advantages)
    # The product of the two could underflow.
    away = ((log_ratio > 0) & (advantages > 0)) | ((log_ratio < 0) & (advantages < 0))
    return ~((kl > limit) & away)


def noise_weights(std: Tensor) -> Tensor:
    """TempFlow-GRPO's weights of the trained steps (arXiv 2508.04324, eq. 8), (S,): their noises ``std`` (S,), which
    include sqrt(D), over the mean of these."""
    if std.ndim != 1 or not bool((std > 0).all()):
        raise ValueError(f"std must be (S,) and positive, for stochastic steps only, not {std.tolist()}")
    return std / std.mean()


def kl_penalty(
    form: KLForm,
    current: Transition,
    reference: Transition,
    prediction: Tensor,
    reference_prediction: Tensor,
    step: NoiseStep,
) -> Tensor:
    """The distance (B,) of a move from the reference network's move from the same x, a mean over dimensions.

    With m the means, v the predictions and D = sigma - sigma_next:

    - "exact": (m - m_ref)^2 / (2 std^2), the Kullback-Leibler divergence (Flow-GRPO's Wan code).
    - "no_dt": D times that, for std = g sqrt(D) the division by 2 g^2 of Flow-GRPO's other code. On a 10-step grid the
      same weight makes it 4 to 25 times weaker than "exact", and more at a short last step.
    - "x": (m - m_ref)^2.
    - "v": (v - v_ref)^2, which does not depend on the kernel.

    The first two need a stochastic step (ValueError). Take the reference under no_grad, but not this function.
    """
    if form == "exact":
        return current.kl(reference)
    if form == "no_dt":
        exact = current.kl(reference)
        return exact * (step.sigma - step.sigma_next).to(exact.dtype).to(exact.device)
    if form == "x":
        return mean_square(current.mean, reference.mean)
    if form == "v":
        return mean_square(prediction, reference_prediction)
    raise ValueError(f'form must be "exact", "no_dt", "x" or "v", not {form!r}')


def mean_square(value: Tensor, reference: Tensor) -> Tensor:
    """The mean squared difference (B,) over all dimensions but the first, in float32 or more."""
    if value.shape != reference.shape:
        raise ValueError(f"expected equal shapes, not {tuple(value.shape)} and {tuple(reference.shape)}")
    value, reference = promote(value, reference)
    return (value - reference).square().flatten(1).mean(1)


def require_clip_range(clip_range: float) -> None:
    """Raise ValueError for one outside (0, 1)."""
    if not 0 < clip_range < 1:
        raise ValueError(f"clip_range must be in (0, 1), not {clip_range}")


def _log_bounds(clip_range: float) -> tuple[float, float]:
    require_clip_range(clip_range)
    return math.log1p(-clip_range), math.log1p(clip_range)


def _require_pairs(log_ratio: Tensor, advantages: Tensor) -> None:
    if log_ratio.ndim != 1 or log_ratio.shape != advantages.shape:
        shapes = f"{tuple(log_ratio.shape)} and {tuple(advantages.shape)}"
        raise ValueError(f"log_ratio and advantages must both be (N,), not {shapes}")
