"""Matching losses that compare all samples of a prompt: CRD, GDRO, DGPO and RPO.

N counts the samples of whole groups; credit and prompt index are (N,), on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from genalign.algorithms.interfaces import Unit
from genalign.algorithms.losses import mean_square, optimality
from genalign.algorithms.matching import NoisedSamples
from genalign.algorithms.matching_losses import dpo_loss, normalized_error, sign_pairs


@dataclass(frozen=True)
class CenteredRewardLoss:
    """Centered reward distillation (CRD, arXiv 2603.14128): gains regressed on advantages, both centered in the group.

    With r = e~_old - e~ for errors e~, each divided by its own mean absolute value, and a the advantage mapped to
    [0, 1], the loss is (5 / beta) (beta (r - mean r) - (a - mean a))^2; the mean of r has no gradient. The center is
    that of a prompt; the public code takes that of a gathered micro-batch.

    Args:
        beta: The scale of the gains.
        temperature: If set, the loss is half the sum of two such losses, whose centers have weights
            softmax(+-a / temperature) instead of equal ones; None takes the plain mean.
        centered: Whether the gains are centered in the group before the regression.
    """

    unit: ClassVar[Unit] = "group"
    beta: float = 1.0
    temperature: float | None = None
    centered: bool = True

    def __post_init__(self) -> None:
        if not self.beta > 0 or (self.temperature is not None and not self.temperature > 0):
            raise ValueError(f"beta and temperature must be positive, not {self.beta} and {self.temperature}")

    def used(self, credit: Tensor) -> Tensor:
        return torch.ones_like(credit, dtype=torch.bool)

    def terms(self, credit: Tensor, group: Tensor) -> int:
        return len(credit)

    def __call__(self, noised: NoisedSamples, credit: Tensor, group: Tensor) -> Tensor:
        old = normalized_error(noised.old - noised.target).detach()
        gain = old - normalized_error(noised.prediction - noised.target)
        aim = noised.on_device(optimality(credit.double()))
        if self.temperature is None:
            exponents = [torch.zeros_like(aim)]
        else:
            exponents = [sign * aim / float(self.temperature) for sign in (1.0, -1.0)]
        same = noised.on_device(group[:, None] == group[None])  # (N, N)
        losses = []
        for exponent in exponents:  # each loss (N,) is about the centers of the groups by its own weights (N, N)
            weights = torch.softmax(torch.where(same, exponent, -torch.inf), dim=1)
            own = gain - (weights @ gain).detach() if self.centered else gain
            losses.append(5 / self.beta * (self.beta * own - (aim - weights @ aim)).square())
        return torch.stack(losses).mean(0)


@dataclass(frozen=True)
class RankedPreferenceLoss:
    """GDRO (arXiv 2601.02036): a Plackett-Luce likelihood of the ranking of a prompt's samples.

    With implicit rewards s = -beta (e - e_ref) and the samples sorted by reward, it is the sum over i of
    logsumexp of s_i, s_{i+1}, ... minus their mean under softmax(r / temperature). Temperature 0 is the plain ranking;
    two samples then give Diffusion-DPO at twice its beta. ``sft`` times the error of the best sample is added: without
    it the policy collapses, by the paper. The credit is the reward itself; a term is a group of two scores or more.

    Args:
        beta: The strength. The published values are of another convention for the error.
        temperature: In units of the reward: the lower it is, the more the best of the remaining samples counts.
        sft: The weight of the error of the best sample.
    """

    unit: ClassVar[Unit] = "group"
    beta: float = 100.0
    temperature: float = 0.05
    sft: float = 1.0

    def __post_init__(self) -> None:
        if not self.beta > 0 or self.temperature < 0:
            raise ValueError(f"beta must be positive and temperature at least 0, not {self.beta}, {self.temperature}")

    def used(self, credit: Tensor) -> Tensor:
        return credit.isfinite()

    def terms(self, credit: Tensor, group: Tensor) -> int:
        return len(self._rankings(credit, group))

    def __call__(self, noised: NoisedSamples, credit: Tensor, group: Tensor) -> Tensor:
        errors, reference = noised.error, mean_square(noised.reference, noised.target)
        losses = [errors.new_zeros(0)]
        for members in self._rankings(credit, group):
            rows = noised.on_device(members)
            ranked_errors = errors[rows]
            implicit = -self.beta * (ranked_errors - reference[rows])
            ranked = ranking_loss(implicit, noised.on_device(credit[members]).to(implicit.dtype), self.temperature)
            losses.append((ranked + self.sft * ranked_errors[0]).reshape(1))
        return torch.cat(losses)

    @staticmethod
    def _rankings(credit: Tensor, group: Tensor) -> list[Tensor]:
        """The samples of each group with two scores or more, the best first; among equals the first."""
        rankings = []
        for key in torch.unique(group):
            members = ((group == key) & credit.isfinite()).nonzero()[:, 0]
            if len(members) > 1:
                rankings.append(members[torch.sort(credit[members], descending=True, stable=True).indices])
        return rankings


def ranking_loss(implicit: Tensor, rewards: Tensor, temperature: float) -> Tensor:
    """Return GDRO's loss () of implicit rewards (k,) whose true rewards (k,) descend."""
    total = implicit.new_zeros(())
    for first in range(len(implicit) - 1):
        rest = implicit[first:]
        expected = (torch.softmax(rewards[first:] / temperature, dim=0) * rest).sum() if temperature else rest[0]
        total = total + torch.logsumexp(rest, dim=0) - expected
    return total


@dataclass(frozen=True)
class GroupPreferenceLoss:
    """DGPO (arXiv 2510.08425): errors weighted by advantages and by how poorly the group is ranked so far.

    The weight of a group of K is sigmoid(beta / K sum A (e - e_ref)), without gradient, and the loss of a sample
    w A e. A sample stops, without gradient, once exp(e_old - e) has left 1 +- ``clip_range`` in its direction: without
    that, the loss of negative advantages has no bound. K counts the samples without credit, too, whose loss is 0; a
    group without any credit has no term.

    Args:
        beta: The strength.
        clip_range: The clip range of the ratio to the policy that the loss compares with.
    """

    unit: ClassVar[Unit] = "group"
    beta: float = 100.0
    clip_range: float = 1e-2

    def __post_init__(self) -> None:
        if not self.beta > 0 or not self.clip_range > 0:
            raise ValueError(f"beta and clip_range must be positive, not {self.beta} and {self.clip_range}")

    def used(self, credit: Tensor) -> Tensor:
        return torch.ones_like(credit, dtype=torch.bool)

    def terms(self, credit: Tensor, group: Tensor) -> int:
        return int(self._in_credited_groups(credit, group).sum())

    def __call__(self, noised: NoisedSamples, credit: Tensor, group: Tensor) -> Tensor:
        errors, advantage = noised.error, noised.on_device(credit.to(noised.x.dtype))
        with torch.no_grad():
            lead = advantage * (errors - mean_square(noised.reference, noised.target))
            places, counts = torch.unique(group, return_inverse=True, return_counts=True)[1:]
            places, counts = noised.on_device(places), noised.on_device(counts)
            sums = lead.new_zeros(len(counts)).index_add_(0, places, lead)
            weight = torch.sigmoid(self.beta / counts * sums)[places]
            ratio = torch.exp(mean_square(noised.old, noised.target) - errors)
            above, below = ratio > 1 + self.clip_range, ratio < 1 - self.clip_range
            stopped = torch.where(advantage > 0, above, below)
        losses = weight * advantage * torch.where(stopped, errors.detach(), errors)
        return losses[noised.on_device(self._in_credited_groups(credit, group).nonzero()[:, 0])]

    @staticmethod
    def _in_credited_groups(credit: Tensor, group: Tensor) -> Tensor:
        """Mask (N,) bool of the samples of groups in which any sample has credit."""
        return torch.isin(group, group[credit != 0])


@dataclass(frozen=True)
class ReferencePreferenceLoss:
    """RPO (arXiv 2407.12164): a preference between a reference image and a generated one, and the reference's error.

    With gains g = e_ref - e over the reference policy and the label y that ``DrawnPreference`` drew, it is
    -y log sigmoid(beta (g_r - g_g)) - (1 - y) log sigmoid(beta (g_g - g_r)) + ``sft`` e_r, of the reference image r and
    the generated one g, whichever is preferred. A term is a pair.

    Args:
        beta: The strength; half of Diffusion-DPO's, whose loss has beta / 2.
        sft: The weight of the error of the reference image.
    """

    unit: ClassVar[Unit] = "group"
    beta: float = 1.0
    sft: float = 1.0

    def __post_init__(self) -> None:
        if not self.beta > 0 or self.sft < 0:
            raise ValueError(f"beta must be positive and sft at least 0, not {self.beta} and {self.sft}")

    def used(self, credit: Tensor) -> Tensor:
        return credit != 0

    def terms(self, credit: Tensor, group: Tensor) -> int:
        return len(sign_pairs(credit, group))

    def __call__(self, noised: NoisedSamples, credit: Tensor, group: Tensor) -> Tensor:
        pairs = sign_pairs(credit, group)
        errors, base = noised.error, mean_square(noised.reference, noised.target)
        better, worse = noised.on_device(pairs.winners), noised.on_device(pairs.losers)
        loss = dpo_loss(errors[better], base[better], errors[worse], base[worse], 2 * self.beta)
        images = torch.where(credit[pairs.winners].abs() > 1, pairs.winners, pairs.losers)
        return loss + self.sft * errors[noised.on_device(images)]
