"""The objective of the matching family: losses on the errors of final samples that are noised to random levels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from genalign.algorithms.interfaces import Unit, UpdateBatch, UpdateContext
from genalign.algorithms.losses import mean_square, require_per_sample
from genalign.diffusion.noise import derived_seed, seeded_noise
from genalign.types import NoiseLevel, Path


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
        old: The sampling policy's prediction. Without a lag of the recipe this is the current policy's, detached.
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
        """Select the samples of the indices ``rows`` (N,) long."""
        level = NoiseLevel(self.level.timestep[rows], self.level.alpha[rows], self.level.sigma[rows])
        parts = (self.target, self.prediction, self.reference, self.old)
        return NoisedSamples(self.path, self.x0[rows], self.x[rows], level, *(part[rows] for part in parts))

    def clean(self, prediction: Tensor) -> Tensor:
        """Convert a prediction to the clean samples (N, ...) that it implies."""
        return self.path.x0(self.x, prediction, self.level)

    @property
    def error(self) -> Tensor:
        """Mean squared error (N,) of the current policy."""
        return mean_square(self.prediction, self.target)


class MatchingLoss(Protocol):
    """The terms (N,) of a mean over an update, from noised samples, their credit (B,) and prompt index (B,)."""

    @property
    def unit(self) -> Unit:
        """The samples that the loss ties together."""

    def used(self, credit: Tensor) -> Tensor:
        """Mask (B,) bool of the samples that are part of the loss."""

    def terms(self, credit: Tensor, group: Tensor) -> int:
        """Count the N terms, from the credit and the prompt index alone."""

    def __call__(self, noised: NoisedSamples, credit: Tensor, group: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class MatchingObjective:
    """The mean of a matching loss over its terms and over several noise levels.

    The noise levels of an update are stratified over [low, high], as fractions of the path's range. All samples of a
    prompt share the level and the noise of a draw, so that they are compared under equal conditions. The network
    predicts without guidance, as when it is trained.

    Attributes:
        loss: The loss of noised samples.
        draws: The number of noise levels per sample and update.
        low: The lower end of the noise levels.
        high: The upper end of the noise levels.
        anchor: The weight of the mean squared distance from the reference policy's prediction, added to the loss.
        old: Whether the loss needs the predictions of a lagging sampling policy, which the recipe's ``lag`` keeps.
    """

    clip_range: ClassVar[float | None] = None
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

    def with_stronger_kl(self, minimum: float) -> MatchingObjective:
        return replace(self, anchor=max(2 * self.anchor, minimum))

    def terms(self, batch: UpdateBatch) -> int:
        """Count the terms of the loss over all draws. Raises ValueError for credit per step."""
        require_per_sample(len(batch.group), credit=batch.credit)
        return self.draws * self.loss.terms(batch.credit, batch.group)

    def backward(self, context: UpdateContext, batch: UpdateBatch, scale: float, seed: int) -> None:
        """Noise and predict the samples of the loss, or all samples with an anchor, and accumulate their gradients.

        Args:
            context: The model, the sampler and the metrics.
            batch: B samples with credit.
            scale: The factor of the summed losses.
            seed: The seed of noise levels and noises.
        """
        used = self.loss.used(batch.credit)
        rows = (used | bool(self.anchor)).nonzero()[:, 0]
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

    def _noised(
        self, context: UpdateContext, batch: UpdateBatch, rows: Tensor, draws: range, seed: int
    ) -> NoisedSamples:
        """Noise and predict the samples ``rows`` (N,) in each of the draws, in this order: (draws * N, ...)."""
        drawn = [(draw, derived_seed(seed, draw, group)) for draw in draws for group in batch.group[rows].tolist()]
        rows = rows.repeat(len(draws))
        x0 = batch.rollout.final[rows]
        # A draw's stratum is [draw, draw + 1) / draws; a group's seed gives its place there.
        place = torch.tensor([draw + seed / 2**63 for draw, seed in drawn], dtype=torch.float64)
        u = self.low + (self.high - self.low) * place / self.draws
        level = context.pipeline.level(u.to(x0.device))
        eps = seeded_noise([seed for _, seed in drawn], x0)
        path = context.pipeline.path
        x, target = path.add_noise(x0, eps, level), path.prediction(x0, eps, level)
        conditioning = batch.rollout.inputs.conditioning[batch.rollout.inputs.prompt[rows]]

        def predict() -> Tensor:
            return context.pipeline.predict(x, level, conditioning, 1.0)

        with torch.no_grad(), context.policy.reference():
            reference = predict()
        old = None
        if self.old:
            if context.old is None:
                raise ValueError("this objective needs the lagging sampling weights: give the recipe a lag")
            with torch.no_grad(), context.policy.using(context.old):
                old = predict()
        prediction = predict()
        old = prediction.detach() if old is None else old
        return NoisedSamples(path, x0, x, level, target, prediction, reference, old)
