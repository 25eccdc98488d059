"""The matching family: objectives on forward-process errors of final samples at random noise levels."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from genalign.algorithms.interfaces import Unit, UpdateBatch, UpdateContext
from genalign.algorithms.losses import awm_log_probability, dpo_loss, kto_loss, mean_square, nft_loss
from genalign.algorithms.preference_pairs import PreferencePairs
from genalign.diffusion.noise import derived_seed, seeded_noise
from genalign.types import NoiseLevel, Path


@dataclass(frozen=True)
class NoisedSamples:
    """Final samples noised to random levels, x = alpha x0 + sigma eps, all (B, ...), with the network's ``target``.

    ``prediction`` is the current policy's, with a gradient; ``reference`` and ``old`` are those of the reference policy
    and of the policy that samples (the current one, detached, unless the recipe has a lag).
    """

    path: Path
    x0: Tensor
    x: Tensor
    level: NoiseLevel
    target: Tensor
    prediction: Tensor
    reference: Tensor
    old: Tensor

    def where(self, rows: Tensor) -> NoisedSamples:
        """Select the samples ``rows`` (N,) long."""
        level = NoiseLevel(self.level.timestep[rows], self.level.alpha[rows], self.level.sigma[rows])
        parts = (self.target, self.prediction, self.reference, self.old)
        return NoisedSamples(self.path, self.x0[rows], self.x[rows], level, *(part[rows] for part in parts))

    def clean(self, prediction: Tensor) -> Tensor:
        """The clean samples (B, ...) that a prediction implies."""
        return self.path.x0(self.x, prediction, self.level)

    @property
    def error(self) -> Tensor:
        """The current policy's mean squared error (B,)."""
        return mean_square(self.prediction, self.target)

    @property
    def reference_error(self) -> Tensor:
        """The reference policy's mean squared error (B,)."""
        return mean_square(self.reference, self.target)

    @property
    def old_error(self) -> Tensor:
        """The sampling policy's mean squared error (B,)."""
        return mean_square(self.old, self.target)


class MatchingLoss(Protocol):
    """Terms (N,) of a mean over an update, from noised samples, their credit (B,) and prompt index (B,)."""

    @property
    def unit(self) -> Unit:
        """The samples that the loss ties together."""

    def used(self, credit: Tensor) -> Tensor:
        """Mask (B,) bool of the samples that are part of the loss."""

    def terms(self, credit: Tensor, group: Tensor) -> int:
        """The number N of terms, from the credit alone."""

    def __call__(self, noised: NoisedSamples, credit: Tensor, group: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class MatchingObjective:
    """The objective of the matching family: the mean of a loss over samples, or pairs, and ``draws`` noise levels.

    ``anchor`` times the mean squared distance of the prediction from the reference policy's is added.

    Noise levels are stratified over ``low`` to ``high`` of the path's range. All samples of a prompt share the level
    and the noise of a draw, so that comparisons within a prompt are of the samples alone. Predictions are made without
    guidance, as in training the network.
    """

    loss: MatchingLoss
    draws: int = 2
    low: float = 0.02
    high: float = 0.98
    anchor: float = 0.0
    old: bool = False

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise ValueError(f"draws must be at least 1 noise level per update, not {self.draws}")
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(f"low and high must be ascending fractions in [0, 1], not {self.low} and {self.high}")

    @property
    def unit(self) -> Unit:
        return self.loss.unit

    @property
    def clip_range(self) -> float | None:
        return None

    def with_stronger_kl(self, minimum: float) -> MatchingObjective:
        return replace(self, anchor=max(2 * self.anchor, minimum))

    def terms(self, batch: UpdateBatch) -> int:
        """Count the terms of the loss over all draws."""
        return self.draws * self.loss.terms(batch.credit, batch.group)

    def backward(self, context: UpdateContext, batch: UpdateBatch, scale: float, seed: int) -> None:
        """Predict the samples that are part of the loss, or all with an anchor, and accumulate their gradients.

        Args:
            context: The model and the sampler.
            batch: The samples.
            scale: The factor of the sum of losses.
            seed: The seed of noise levels and noises.
        """
        used = self.loss.used(batch.credit)
        rows = (used | bool(self.anchor)).nonzero()[:, 0]
        if not len(rows) and context.policy.sharded:
            # A sharded network takes all ranks: run it as often as a rank with samples does.
            for draw in range(self.draws):
                noised = self._noised(context, batch, torch.zeros(1, dtype=torch.long), range(draw, draw + 1), seed)
                torch.autograd.backward(0.0 * noised.prediction.sum())
        group, in_loss = batch.group[rows], used[rows].nonzero()[:, 0]
        for draws in self._together(context, len(batch), len(rows)):
            noised = self._noised(context, batch, rows, draws, seed)
            device = noised.x.device
            distance = mean_square(noised.prediction, noised.reference)
            context.metrics.add("kl", distance)
            total = self.anchor * distance.sum()
            for place in range(len(draws)):
                part = noised.where((place * len(rows) + in_loss).to(device))
                losses = self.loss(part, batch.credit[rows[in_loss]].to(device), group[in_loss].to(device))
                context.metrics.add("loss", losses)
                total = total + losses.sum()
            torch.autograd.backward(total * scale)

    def _together(self, context: UpdateContext, size: int, rows: int) -> Iterator[range]:
        """Batch the draws so that their ``rows`` fill a micro-batch of ``size``, as small batches cost more a sample;
        one by one with a sharded network, which ranks must run equally often.
        """
        count = 1 if context.policy.sharded else size // max(1, rows)
        for first in range(0, self.draws if rows else 0, count):
            yield range(first, min(first + count, self.draws))

    def _noised(
        self, context: UpdateContext, batch: UpdateBatch, rows: Tensor, draws: range, seed: int
    ) -> NoisedSamples:
        """Noise the samples ``rows`` (N,) of every draw, draw after draw: (draws * N, ...)."""
        drawn = [(draw, derived_seed(seed, draw, group)) for draw in draws for group in batch.group[rows].tolist()]
        rows, seeds = rows.repeat(len(draws)), [one for _, one in drawn]
        x0 = batch.rollout.final[rows]
        level = context.pipeline.level(self._places(drawn).to(x0.device))
        eps = seeded_noise(seeds, x0)
        path = context.pipeline.path
        x, target = path.add_noise(x0, eps, level), path.prediction(x0, eps, level)
        conditioning = batch.rollout.inputs.conditioning[batch.rollout.inputs.prompt[rows]]

        def predict() -> Tensor:
            return context.pipeline.predict(x, level, conditioning, 1.0)

        with torch.no_grad(), context.policy.reference():
            reference = predict()
        with context.old_policy() if self.old else contextlib.nullcontext():
            old = predict().detach() if self.old else None
        prediction = predict()
        sampling = prediction.detach() if old is None else old
        return NoisedSamples(path, x0, x, level, target, prediction, reference, sampling)

    def _places(self, drawn: Sequence[tuple[int, int]]) -> Tensor:
        """Positions on the path (N,), of draws and seeds: uniform in the draw's stratum, equal for equal seeds."""
        place = torch.tensor([draw + seed / 2**63 for draw, seed in drawn], dtype=torch.float64)
        return self.low + (self.high - self.low) * place / self.draws


@dataclass(frozen=True)
class _CreditedSamples:
    """The parts that most matching losses share: a term is a sample with credit."""

    @property
    def unit(self) -> Unit:
        return "sample"

    def used(self, credit: Tensor) -> Tensor:
        return credit != 0

    def terms(self, credit: Tensor, group: Tensor) -> int:
        return int(self.used(credit).sum())


@dataclass(frozen=True)
class DPOLoss(_CreditedSamples):
    """Diffusion-DPO (arXiv 2311.12908, eq. 14) on pairs of one prompt: the k-th sample of positive credit against the
    k-th of negative credit. A term is a pair.
    """

    beta: float

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"beta must be positive, not {self.beta}")

    @property
    def unit(self) -> Unit:
        return "group"

    def terms(self, credit: Tensor, group: Tensor) -> int:
        return len(sign_pairs(credit, group))

    def __call__(self, noised: NoisedSamples, credit: Tensor, group: Tensor) -> Tensor:
        pairs = sign_pairs(credit, group)
        errors, reference = noised.error, noised.reference_error
        better, worse = pairs.winners, pairs.losers
        return dpo_loss(errors[better], reference[better], errors[worse], reference[worse], self.beta)


@dataclass(frozen=True)
class KTOLoss(_CreditedSamples):
    """Diffusion-KTO (arXiv 2404.04465, eq. 9): samples of positive credit are desirable, those of negative credit not.
    The mean gain of the batch is the baseline.
    """

    beta: float

    @property
    def unit(self) -> Unit:
        return "batch"

    def __call__(self, noised: NoisedSamples, credit: Tensor, group: Tensor) -> Tensor:
        return kto_loss(noised.error, noised.reference_error, credit > 0, self.beta)


@dataclass(frozen=True)
class NFTLoss(_CreditedSamples):
    """DiffusionNFT (arXiv 2509.16117, eq. 5): samples of positive advantage are matched, those of negative advantage
    pushed away from, relative to the policy that sampled them; those without hold the policy where it is.
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
    """AWM (arXiv 2509.25050): the advantage times a clipped ratio to the sampling policy of surrogates of
    log-probabilities.
    """

    clip_range: float = 1.0
    power: float = 0.25
    largest_advantage: float = 5.0

    def __call__(self, noised: NoisedSamples, credit: Tensor, group: Tensor) -> Tensor:
        sigma = noised.level.sigma.expand(len(credit))
        new, old = (awm_log_probability(e, sigma, self.power) for e in (noised.error, noised.old_error.detach()))
        limit = self.largest_advantage
        ratio, advantage = (new - old).exp(), credit.clamp(-limit, limit) / limit
        clipped = ratio.clamp(1 - self.clip_range, 1 + self.clip_range)
        return torch.maximum(-advantage * ratio, -advantage * clipped)


@dataclass(frozen=True)
class RewardWeightedLoss(_CreditedSamples):
    """Matching weighted by credit of 0 or more: reward-weighted regression (arXiv 2501.13918), or rejection-sampling
    fine-tuning.
    """

    def used(self, credit: Tensor) -> Tensor:
        return credit > 0

    def __call__(self, noised: NoisedSamples, credit: Tensor, group: Tensor) -> Tensor:
        return credit * noised.error


def sign_pairs(credit: Tensor, group: Tensor) -> PreferencePairs:
    """Pair the k-th sample of positive with the k-th of negative credit of each group; unpaired ones are left out."""
    winners, losers = [group.new_zeros(0)], [group.new_zeros(0)]
    for key in torch.unique(group):
        positive, negative = ((group == key) & (credit * sign > 0) for sign in (1, -1))
        count = min(int(positive.sum()), int(negative.sum()))
        winners.append(positive.nonzero()[:count, 0])
        losers.append(negative.nonzero()[:count, 0])
    return PreferencePairs(torch.cat(winners), torch.cat(losers))
