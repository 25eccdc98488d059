"""A trust region: a learning rate that moves the policy by a set distance in every round, whatever the initial rate.

The distance is the mean squared change of predictions on a few samples of the round, noised to random levels. It means
the same for every recipe, sampler and step, unlike the KL divergence of a sampling step, which is divided by the noise
of that step. An update that moves the policy too far is shortened or undone.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from genalign.algorithms.interfaces import UpdateBatch, UpdateContext
from genalign.algorithms.losses import mean_square
from genalign.algorithms.matching import noised_samples
from genalign.diffusion.noise import derived_seed, seeded_uniform
from genalign.diffusion.policy import Policy, WeightSnapshot

logger = logging.getLogger(__name__)
_TRIES = 4  # of shortening an update
_EXCESS = 2.0  # the largest distance as a multiple of the target
_CHANGE = 4.0  # the largest factor between the rates of two rounds
_MEASURABLE = 0.25  # the smallest share of the target that is steered to: rounding in bfloat16 alone is a tenth of it


@dataclass(frozen=True)
class TrustRegion:
    """How far a round moves the policy.

    Args:
        target: Mean squared change of the network's predictions in a round.
        initial_rate: Learning rate of the first round.
        probe: Number of samples of a round on which the distance is measured.
    """

    target: float = 1e-3
    initial_rate: float = 3e-4
    probe: int = 32

    def __post_init__(self) -> None:
        for name in ("target", "initial_rate", "probe"):
            if not vars(self)[name] > 0:
                raise ValueError(f"training.trust_region.{name} must be positive, not {vars(self)[name]}")


@dataclass
class RateController:
    """The learning rate of a run under a trust region.

    Attributes:
        target: The distance that a round should move the policy.
        rate: The learning rate of the next update, without the factor of a schedule.
    """

    target: float
    rate: float


@dataclass
class RoundLimit:
    """The trust region of one round.

    Attributes:
        rates: The learning rate of the run, which this round adapts.
        distance: Measures the distance of the current weights from those at the start of the round.
        share: The target of this round as a fraction of the run's, which falls with the schedule. Below a quarter the
            rate follows only the schedule: in bfloat16 the distance of so small an update is mostly rounding.
        moved: The distance after the latest update.
    """

    rates: RateController
    distance: Callable[[], float]
    share: float
    moved: float = 0.0

    def shorten(self, policy: Policy, before: WeightSnapshot, done: float) -> None:
        """Shorten the latest update until the round stays near its target, or undo it.

        Args:
            policy: The policy after the update.
            before: Its weights before the update.
            done: The fraction of the round's updates so far, including this one.
        """
        target = self.rates.target * max(self.share, _MEASURABLE) * done
        for _ in range(_TRIES):
            self.moved = self.distance()
            if self.moved <= _EXCESS * target:
                return
            fraction = math.sqrt(target / self.moved) if math.isfinite(self.moved) else 0.1
            policy.shorten_update(before, fraction)
            self.rates.rate *= fraction
        policy.shorten_update(before, 0.0)
        self.moved = self.distance()
        logger.info("An update was undone: it moved the policy too far at each of %d lengths", _TRIES)

    def adapt_rate(self) -> None:
        """Set the learning rate of the next round from the distance of this one: it grows with the rate squared."""
        if self.moved > 0 and self.share >= _MEASURABLE:
            factor = math.sqrt(self.rates.target * self.share / self.moved)
            self.rates.rate *= min(max(factor, 1 / _CHANGE), _CHANGE)


def change_of_predictions(context: UpdateContext, batch: UpdateBatch, seed: int) -> Callable[[], Tensor]:
    """Predict each sample at one random noise level; return a function of the mean squared change (B,) since then.

    A noise hypernetwork is measured at the first level, the only one where its adapter is on.

    Args:
        context: The model, the sampler and the policy.
        batch: B samples.
        seed: The seed of levels and noises.
    """
    pipeline, inputs = context.pipeline, batch.rollout.inputs
    seeds = [derived_seed(seed, own) for own in inputs.noise_seeds]
    noised = noised_samples(pipeline, batch, torch.arange(len(batch)), seeded_uniform(seeds), seeds)

    @torch.no_grad()
    def predictions() -> Tensor:
        if not context.policy.shifts_noise:
            return noised.predict(pipeline)
        noise, conditioning = pipeline.initial_noise(inputs.noise_seeds), inputs.conditioning[inputs.prompt]
        with context.policy.trained_prediction():
            return pipeline.predict(noise, context.grid[0], conditioning, context.guidance)

    before = predictions()
    return lambda: mean_square(predictions(), before)
