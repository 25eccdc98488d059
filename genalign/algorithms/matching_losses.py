"""Losses of the matching family on the errors of noised samples, as formulas and as ``MatchingLoss`` objects.

An error is a mean squared difference of a network's prediction from its target, over all dimensions; N counts the
terms of a loss and B the samples of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from genalign.algorithms.interfaces import Unit
from genalign.algorithms.losses import mean_square
from genalign.algorithms.matching import NoisedSamples
from genalign.algorithms.preference_pairs import PreferencePairs
from genalign.diffusion.paths import expand

_ADAPTIVE_FLOOR = 1e-5


def dpo_loss(better: Tensor, better_reference: Tensor, worse: Tensor, worse_reference: Tensor, beta: float) -> Tensor:
    """Diffusion-DPO's loss -log sigmoid(-beta / 2 ((e - e_ref)_better - (e - e_ref)_worse)) (arXiv 2311.12908, eq. 14).

    The loss is log 2 at the reference policy.

    Args:
        better: Errors e (N,) of the current policy on the preferred samples.
        better_reference: Errors e_ref (N,) of the reference policy on the preferred samples.
        worse: Errors (N,) of the current policy on the other samples.
        worse_reference: Errors (N,) of the reference policy on the other samples.
        beta: The strength, as in the public code. On flows a constant works, where the beta (1 - t)^2 of the derivation
            does not (arXiv 2501.13918, section 4).

    Returns:
        The loss (N,).
    """
    inside: Tensor = -0.5 * beta * ((better - better_reference) - (worse - worse_reference))
    return -F.logsigmoid(inside)


def kto_loss(errors: Tensor, reference_errors: Tensor, desirable: Tensor, beta: float) -> Tensor:
    """Diffusion-KTO's loss 1 - sigmoid(+-beta (g - z)) of the gain g = -(e - e_ref) (arXiv 2404.04465, eq. 9).

    The baseline z is the mean of g over the batch, at least 0 and without gradient.

    Args:
        errors: Errors e (N,) of the current policy.
        reference_errors: Errors e_ref (N,) of the reference policy.
        desirable: Mask (N,) bool; the sign is + for desirable samples and - for the others.
        beta: The strength.

    Returns:
        The loss (N,).
    """
    gain = reference_errors - errors
    baseline = gain.detach().mean().clamp(min=0) if len(gain) else gain.new_zeros(())
    sign = torch.where(desirable, 1.0, -1.0)
    return 1 - torch.sigmoid(sign * beta * (gain - baseline))


def nft_loss(clean: Tensor, old: Tensor, x0: Tensor, optimality: Tensor, beta: float) -> Tensor:
    """DiffusionNFT's loss (arXiv 2509.16117, eq. 5) with the adaptive weights of its code.

    The implicit policies v+ = beta v + (1 - beta) v_old and v- = (1 + beta) v_old - beta v are matched with x0: v+ with
    the weight r, v- with the weight 1 - r. Their clean samples are the same mixtures of the clean samples of v and
    v_old, on every path. Each error is divided by its own mean absolute value.

    Args:
        clean: Clean samples (N, ...) implied by the current policy's predictions.
        old: Clean samples (N, ...) implied by the sampling policy's predictions.
        x0: The true samples (N, ...).
        optimality: The weight r in [0, 1] (N,).
        beta: The guidance strength.

    Returns:
        The loss (N,) in float64.
    """
    if not beta > 0:
        raise ValueError(f"beta must be positive, not {beta}")
    positive = _normalized_error(beta * clean + (1 - beta) * old - x0)
    negative = _normalized_error((1 + beta) * old - beta * clean - x0)
    return (optimality * positive + (1 - optimality) * negative) / beta


def _normalized_error(difference: Tensor) -> Tensor:
    """Mean square (N,) over mean absolute value, the latter without gradient.

    It is computed in float64: one update may change it by less than float32 resolves.
    """
    flat = difference.double().flatten(1)
    return flat.square().mean(1) / flat.detach().abs().mean(1).clamp(min=_ADAPTIVE_FLOOR)


def awm_log_probability(errors: Tensor, sigma: Tensor, power: float = 0.25) -> Tensor:
    """AWM's surrogate of a log-probability (arXiv 2509.25050, "ghuber" in its code).

    It is -((e + 1e-10)^p - 1e-10^p) sigma / p for errors e (N,), noise levels ``sigma`` (N,) and p = ``power``, and its
    gradient is -sigma (e + 1e-10)^(p - 1) times the gradient of e. Returns (N,).
    """
    tiny = 1e-10
    lifted: Tensor = (errors + tiny).pow(power) - tiny**power
    return -lifted * expand(sigma, errors) / power


@dataclass(frozen=True)
class _CreditedSamples:
    """The default parts of a matching loss: every sample with credit is a term of its own."""

    unit: ClassVar[Unit] = "sample"

    def used(self, credit: Tensor) -> Tensor:
        return credit != 0

    def terms(self, credit: Tensor, group: Tensor) -> int:
        return int(self.used(credit).sum())


@dataclass(frozen=True)
class DPOLoss(_CreditedSamples):
    """Diffusion-DPO on the pairs of ``sign_pairs``, see ``dpo_loss``; a term is a pair."""

    unit: ClassVar[Unit] = "group"
    beta: float

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"beta must be positive, not {self.beta}")

    def terms(self, credit: Tensor, group: Tensor) -> int:
        return len(sign_pairs(credit, group))

    def __call__(self, noised: NoisedSamples, credit: Tensor, group: Tensor) -> Tensor:
        pairs = sign_pairs(credit, group)
        errors, reference = noised.error, mean_square(noised.reference, noised.target)
        better, worse = pairs.winners, pairs.losers
        return dpo_loss(errors[better], reference[better], errors[worse], reference[worse], self.beta)


@dataclass(frozen=True)
class KTOLoss(_CreditedSamples):
    """Diffusion-KTO, see ``kto_loss``: samples of positive credit are desirable, samples of negative credit are not."""

    unit: ClassVar[Unit] = "batch"
    beta: float

    def __call__(self, noised: NoisedSamples, credit: Tensor, group: Tensor) -> Tensor:
        return kto_loss(noised.error, mean_square(noised.reference, noised.target), credit > 0, self.beta)


@dataclass(frozen=True)
class NFTLoss(_CreditedSamples):
    """DiffusionNFT, see ``nft_loss``, with r rising linearly from 0 to 1 over +-``largest_advantage``.

    The policy moves towards samples of positive advantage and away from samples of negative advantage, relative to the
    policy that sampled them; samples without advantage hold it in place.
    """

    beta: float = 1.0
    largest_advantage: float = 5.0

    def used(self, credit: Tensor) -> Tensor:
        return torch.ones_like(credit, dtype=torch.bool)

    def __call__(self, noised: NoisedSamples, credit: Tensor, group: Tensor) -> Tensor:
        limit = self.largest_advantage
        optimality = (credit.clamp(-limit, limit) / (2 * limit) + 0.5).to(noised.x.dtype)
        clean, old = noised.clean(noised.prediction), noised.clean(noised.old)
        return limit * nft_loss(clean, old, noised.x0, optimality, self.beta)


@dataclass(frozen=True)
class AWMLoss(_CreditedSamples):
    """AWM (arXiv 2509.25050): PPO's clipped loss on the ratio of ``awm_log_probability`` to the sampling policy."""

    clip_range: float = 1.0
    power: float = 0.25
    largest_advantage: float = 5.0

    def __call__(self, noised: NoisedSamples, credit: Tensor, group: Tensor) -> Tensor:
        sigma = noised.level.sigma.expand(len(credit))
        new = awm_log_probability(noised.error, sigma, self.power)
        old = awm_log_probability(mean_square(noised.old, noised.target).detach(), sigma, self.power)
        limit = self.largest_advantage
        ratio, advantage = (new - old).exp(), credit.clamp(-limit, limit) / limit
        clipped = ratio.clamp(1 - self.clip_range, 1 + self.clip_range)
        return torch.maximum(-advantage * ratio, -advantage * clipped)


@dataclass(frozen=True)
class RewardWeightedLoss(_CreditedSamples):
    """Error times positive credit: reward-weighted regression (arXiv 2501.13918), or rejection-sampling fine-tuning."""

    def used(self, credit: Tensor) -> Tensor:
        return credit > 0

    def __call__(self, noised: NoisedSamples, credit: Tensor, group: Tensor) -> Tensor:
        return credit * noised.error


def sign_pairs(credit: Tensor, group: Tensor) -> PreferencePairs:
    """Pair the k-th sample of positive credit with the k-th of negative credit in each group; leave out the rest."""
    winners, losers = [group.new_zeros(0)], [group.new_zeros(0)]
    for key in torch.unique(group):
        positive, negative = ((group == key) & (credit * sign > 0) for sign in (1, -1))
        count = min(int(positive.sum()), int(negative.sum()))
        winners.append(positive.nonzero()[:count, 0])
        losers.append(negative.nonzero()[:count, 0])
    return PreferencePairs(torch.cat(winners), torch.cat(losers))
