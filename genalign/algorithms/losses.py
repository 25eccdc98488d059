"""Losses of the trajectory and the matching family, per element; averaging over a batch is left to the caller.

Trajectory losses (policy gradients on stored transitions) come first, with their weights and penalties, then PRDP's
regression, then the matching losses on forward-process errors. N counts elements, B samples, S stored steps;
D = sigma - sigma_next is the size of a step.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from genalign.diffusion.paths import expand, promote
from genalign.diffusion.transitions import Transition
from genalign.types import NoiseStep

KLForm = Literal["exact", "no_dt", "x", "v"]

_ADAPTIVE_FLOOR = 1e-5


# Trajectory losses


def clipped_surrogate(log_ratio: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """PPO's loss max(-A r, -A clip(r, 1 - e, 1 + e)) for r = exp(log_ratio), all (N,) (arXiv 1707.06347, eq. 7).

    This is the loss of Flow-GRPO (arXiv 2505.05470, section 4.1), of the log-ratio of one transition. It is clipped as
    a logarithm: the ranges in use (1e-4 and less, where log_ratio is a mean over dimensions) are close to the
    resolution of a float32 near 1. Where A = 0 the loss and its gradient are 0, whatever the ratio.
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
    """GRPO-Guard's normalized log-ratio (arXiv 2510.22319, eq. 8), (N,): std (log r + KL), with the plain log-ratio and
    KL as means over dimensions.

    That is mean(noise (m_new - m_old)): without the KL's bias below 0 and of one scale at every step, so that one clip
    range holds symmetrically for all. The loss on it is divided by D = sigma - sigma_next, which equalizes the steps.
    """
    std = new.std.flatten()
    scale = std if len(std) == len(x_next) else std.expand(len(x_next))
    return scale.to(new.mean.dtype) * (new.log_ratio(old, x_next) + new.kl(old))


def dppo_mask(log_ratio: Tensor, kl: Tensor, advantages: Tensor, limit: float) -> Tensor:
    """Flow-DPPO's mask (arXiv 2606.11025), (N,) bool: the steps to train on.

    False where a step is further than ``limit`` in KL from the sampling policy and its gradient would move it further:
    r > 1 with A > 0, or r < 1 with A < 0.

    Args:
        log_ratio: log r (N,).
        kl: KL divergence (N,) from the sampling policy, a mean over dimensions.
        advantages: A (N,).
        limit: The trust region in KL.
    """
    _require_pairs(log_ratio, advantages)
    _require_pairs(kl, advantages)
    # The product of the two could underflow.
    away = ((log_ratio > 0) & (advantages > 0)) | ((log_ratio < 0) & (advantages < 0))
    return ~((kl > limit) & away)


def noise_weights(std: Tensor) -> Tensor:
    """TempFlow-GRPO's weights of the trained steps (arXiv 2508.04324, eq. 8), (S,): ``std`` over its mean.

    ``std`` (S,) is the noise of each step, which includes sqrt(D).
    """
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
    """The distance (B,) of a move from the reference policy's move from the same x, a mean over dimensions.

    With m the means and v the predictions, the forms are:

    - "exact": (m - m_ref)^2 / (2 std^2), the Kullback-Leibler divergence (Flow-GRPO's Wan code).
    - "no_dt": D times that, for std = g sqrt(D) the division by 2 g^2 of Flow-GRPO's other code. On a 10-step grid the
      same weight makes it 4 to 25 times weaker than "exact", and more at a short last step.
    - "x": (m - m_ref)^2.
    - "v": (v - v_ref)^2, which does not depend on the kernel.

    Args:
        form: The form; "exact" and "no_dt" need a stochastic step (ValueError).
        current: The current policy's transition, with a gradient.
        reference: The reference policy's transition, without one.
        prediction: The current network's output (B, ...).
        reference_prediction: The reference network's output (B, ...).
        step: The step of the grid.
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


# PRDP


def prdp_loss(
    log_ratios: Tensor,
    old_log_ratios: Tensor,
    rewards: Tensor,
    group: Tensor,
    beta: float,
    clip_range: float,
    steps: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """PRDP (arXiv 2402.08714, eq. 14-21, appendix G): the sum () over prompts of the mean over their pairs of
    max((d - g / beta)^2, (d_clipped - g / beta)^2).

    d is the difference of two samples' log-ratios to the reference policy, reduced over ``steps``, g that of their
    rewards. Each step's log-ratio is clipped to ``clip_range`` around that of the sampling policy. Pairs of equal
    rewards, or with one that is NaN, are left out; a prompt without pairs adds 0.

    Args:
        log_ratios: (B, S), of the current policy.
        old_log_ratios: (B, S), of the sampling policy.
        rewards: (B,).
        group: (B,), prompt indices.
        beta: The strength of the KL constraint to the reference policy.
        clip_range: The range of a step's log-ratio around that of the sampling policy.
        steps: "mean" as the paper's listing, "sum" as its text, which makes beta S times smaller for the same strength.
    """
    if log_ratios.ndim != 2 or log_ratios.shape != old_log_ratios.shape:
        shapes = f"{tuple(log_ratios.shape)} and {tuple(old_log_ratios.shape)}"
        raise ValueError(f"log_ratios and old_log_ratios must both be (B, S), not {shapes}")
    _require_per_sample(len(log_ratios), rewards=rewards, group=group)
    if not beta > 0 or not clip_range > 0:
        raise ValueError(f"beta and clip_range must be positive, not {beta} and {clip_range}")
    if steps not in ("mean", "sum"):
        raise ValueError(f'steps must be "mean" or "sum", not {steps!r}')
    clipped = torch.clamp(log_ratios, old_log_ratios - clip_range, old_log_ratios + clip_range)
    plain, limited = (ratios.mean(1) if steps == "mean" else ratios.sum(1) for ratios in (log_ratios, clipped))
    total = log_ratios[:0].sum()  # 0 with a gradient of 0, also where a left-out sample's log-ratio is NaN
    for key in torch.unique(group):
        better, worse = _untied_pairs(rewards, group == key)
        if len(better):
            target = (rewards[better] - rewards[worse]).to(plain.dtype) / beta
            losses = [(ratio[better] - ratio[worse] - target).square() for ratio in (plain, limited)]
            total = total + torch.maximum(*losses).mean()
    return total


def untied_groups(rewards: Tensor, group: Tensor) -> int:
    """Count the prompts with two samples of different reward; the others add nothing to ``prdp_loss``."""
    _require_per_sample(len(rewards), rewards=rewards, group=group)
    return sum(len(_untied_pairs(rewards, group == key)[0]) > 0 for key in torch.unique(group))


def untied(rewards: Tensor, group: Tensor) -> Tensor:
    """Mask (B,) bool of the samples that are part of ``prdp_loss``: of an untied prompt, with a reward."""
    _require_per_sample(len(rewards), rewards=rewards, group=group)
    mask = torch.zeros_like(group, dtype=torch.bool)
    for key in torch.unique(group):
        mask[torch.cat(_untied_pairs(rewards, group == key))] = True
    return mask


def _untied_pairs(rewards: Tensor, member: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the better and of the worse sample of every pair; NaN is better or worse than nothing."""
    rows = member.nonzero()[:, 0]
    better = rewards[rows][:, None] > rewards[rows][None, :]
    first, second = better.nonzero(as_tuple=True)
    return rows[first], rows[second]


# Matching losses


def dpo_loss(better: Tensor, better_reference: Tensor, worse: Tensor, worse_reference: Tensor, beta: float) -> Tensor:
    """Diffusion-DPO (arXiv 2311.12908, eq. 14), (N,): -log sigmoid(-beta / 2 ((e - e_ref)_better - (e - e_ref)_worse)).

    The loss is log 2 at the reference policy.

    Args:
        better: Errors e (N,) of the current policy on the preferred samples.
        better_reference: Errors e_ref (N,) of the reference policy on these.
        worse: Errors (N,) of the current policy on the other samples.
        worse_reference: Errors (N,) of the reference policy on these.
        beta: The strength, as in the public code; on flows a constant works where beta (1 - t)^2, which the derivation
            gives, does not (arXiv 2501.13918, section 4).
    """
    _require_per_sample(
        len(better), better=better, better_reference=better_reference, worse=worse, worse_reference=worse_reference
    )
    inside: Tensor = -0.5 * beta * ((better - better_reference) - (worse - worse_reference))
    return -F.logsigmoid(inside)


def kto_loss(errors: Tensor, reference_errors: Tensor, desirable: Tensor, beta: float) -> Tensor:
    """Diffusion-KTO (arXiv 2404.04465, eq. 9), (N,): 1 - sigmoid(+-beta (g - z)) with the gain g = -(e - e_ref).

    The baseline z is the mean of g over the batch, not below 0 and without gradient.

    Args:
        errors: Errors e (N,) of the current policy.
        reference_errors: Errors e_ref (N,) of the reference policy.
        desirable: (N,) bool; the sign is + for desirable samples and - for the others.
        beta: The strength.
    """
    _require_per_sample(len(errors), errors=errors, reference_errors=reference_errors, desirable=desirable)
    if desirable.dtype != torch.bool:
        raise TypeError(f"desirable must be bool, not {desirable.dtype}: compare the credit with a threshold")
    gain = reference_errors - errors
    baseline = gain.detach().mean().clamp(min=0) if len(gain) else gain.new_zeros(())
    sign = torch.where(desirable, 1.0, -1.0)
    return 1 - torch.sigmoid(sign * beta * (gain - baseline))


def nft_loss(clean: Tensor, old: Tensor, x0: Tensor, optimality: Tensor, beta: float) -> Tensor:
    """DiffusionNFT (arXiv 2509.16117, eq. 5 with its code's adaptive weights), (N,).

    The implicit policies v+ = beta v + (1 - beta) v_old and v- = (1 + beta) v_old - beta v are matched with x0, the
    first weighted by r, the second by 1 - r; on every path their clean samples are the same mixtures of the clean
    samples of v and v_old. Each error is divided by its own mean absolute value.

    Args:
        clean: The clean samples (N, ...) that the current policy's predictions point to.
        old: The clean samples (N, ...) of the sampling policy's predictions.
        x0: The samples (N, ...).
        optimality: r in [0, 1] (N,).
        beta: The guidance strength.
    """
    _require_per_sample(len(x0), optimality=optimality)
    if not clean.shape == old.shape == x0.shape:
        shapes = [tuple(tensor.shape) for tensor in (clean, old, x0)]
        raise ValueError(f"clean, old and x0 must have one shape, not {shapes}")
    if not beta > 0:
        raise ValueError(f"beta must be positive, not {beta}")
    positive = _normalized_error(beta * clean + (1 - beta) * old - x0)
    negative = _normalized_error((1 + beta) * old - beta * clean - x0)
    return (optimality * positive + (1 - optimality) * negative) / beta


def _normalized_error(difference: Tensor) -> Tensor:
    """Mean square over mean absolute value, the latter without gradient: (N,), in float64, as what one update changes
    of it can be less than float32 resolves.
    """
    flat = difference.double().flatten(1)
    return flat.square().mean(1) / flat.detach().abs().mean(1).clamp(min=_ADAPTIVE_FLOOR)


def awm_log_probability(errors: Tensor, sigma: Tensor, power: float = 0.25) -> Tensor:
    """AWM's surrogate of a log-probability (arXiv 2509.25050, "ghuber" of its code), (N,).

    It is -((e + 1e-10)^p - 1e-10^p) sigma / p for errors e (N,) at noise levels ``sigma`` (N,) and p = ``power``; its
    gradient is -sigma (e + 1e-10)^(p - 1) times that of e.
    """
    _require_per_sample(len(errors), errors=errors, sigma=sigma)
    tiny = 1e-10
    lifted: Tensor = (errors + tiny).pow(power) - tiny**power
    return -lifted * expand(sigma, errors) / power


# Shared by both families


def mean_square(value: Tensor, reference: Tensor) -> Tensor:
    """Mean squared difference (B,) over all dimensions but the first, in float32 or more."""
    if value.shape != reference.shape:
        raise ValueError(f"expected equal shapes, not {tuple(value.shape)} and {tuple(reference.shape)}")
    value, reference = promote(value, reference)
    return (value - reference).square().flatten(1).mean(1)


def require_clip_range(clip_range: float) -> None:
    """Raise ValueError for a clip range outside (0, 1)."""
    if not 0 < clip_range < 1:
        raise ValueError(f"clip_range must be in (0, 1), not {clip_range}")


def _log_bounds(clip_range: float) -> tuple[float, float]:
    require_clip_range(clip_range)
    return math.log1p(-clip_range), math.log1p(clip_range)


def _require_pairs(log_ratio: Tensor, advantages: Tensor) -> None:
    if log_ratio.ndim != 1 or log_ratio.shape != advantages.shape:
        shapes = f"{tuple(log_ratio.shape)} and {tuple(advantages.shape)}"
        raise ValueError(f"log_ratio and advantages must both be (N,), not {shapes}")


def _require_per_sample(count: int, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.shape != (count,):
            raise ValueError(f"{name} must be ({count},), one entry per sample, not {tuple(tensor.shape)}")
