"""Losses, per element: what a batch is averaged with is the caller's."""

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


_ADAPTIVE_FLOOR = 1e-5


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
    max((d - D / beta)^2, (d_clipped - D / beta)^2).

    d is the difference of two samples' log-ratios to the reference policy, reduced over ``steps``, D that of their
    rewards. Each step's log-ratio is clipped to ``clip_range`` around that of the sampling policy. Pairs of equal
    rewards, or with one that is NaN, are left out; a prompt without pairs adds 0.

    Args:
        log_ratios: (B, S), of the current policy.
        old_log_ratios: (B, S), of the sampling policy.
        rewards: (B,).
        group: (B,), prompt indices.
        steps: "mean" as the paper's listing, "sum" as its text, which makes beta S times smaller for the same strength.
    """
    _require_per_step(log_ratios, old_log_ratios)
    _require_per_sample(len(log_ratios), rewards=rewards, group=group)
    if not beta > 0 or not clip_range > 0:
        raise ValueError(f"beta and clip_range must be positive, not {beta} and {clip_range}")
    if steps not in ("mean", "sum"):
        raise ValueError(f'steps must be "mean" or "sum", not {steps!r}')
    clipped = torch.clamp(log_ratios, old_log_ratios - clip_range, old_log_ratios + clip_range)
    plain, held = (ratios.mean(1) if steps == "mean" else ratios.sum(1) for ratios in (log_ratios, clipped))
    total = log_ratios[:0].sum()  # 0 with a gradient of 0, also where a left-out sample's log-ratio is NaN
    for key in torch.unique(group):
        better, worse = _untied_pairs(rewards, group == key)
        if len(better):
            wanted = (rewards[better] - rewards[worse]).to(plain.dtype) / beta
            losses = [(ratio[better] - ratio[worse] - wanted).square() for ratio in (plain, held)]
            total = total + torch.maximum(*losses).mean()
    return total


def untied_groups(rewards: Tensor, group: Tensor) -> int:
    """How many prompts have two samples of different reward; the others add nothing to ``prdp_loss``."""
    _require_per_sample(len(rewards), rewards=rewards, group=group)
    return sum(len(_untied_pairs(rewards, group == key)[0]) > 0 for key in torch.unique(group))


def untied(rewards: Tensor, group: Tensor) -> Tensor:
    """Which samples (B,) bool are of such prompts and have a reward that is not NaN: no other has a part in it."""
    _require_per_sample(len(rewards), rewards=rewards, group=group)
    found = torch.zeros_like(group, dtype=torch.bool)
    for key in torch.unique(group):
        found[torch.cat(_untied_pairs(rewards, group == key))] = True
    return found


def _untied_pairs(rewards: Tensor, member: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the better and of the worse sample of every pair; NaN is better or worse than nothing."""
    rows = member.nonzero()[:, 0]
    better = rewards[rows][:, None] > rewards[rows][None, :]
    first, second = better.nonzero(as_tuple=True)
    return rows[first], rows[second]


def dpo_loss(better: Tensor, better_reference: Tensor, worse: Tensor, worse_reference: Tensor, beta: float) -> Tensor:
    """Diffusion-DPO (arXiv 2311.12908, eq. 14), (N,): -log sigmoid(-beta / 2 ((e - e_ref)_better - (e - e_ref)_worse)).

    log 2 at the reference policy. ``beta`` is that of the public code; on flows a constant one works where
    beta (1 - t)^2, which the derivation gives, does not (arXiv 2501.13918, section 4).
    """
    _require_per_sample(
        len(better), better=better, better_reference=better_reference, worse=worse, worse_reference=worse_reference
    )
    inside: Tensor = -0.5 * beta * ((better - better_reference) - (worse - worse_reference))
    return -F.logsigmoid(inside)


def kto_loss(errors: Tensor, reference_errors: Tensor, desirable: Tensor, beta: float) -> Tensor:
    """Diffusion-KTO (arXiv 2404.04465, eq. 9), (N,): 1 - sigmoid(+-beta (g - z)) with g = -(e - e_ref) and z the mean
    of g over the batch, not below 0 and without gradient; + for ``desirable`` (N,) bool, - for the others."""
    _require_per_sample(len(errors), errors=errors, reference_errors=reference_errors, desirable=desirable)
    if desirable.dtype != torch.bool:
        raise TypeError(f"desirable must be bool, not {desirable.dtype}: compare the credit with a threshold")
    gain = reference_errors - errors
    baseline = gain.detach().mean().clamp(min=0) if len(gain) else gain.new_zeros(())
    sign = torch.where(desirable, 1.0, -1.0)
    return 1 - torch.sigmoid(sign * beta * (gain - baseline))


def nft_loss(clean: Tensor, old: Tensor, x0: Tensor, optimality: Tensor, beta: float) -> Tensor:
    """DiffusionNFT (arXiv 2509.16117, eq. 5 with its code's adaptive weights), (N,).

    ``clean`` and ``old`` (N, ...) are the clean samples that the current and the sampling policy's predictions point
    to. Those of v+ = beta v + (1 - beta) v_old and v- = (1 + beta) v_old - beta v, which are the same mixtures of them
    on every path, are matched with x0 (N, ...), the first by the ``optimality`` r in [0, 1] (N,), the second by 1 - r;
    each error is divided by its own mean absolute value.
    """
    _require_per_sample(len(x0), optimality=optimality)
    if not clean.shape == old.shape == x0.shape:
        shapes = [tuple(tensor.shape) for tensor in (clean, old, x0)]
        raise ValueError(f"clean, old and x0 must have one shape, not {shapes}")
    if not beta > 0:
        raise ValueError(f"beta must be positive, not {beta}")
    toward = _normalised_error(beta * clean + (1 - beta) * old - x0)
    away = _normalised_error((1 + beta) * old - beta * clean - x0)
    return (optimality * toward + (1 - optimality) * away) / beta


def _normalised_error(difference: Tensor) -> Tensor:
    """Mean square over mean absolute value, the latter without gradient: (N,), in float64, as what one update changes
    of it can be less than float32 resolves."""
    flat = difference.double().flatten(1)
    return flat.square().mean(1) / flat.detach().abs().mean(1).clamp(min=_ADAPTIVE_FLOOR)


def awm_log_probability(errors: Tensor, sigma: Tensor, power: float = 0.25) -> Tensor:
    """Advantage-weighted matching's stand-in for a log-probability (arXiv 2509.25050, "ghuber" of its code), (N,):
    -((e + 1e-10)^p - 1e-10^p) sigma / p. Its gradient is -sigma (e + 1e-10)^(p - 1) times the error's."""
    _require_per_sample(len(errors), errors=errors, sigma=sigma)
    tiny = 1e-10
    lifted: Tensor = (errors + tiny).pow(power) - tiny**power
    return -lifted * expand(sigma, errors) / power


def _require_per_step(log_ratios: Tensor, old_log_ratios: Tensor) -> None:
    if log_ratios.ndim != 2 or log_ratios.shape != old_log_ratios.shape:
        shapes = f"{tuple(log_ratios.shape)} and {tuple(old_log_ratios.shape)}"
        raise ValueError(f"log_ratios and old_log_ratios must both be (B, S), not {shapes}")


def _require_per_sample(count: int, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.shape != (count,):
            raise ValueError(f"{name} must be ({count},), one entry per sample, not {tuple(tensor.shape)}")
