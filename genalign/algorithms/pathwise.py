"""The pathwise family: backpropagates differentiable rewards through the decoder and the sampler into the weights.

A *tail* says where the sampler carries a gradient: it yields clean latents that depend on the weights. A *direction*
says where these latents are moved, such as along the gradient of the rewards.

N counts the clean latents of a tail, B the samples of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from genalign.algorithms.interfaces import (
    HasTraits,
    ObjectiveTraits,
    RoundScores,
    TermCounts,
    TermScales,
    Unit,
    UpdateBatch,
    UpdateContext,
)
from genalign.algorithms.losses import mean_square, require_per_sample
from genalign.algorithms.reward_gradient import LatentGradient, latent_gradient
from genalign.diffusion.noise import derived_seed
from genalign.types import Conditioning, NoiseLevel, Prompt


@dataclass(frozen=True)
class Prediction:
    """A call of the network with a gradient.

    Attributes:
        x: Its input (N, ...).
        level: Its level.
        conditioning: Its conditioning.
        output: Its output (N, ...).
        reference: The reference policy's output (N, ...); None if it was not computed.
    """

    x: Tensor
    level: NoiseLevel
    conditioning: Conditioning
    output: Tensor
    reference: Tensor | None = None


@dataclass(frozen=True)
class Endpoints:
    """Clean latents that depend on the weights.

    Attributes:
        x0: The latents (N, ...), with a gradient.
        rows: The sample (N,) long of each, on the CPU.
        weights: The weight (N,) of each, on the CPU; negative to move away from the direction. Over all endpoints of a
            sample the absolute values add up to 1.
        predictions: The calls of the network that carry the gradient.
    """

    x0: Tensor
    rows: Tensor
    weights: Tensor
    predictions: Sequence[Prediction]


class Tail(Protocol):
    """Where the sampler carries a gradient."""

    def __call__(self, context: UpdateContext, batch: UpdateBatch, rows: Tensor, seed: int) -> Iterator[Endpoints]:
        """Yield the endpoints of the samples ``rows`` (N,) one by one, so only one graph is in memory.

        Args:
            context: The model and the sampler.
            batch: B samples.
            rows: The samples to train, on the CPU.
            seed: The seed of all noise.
        """


class LatentDirection(Protocol):
    """Where clean latents are moved."""

    def __call__(
        self, context: UpdateContext, latents: Tensor, prompts: Sequence[Prompt], seeds: Sequence[int]
    ) -> Tensor:
        """Return the direction (N, ...) of latents (N, ...), and add metrics to ``context.metrics``.

        All noise is drawn from ``seeds`` (N), one for each sample.
        """


@dataclass(frozen=True)
class Ascent:
    """How samples follow the rewards' gradients, and what keeps the policy near the reference.

    Args:
        ceiling: The weighted sum of rewards above which a sample has no gradient (ImageReward's hinge, arXiv
            2304.05977); None for none.
        normalize_gradients: Whether every reward's gradient is scaled to length 1 at each decoded sample, so only the
            weights of the rewards set their influence (arXiv 2503.13070).
        limit: The largest norm of a sample's gradient at its latents; None for none.
        batch_size: The number of samples that are decoded and scored with a gradient at once; None for all.
        anchor: The weight of the mean squared distance of the tail's predictions from the reference policy's (DRaFT+).
        weight_distance: The weight of the squared distance of the weights from the reference policy's.
    """

    ceiling: float | None = None
    normalize_gradients: bool = False
    limit: float | None = None
    batch_size: int | None = None
    anchor: float = 0.0
    weight_distance: float = 0.0

    def __post_init__(self) -> None:
        if self.limit is not None and not self.limit > 0:
            raise ValueError(f"ascent.limit must be positive, not {self.limit}; null sets no limit")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"ascent.batch_size must be at least 1 sample, not {self.batch_size}; null takes all")
        if not self.anchor >= 0 or not self.weight_distance >= 0:
            raise ValueError(
                "ascent.anchor and ascent.weight_distance must be at least 0, not"
                f" {self.anchor} and {self.weight_distance}"
            )

    def __call__(
        self, context: UpdateContext, latents: Tensor, prompts: Sequence[Prompt], seeds: Sequence[int]
    ) -> Tensor:
        """Return the gradient (N, ...) of the weighted sum of the run's rewards at latents (N, ...)."""
        rewards, size = [reward for reward in context.rewards if reward.weight], self.batch_size or len(latents)
        parts = [
            latent_gradient(
                context.pipeline,
                rewards,
                part,
                prompts[i * size : (i + 1) * size],
                self.ceiling,
                self.normalize_gradients,
            )
            for i, part in enumerate(torch.split(latents, size))
        ]
        ascent = LatentGradient.joined(parts)
        gradient, length = ascent.gradient, ascent.gradient.flatten(1).norm(dim=1)
        columns = zip(rewards, ascent.scores.unbind(1), strict=True)
        total = sum((reward.weight * column for reward, column in columns), torch.zeros_like(length))
        context.metrics.add("loss", -total.nan_to_num())
        context.metrics.add("reward_gradient", length)
        # Images are clamped to [0, 1] and sound to [-1, 1]: values at the ends have no gradient.
        lowest = 0.0 if ascent.samples.ndim == 4 else -1.0
        clamped = (ascent.samples <= lowest) | (ascent.samples >= 1)
        context.metrics.add("saturated", clamped.float().flatten(1).mean(1))
        if self.limit is not None:
            factor = (self.limit / length.clamp(min=torch.finfo(length.dtype).tiny)).clamp(max=1)
            gradient = gradient * factor.view(-1, *[1] * (gradient.ndim - 1))
        return gradient


@dataclass(frozen=True)
class EqualCredit:
    """Credit 1 for every sample that could be scored: the training signal is the rewards' gradients."""

    takes_single_samples: ClassVar[bool] = True

    def __call__(self, scores: RoundScores) -> Tensor:
        return scores.combined.isfinite().float()


@dataclass(frozen=True)
class PathwiseObjective:
    """The mean over samples of -credit times the reward at their endpoints, by its exact gradient.

    Attributes:
        tail: Where the sampler carries a gradient.
        ascent: How the endpoints follow the rewards' gradients, and what keeps the policy near the reference.
        further: Other directions, which are added.
        toward: A direction that replaces the rewards' gradients; None takes these.
    """

    unit: ClassVar[Unit] = "sample"
    clip_range: ClassVar[float | None] = None
    tail: Tail
    ascent: Ascent = Ascent()
    further: Sequence[LatentDirection] = ()
    toward: LatentDirection | None = None

    @property
    def traits(self) -> ObjectiveTraits:
        own = self.toward.traits if isinstance(self.toward, HasTraits) else ObjectiveTraits()
        return replace(own, through_sampler=True, reward_gradients=self.toward is None or bool(self.further))

    def with_stronger_kl(self, minimum: float) -> PathwiseObjective:
        return replace(self, ascent=replace(self.ascent, anchor=max(2 * self.ascent.anchor, minimum)))

    def terms(self, batch: UpdateBatch) -> TermCounts:
        """Count the samples with credit. Raises ValueError for credit per step."""
        require_per_sample(len(batch.group), credit=batch.credit)
        count = int((batch.credit != 0).sum())
        return TermCounts(count, count)

    def backward(self, context: UpdateContext, batch: UpdateBatch, scales: TermScales, seed: int) -> None:
        """Run the tail for the samples with credit, and accumulate their gradients.

        Args:
            context: The model, the sampler, the rewards and the metrics.
            batch: B samples with credit (B,).
            scales: The factors of the summed losses and distances.
            seed: The seed of the tail's noise.
        """
        rows = batch.credit.nonzero()[:, 0]
        if not len(rows):
            return
        for ends in self.tail(context, batch, rows, seed):
            self._backward_from(context, batch, ends, scales, seed)
        if self.ascent.weight_distance:
            drift = context.policy.drift()
            context.metrics.add("drift", drift.reshape(1))
            torch.autograd.backward(self.ascent.weight_distance * scales.losses * len(rows) * drift)

    def _backward_from(
        self, context: UpdateContext, batch: UpdateBatch, ends: Endpoints, scales: TermScales, seed: int
    ) -> None:
        """Accumulate the gradients of endpoints, one part of each sample's."""
        latents = ends.x0.detach()
        prompts = [context.prompts[place] for place in batch.group[ends.rows].tolist()]
        own = batch.rollout.inputs.noise_seeds
        seeds = [derived_seed(seed, "direction", own[row]) for row in ends.rows.tolist()]
        total = torch.zeros_like(latents)
        for direction in (self.toward or self.ascent, *self.further):
            total += direction(context, latents, prompts, seeds)
        shape = (-1, *[1] * (latents.ndim - 1))
        counted = (scales.losses * ends.weights * batch.credit[ends.rows]).to(latents.dtype)
        cotangent = -counted.to(latents.device, non_blocking=True).view(shape) * total
        tensors, gradients = [ends.x0], [cotangent]
        if self.ascent.anchor or not context.metrics.measures("kl"):  # logged of one part of a round at least
            distance = self._distance(context, ends)
            context.metrics.add("kl", distance)
        if self.ascent.anchor:
            shares = ends.weights.abs().to(distance.device, distance.dtype, non_blocking=True)
            tensors.append((shares * distance).sum())
            gradients.append(torch.full_like(tensors[-1], self.ascent.anchor * scales.distances))
        torch.autograd.backward(tensors, gradients)

    @staticmethod
    def _distance(context: UpdateContext, ends: Endpoints) -> Tensor:
        """The mean squared distance (N,) of the predictions from the reference policy's, a mean over the calls."""
        distances = []
        for call in ends.predictions:
            reference, inputs = call.reference, (call.x.detach(), call.level, call.conditioning)
            if reference is None:
                with torch.no_grad(), context.policy.reference():
                    reference = context.pipeline.predict(*inputs, context.guidance)
            distances.append(mean_square(call.output, reference))
        return torch.stack(distances).mean(0)
