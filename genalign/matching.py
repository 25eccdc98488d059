"""The matching family: objectives on forward-process errors of final samples at random noise levels."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from genalign.learning import Batch, Context
from genalign.noise import derived_seed, seeded_noise
from genalign.types import NoiseLevel


@dataclass(frozen=True)
class Noised:
    """Samples on their way to noise, x = alpha x0 + sigma eps, all (B, ...), with the network's ``target`` there.

    ``prediction`` is the current policy's and carries the gradient; ``reference`` and ``old`` are those of the policy
    that training started from and of the one that samples, where the loss asks for them.
    """

    x0: Tensor
    x: Tensor
    level: NoiseLevel
    target: Tensor
    prediction: Tensor
    reference: Tensor
    old: Tensor

    @property
    def error(self) -> Tensor:
        """The current policy's mean squared error (B,)."""
        return mean_square(self.prediction, self.target)

    @property
    def reference_error(self) -> Tensor:
        """The reference policy's."""
        return mean_square(self.reference, self.target)

    @property
    def old_error(self) -> Tensor:
        """The sampling policy's."""
        return mean_square(self.old, self.target)


class MatchingLoss(Protocol):
    """Terms (N,) of a mean over an update, from noised samples, their credit (B,) and prompt index (B,)."""

    def terms(self, credit: Tensor, group: Tensor) -> int:
        """N, from the credit alone."""

    def __call__(self, noised: Noised, credit: Tensor, group: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Matching:
    """A mean over samples, or pairs of them, and over ``draws`` noise levels of ``loss``, plus ``anchor`` times the
    mean squared distance of the prediction from the reference policy's.

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
    def clip_range(self) -> float | None:
        """None: there is no ratio of transitions."""
        return None

    def terms(self, batch: Batch) -> int:
        """Terms of the loss, for every draw."""
        return self.draws * self.loss.terms(batch.credit, batch.group)

    def backward(self, context: Context, batch: Batch, scale: float, seed: int) -> None:
        """Draw by draw."""
        for draw in range(self.draws):
            noised = self._noised(context, batch, draw, seed)
            device = noised.x.device
            losses = self.loss(noised, batch.credit.to(device), batch.group.to(device))
            distance = mean_square(noised.prediction, noised.reference)
            context.readings.add("loss", losses)
            context.readings.add("kl", distance)
            total = losses.sum() + self.anchor * distance.sum()
            (total * scale).backward()  # type: ignore[no-untyped-call]

    def _noised(self, context: Context, batch: Batch, draw: int, seed: int) -> Noised:
        x0 = batch.sampled.final
        seeds = [derived_seed(seed, draw, int(group)) for group in batch.group]
        level = context.pipeline.level(self._places(draw, seeds).to(x0.device))
        eps = seeded_noise(seeds, x0)
        path = context.pipeline.path
        x, target = path.add_noise(x0, eps, level), path.prediction(x0, eps, level)
        conditioning = batch.sampled.start.conditioning[batch.sampled.start.prompt]

        def predict() -> Tensor:
            context.bill(len(x))
            return context.pipeline.predict(x, level, conditioning, 1.0)

        with torch.no_grad(), context.policy.reference():
            reference = predict()
        with context.old_policy() if self.old else contextlib.nullcontext():
            old = predict().detach() if self.old else None
        prediction = predict()
        return Noised(x0, x, level, target, prediction, reference, prediction.detach() if old is None else old)

    def _places(self, draw: int, seeds: list[int]) -> Tensor:
        """Where on the path (B,): uniform in the draw's stratum, equal for equal seeds."""
        uniform = torch.tensor([seed / 2**63 for seed in seeds], dtype=torch.float64)
        return self.low + (self.high - self.low) * (draw + uniform) / self.draws


def mean_square(first: Tensor, second: Tensor) -> Tensor:
    """The mean squared difference (B,) over all dimensions but the first."""
    return (first - second).square().flatten(1).mean(1)
