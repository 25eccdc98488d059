"""The objective of the matching family: losses on the prediction errors of final samples noised to random levels.

An error is a mean squared difference of a network's prediction from its target, over all dimensions; N counts the
terms of a loss and B the samples of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from genalign.algorithms.interfaces import TermCounts, TermScales, Unit, UpdateBatch, UpdateContext
from genalign.algorithms.losses import mean_square, optimality, require_per_sample
from genalign.diffusion.noise import derived_seed, seeded_noise, seeded_uniform
from genalign.diffusion.policy import WeightSnapshot
from genalign.types import Conditioning, NoiseLevel, Path, Pipeline


@dataclass(frozen=True)
class NoisedSamples:
    """Final samples noised to random levels, and what three policies predict for them; all tensors are (N, ...).

    Attributes:
        path: The path that the network was trained on.
        x0: The samples.
        x: The noised samples alpha x0 + sigma eps.
        level: Their noise levels (N,).
        target: The network's training target.
        prediction: The current policy's prediction, with a gradient.
        reference: The reference policy's prediction.
        old: The prediction of the policy to compare with; without one, the current policy's, detached.
        memory: The prediction of the recipe's memory; None if not needed.
    """

    path: Path
    x0: Tensor
    x: Tensor
    level: NoiseLevel
    target: Tensor
    prediction: Tensor
    reference: Tensor
    old: Tensor
    memory: Tensor | None = None

    def where(self, rows: Tensor) -> NoisedSamples:
        """Select the samples of the indices ``rows`` (N,) long, on the CPU."""
        level = NoiseLevel(self.level.timestep[rows], self.level.alpha[rows], self.level.sigma[rows])
        rows = rows.to(self.x.device, non_blocking=True)
        memory = None if self.memory is None else self.memory[rows]
        target, prediction, reference, old = (
            part[rows] for part in (self.target, self.prediction, self.reference, self.old)
        )
        return NoisedSamples(self.path, self.x0[rows], self.x[rows], level, target, prediction, reference, old, memory)

    def on_device(self, tensor: Tensor) -> Tensor:
        """Move a tensor of the CPU to the device of the samples, without waiting for it."""
        return tensor.to(self.x.device, non_blocking=True)

    def clean(self, prediction: Tensor) -> Tensor:
        """Convert a prediction to the clean samples (N, ...) that it implies."""
        return self.path.x0(self.x, prediction, self.level)

    @property
    def error(self) -> Tensor:
        """Mean squared error (N,) of the current policy."""
        return mean_square(self.prediction, self.target)


@dataclass(frozen=True)
class Noising:
    """N samples ``x0``, noised to ``x`` at their levels, with the network's training target and their conditioning."""

    x0: Tensor
    x: Tensor
    level: NoiseLevel
    target: Tensor
    conditioning: Conditioning

    def predict(self, pipeline: Pipeline, guidance: float = 1.0) -> Tensor:
        """Predict with the current weights."""
        return pipeline.predict(self.x, self.level, self.conditioning, guidance)


def noised_samples(pipeline: Pipeline, batch: UpdateBatch, rows: Tensor, u: Tensor, seeds: Sequence[int]) -> Noising:
    """Noise final samples of a batch.

    Args:
        pipeline: The model.
        batch: B samples.
        rows: The samples (N,) to noise, on the CPU.
        u: The positions (N,) of their levels in the path's range, in [0, 1].
        seeds: The seeds (N) of their noises.
    """
    x0 = batch.rollout.final[rows.to(batch.rollout.final.device, non_blocking=True)]
    level, path, eps = pipeline.level(u), pipeline.path, seeded_noise(seeds, x0)
    conditioning = batch.rollout.inputs.conditioning[batch.rollout.inputs.prompt[rows]]
    return Noising(x0, path.add_noise(x0, eps, level), level, path.prediction(x0, eps, level), conditioning)


class MatchingLoss(Protocol):
    """The terms (N,) of a mean over an update, from noised samples, their credit (B,) and prompt index (B,).

    Credit and prompt index are on the CPU, where pairs are formed without waiting for the device of the samples.
    """

    @property
    def unit(self) -> Unit:
        """The samples that the loss ties together."""

    def used(self, credit: Tensor) -> Tensor:
        """Mask (B,) bool of the samples that are part of the loss."""

    def terms(self, credit: Tensor, group: Tensor) -> int:
        """Count the N terms, from only the credit and the prompt index."""

    def __call__(self, noised: NoisedSamples, credit: Tensor, group: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class MatchingObjective:
    """The mean of a matching loss over its terms and several noise levels, plus the mean distance of all samples.

    The noise levels of an update are stratified over [low, high], as fractions of the path's range. All samples of a
    prompt share the level and the noise of a draw, so they are compared under equal conditions. The network predicts
    without guidance, as in its pretraining.

    Attributes:
        loss: The loss of noised samples.
        draws: The number of noise levels per sample and update.
        low: The lower end of the noise levels.
        high: The upper end of the noise levels.
        anchor: The weight of the mean squared distance from the reference policy's prediction, a mean over all samples,
            which is added to the loss; 0 for none.
        old: The policy that the loss compares with: "sampling" for the lagging weights of the recipe's ``lag``,
            "memory" for those of its ``memory``; None for none.
        anchor_guidance: The guidance scale of the reference policy in the anchor; 1 is none.
        anchor_least: The weight of the anchor for a sample of the worst credit, in [0, 1], where a sample of the best
            credit has weight 1; None weighs all equally.
        trail: The weight of a second anchor, the distance from the recipe's ``memory``.
    """

    clip_range: ClassVar[float | None] = None
    loss: MatchingLoss
    draws: int = 2
    low: float = 0.02
    high: float = 0.98
    anchor: float = 0.0
    old: Literal["sampling", "memory"] | None = None
    anchor_guidance: float = 1.0
    anchor_least: float | None = None
    trail: float = 0.0

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise ValueError(f"draws must be at least 1 noise level per update, not {self.draws}")
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(f"low and high must be ascending fractions in [0, 1], not {self.low} and {self.high}")

    @property
    def unit(self) -> Unit:
        return self.loss.unit

    def with_stronger_kl(self, minimum: float) -> MatchingObjective:
        return replace(self, anchor=max(2 * self.anchor, minimum))

    def terms(self, batch: UpdateBatch) -> TermCounts:
        """Count the terms of the loss, and the samples, over all draws. Raises ValueError for credit per step."""
        require_per_sample(len(batch.group), credit=batch.credit)
        return TermCounts(self.draws * self.loss.terms(batch.credit, batch.group), self.draws * len(batch))

    def backward(self, context: UpdateContext, batch: UpdateBatch, scales: TermScales, seed: int) -> None:
        """Noise and predict the samples of the loss, or all samples with an anchor, and accumulate their gradients.

        Args:
            context: The model, the sampler and the metrics.
            batch: B samples with credit.
            scales: The factors of the summed losses and distances.
            seed: The seed of noise levels and noises.
        """
        used = self.loss.used(batch.credit)
        rows = (used | bool(self.anchor or self.trail)).nonzero()[:, 0]
        if not len(rows) and context.policy.sharded:
            # All ranks run a sharded network together: run it as often as a rank with samples does.
            for draw in range(self.draws):
                noised = self._noised(context, batch, torch.zeros(1, dtype=torch.long), range(draw, draw + 1), seed)
                torch.autograd.backward(0.0 * noised.prediction.sum())
        group, in_loss = batch.group[rows], used[rows].nonzero()[:, 0]
        # Predict several draws at once where few samples are used: small batches cost more per sample.
        together = 1 if context.policy.sharded else len(batch) // max(1, len(rows))
        for first in range(0, self.draws if len(rows) else 0, together):
            draws = range(first, min(first + together, self.draws))
            noised = self._noised(context, batch, rows, draws, seed)
            distance = mean_square(noised.prediction, noised.reference)
            context.metrics.add("kl", distance)
            weights = torch.ones(len(rows))
            if self.anchor_least is not None:  # the better a sample, the more its distance counts
                weights = self.anchor_least + (1 - self.anchor_least) * optimality(batch.credit[rows])
            weights = noised.on_device(weights.repeat(len(draws)))
            total = self.anchor * scales.distances * (weights * distance).sum()
            if self.trail:
                assert noised.memory is not None, "an objective with a trail predicts with the memory"
                trailing = mean_square(noised.prediction, noised.memory)
                context.metrics.add("trail", trailing)
                total = total + self.trail * scales.distances * trailing.sum()
            for place in range(len(draws)):
                part = noised.where(place * len(rows) + in_loss)
                losses = self.loss(part, batch.credit[rows[in_loss]], group[in_loss])
                context.metrics.add("loss", losses)
                total = total + scales.losses * losses.sum()
            torch.autograd.backward(total)

    def _noised(
        self, context: UpdateContext, batch: UpdateBatch, rows: Tensor, draws: range, seed: int
    ) -> NoisedSamples:
        """Noise and predict the samples ``rows`` (N,) in each of the draws, in this order: (draws * N, ...)."""
        noising = self._noising(context, batch, rows.repeat(len(draws)), [d for d in draws for _ in rows], seed)
        with torch.no_grad(), context.policy.reference():
            reference = noising.predict(context.pipeline, self.anchor_guidance)
        needs_memory = self.old == "memory" or bool(self.trail)
        memory = self._earlier(context, context.memory, noising, "a memory") if needs_memory else None
        old = memory if self.old == "memory" else None
        if self.old == "sampling":
            old = self._earlier(context, context.old, noising, "a lag")
        prediction = noising.predict(context.pipeline)
        policies = prediction, reference, prediction.detach() if old is None else old, memory
        path = context.pipeline.path
        return NoisedSamples(path, noising.x0, noising.x, noising.level, noising.target, *policies)

    @staticmethod
    @torch.no_grad()
    def _earlier(context: UpdateContext, weights: WeightSnapshot | None, noising: Noising, name: str) -> Tensor:
        """Predict with earlier weights. Raises ValueError if the recipe has none."""
        if weights is None:
            raise ValueError(f"this objective compares with earlier weights: give the recipe {name}")
        with context.policy.using(weights):
            return noising.predict(context.pipeline)

    def _noising(
        self, context: UpdateContext, batch: UpdateBatch, rows: Tensor, draws: Sequence[int], seed: int
    ) -> Noising:
        """Noise the samples ``rows`` (N,) at the levels of their draws (N): both follow from draw and prompt."""
        seeds = [derived_seed(seed, draw, group) for draw, group in zip(draws, batch.group[rows].tolist(), strict=True)]
        # A draw's stratum is [draw, draw + 1) / draws; a group's seed gives its place there.
        place = torch.tensor(draws, dtype=torch.float64) + seeded_uniform(seeds)
        u = self.low + (self.high - self.low) * place / self.draws
        return noised_samples(context.pipeline, batch, rows, u, seeds)
