"""Losses of the matching family: of preferences, by the reward's sign, and weighted by advantages.

An error is a mean squared difference of a network's prediction from its target, over all dimensions; N counts the
terms of a loss and B the samples of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from genalign.algorithms.interfaces import Unit
from genalign.algorithms.losses import capped_expm1, mean_square, optimality
from genalign.algorithms.matching import NoisedSamples
from genalign.algorithms.preference_pairs import PreferencePairs
from genalign.diffusion.paths import expand

_ADAPTIVE_FLOOR = 1e-5


Link = Callable[[Tensor], Tensor]
"""An increasing function of gains (N,), 0 with slope 1 at a gain of 0, that a preference loss compares."""


@dataclass(frozen=True)
class ChiSquaredLink:
    """chi-PO's link z + log z of the ratio z to the reference policy (arXiv 2407.13399), adapted to gains g.

    It is (g + expm1(k g) / k) / 2, with k g for log z: the larger the gain of the better sample, the more it counts,
    and the larger the loss of the worse one, the less. The paper's clipping is left out.

    Args:
        sharpness: The factor k, above 0; as k -> 0 the link becomes the gain itself, and the loss Diffusion-DPO's.
    """

    sharpness: float

    def __post_init__(self) -> None:
        _require_positive("sharpness", self.sharpness)

    def __call__(self, gains: Tensor) -> Tensor:
        return (gains + capped_expm1(self.sharpness * gains) / self.sharpness) / 2


@dataclass(frozen=True)
class AlphaLink:
    """AlphaPO's reward shape (1 - z^-a) / a (arXiv 2501.03884), adapted to gains g in place of log z.

    It is -expm1(-a g) / a: the larger the loss of the worse sample, the more it counts, and the larger the gain of the
    better one, the less.

    Args:
        alpha: The exponent a, above 0; as a -> 0 the link becomes the gain itself, and the loss Diffusion-DPO's.
    """

    alpha: float

    def __post_init__(self) -> None:
        _require_positive("alpha", self.alpha)

    def __call__(self, gains: Tensor) -> Tensor:
        return -capped_expm1(-self.alpha * gains) / self.alpha


def _require_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive number, not {value}")


def dpo_loss(
    better: Tensor,
    better_reference: Tensor,
    worse: Tensor,
    worse_reference: Tensor,
    beta: float,
    link: Link | None = None,
) -> Tensor:
    """Diffusion-DPO's loss -log sigmoid(beta / 2 (g_better - g_worse)) of the gains g = -(e - e_ref).

    See arXiv 2311.12908, eq. 14. With a link f the loss compares f(g). It is log 2 at the reference policy.

    Args:
        better: Errors e (N,) of the current policy on the preferred samples.
        better_reference: Errors e_ref (N,) of the reference policy on the preferred samples.
        worse: Errors (N,) of the current policy on the other samples.
        worse_reference: Errors (N,) of the reference policy on the other samples.
        beta: The strength, as in the public code. On flows a constant works, unlike the derivation's beta (1 - t)^2
            (arXiv 2501.13918, section 4).
        link: The link f; None compares the gains themselves.

    Returns:
        The loss (N,).
    """
    better, worse = better_reference - better, worse_reference - worse
    if link is not None:
        better, worse = link(better), link(worse)
    return -F.logsigmoid(0.5 * beta * (better - worse))


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
    positive = normalized_error(beta * clean + (1 - beta) * old - x0)
    negative = normalized_error((1 + beta) * old - beta * clean - x0)
    return (optimality * positive + (1 - optimality) * negative) / beta


def normalized_error(difference: Tensor) -> Tensor:
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
    """The defaults of a matching loss: every sample with credit is one term."""

    unit: ClassVar[Unit] = "sample"

    def used(self, credit: Tensor) -> Tensor:
        return credit != 0

    def terms(self, credit: Tensor, group: Tensor) -> int:
        return int(self.used(credit).sum())


@dataclass(frozen=True)
class DPOLoss(_CreditedSamples):
    """Diffusion-DPO on pairs of samples of positive and of negative credit, see ``dpo_loss``; a term is a pair.

    Args:
        beta: The strength.
        link: The link of the gains; None compares the gains themselves.
        pairs: "matched" pairs the k-th winner of a prompt with its k-th loser, "all" each winner with each loser.
        weighted: Whether a pair counts by half the difference of its credits, as in DP2O-SR (arXiv 2510.18851).
        sft: The weight of the winner's error, which keeps the policy near the winners (arXiv 2405.16436).
    """

    unit: ClassVar[Unit] = "group"
    beta: float
    link: Link | None = None
    pairs: Literal["matched", "all"] = "matched"
    weighted: bool = False
    sft: float = 0.0

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"beta must be positive, not {self.beta}")

    def terms(self, credit: Tensor, group: Tensor) -> int:
        return len(sign_pairs(credit, group, self.pairs))

    def __call__(self, noised: NoisedSamples, credit: Tensor, group: Tensor) -> Tensor:
        pairs = sign_pairs(credit, group, self.pairs)
        errors, reference = noised.error, mean_square(noised.reference, noised.target)
        better, worse = noised.on_device(pairs.winners), noised.on_device(pairs.losers)
        loss = dpo_loss(errors[better], reference[better], errors[worse], reference[worse], self.beta, self.link)
        if self.weighted:
            loss = loss * noised.on_device((credit[pairs.winners] - credit[pairs.losers]) / 2).to(loss.dtype)
        return loss + self.sft * errors[better] if self.sft else loss


@dataclass(frozen=True)
class KTOLoss(_CreditedSamples):
    """Diffusion-KTO, see ``kto_loss``: samples of positive credit are desirable, samples of negative credit are not."""

    unit: ClassVar[Unit] = "batch"
    beta: float

    def __call__(self, noised: NoisedSamples, credit: Tensor, group: Tensor) -> Tensor:
        reference, desirable = mean_square(noised.reference, noised.target), noised.on_device(credit > 0)
        return kto_loss(noised.error, reference, desirable, self.beta)


@dataclass(frozen=True)
class NFTLoss(_CreditedSamples):
    """DiffusionNFT, see ``nft_loss``, with r rising linearly from 0 to 1 over +-``largest_advantage``.

    The policy moves towards samples of positive advantage and away from samples of negative advantage, relative to the
    sampling policy; zero-advantage samples pull it toward the sampling policy.
    """

    beta: float = 1.0
    largest_advantage: float = 5.0

    def used(self, credit: Tensor) -> Tensor:
        return torch.ones_like(credit, dtype=torch.bool)

    def __call__(self, noised: NoisedSamples, credit: Tensor, group: Tensor) -> Tensor:
        weight = noised.on_device(optimality(credit, self.largest_advantage).to(noised.x.dtype))
        clean, old = noised.clean(noised.prediction), noised.clean(noised.old)
        return self.largest_advantage * nft_loss(clean, old, noised.x0, weight, self.beta)


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
        ratio, advantage = (new - old).exp(), noised.on_device(credit.clamp(-limit, limit) / limit)
        clipped = ratio.clamp(1 - self.clip_range, 1 + self.clip_range)
        return torch.maximum(-advantage * ratio, -advantage * clipped)


@dataclass(frozen=True)
class RewardWeightedLoss(_CreditedSamples):
    """Error times positive credit: reward-weighted regression (arXiv 2501.13918), or rejection-sampling fine-tuning."""

    def used(self, credit: Tensor) -> Tensor:
        return credit > 0

    def __call__(self, noised: NoisedSamples, credit: Tensor, group: Tensor) -> Tensor:
        return noised.on_device(credit) * noised.error


def sign_pairs(credit: Tensor, group: Tensor, pairs: Literal["matched", "all"] = "matched") -> PreferencePairs:
    """Pair samples of positive credit with samples of negative credit in each group.

    "matched" pairs the k-th with the k-th and leaves out the rest; "all" pairs each with each.
    """
    winners, losers = [group.new_zeros(0)], [group.new_zeros(0)]
    for key in torch.unique(group):
        positive, negative = ((group == key) & (credit * sign > 0) for sign in (1, -1))
        above, below = positive.nonzero()[:, 0], negative.nonzero()[:, 0]
        if pairs == "all":
            above, below = above.repeat_interleave(len(below)), below.repeat(len(above))
        count = min(len(above), len(below))
        winners.append(above[:count])
        losers.append(below[:count])
    return PreferencePairs(torch.cat(winners), torch.cat(losers))
