"""A trust region: a learning rate that moves the policy by a set distance in every round, whatever rate it began with.

The distance is the objective's own (``interfaces.MeasuresDistance``), measured on a few samples of the round. An update
that moves the policy too far is shortened, or taken back.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from genalign.algorithms.interfaces import MeasuresDistance, Objective
from genalign.diffusion.policy import Policy, WeightSnapshot

logger = logging.getLogger(__name__)
_TRIES = 4  # of shortening an update
_EXCESS = 2.0  # the largest distance as a multiple of the target
_CHANGE = 4.0  # the largest factor between the rates of two rounds


@dataclass(frozen=True)
class TrustRegion:
    """How far a round moves the policy.

    Args:
        target: Distance between the policies before and after a round; null takes the recipe's own. For recipes that
            train stored steps it is the Kullback-Leibler divergence of a step in nats, for recipes that train on final
            samples the mean squared difference of predictions.
        initial_rate: Learning rate of the first round.
        probe: Number of samples of a round on which the distance is measured.
    """

    target: float | None = None
    initial_rate: float = 3e-4
    probe: int = 32

    def __post_init__(self) -> None:
        for name in ("target", "initial_rate", "probe"):
            value = vars(self)[name]
            if value is not None and not value > 0:
                raise ValueError(f"training.trust_region.{name} must be positive, not {value}")


@dataclass
class RateController:
    """The learning rate of a run under a trust region.

    Attributes:
        target: The distance that a round should move the policy.
        rate: The learning rate of the next update, without the factor of a schedule.
    """

    target: float
    rate: float

    @classmethod
    def of(cls, settings: TrustRegion, objective: Objective) -> Self:
        """Take the target from the settings, or from the objective. Raises ValueError if it measures no distance."""
        if not isinstance(objective, MeasuresDistance):
            raise ValueError(
                f"training.learning_rate auto needs to know how far an update moves the policy, which"
                f" {type(objective).__name__} does not measure: set training.learning_rate to a number"
            )
        target = objective.distance_target if settings.target is None else settings.target
        return cls(target, settings.initial_rate)


@dataclass
class RoundLimit:
    """The trust region of one round.

    Attributes:
        rates: The learning rate of the run, which this round adapts.
        distance: Measures the distance of the current weights from those at the start of the round.
        share: The target of this round as a fraction of the run's.
        moved: The distance after the latest update.
    """

    rates: RateController
    distance: Callable[[], float]
    share: float
    moved: float = 0.0

    def shorten(self, policy: Policy, before: WeightSnapshot, done: float) -> None:
        """Shorten the latest update until the round stays near its target, or take it back.

        Args:
            policy: The policy after the update.
            before: Its weights before the update.
            done: The fraction of the round's updates that are made, this one included.
        """
        target = self.rates.target * self.share * done
        for _ in range(_TRIES):
            self.moved = self.distance()
            if self.moved <= _EXCESS * target:
                return
            fraction = math.sqrt(target / self.moved) if math.isfinite(self.moved) else 0.1
            policy.shorten_update(before, fraction)
            self.rates.rate *= fraction
        policy.shorten_update(before, 0.0)
        self.moved = self.distance()
        logger.info("An update was taken back: it moved the policy too far at each of %d lengths", _TRIES)

    def adapt_rate(self) -> None:
        """Set the learning rate of the next round from the distance of this one: it grows with the rate squared."""
        if self.moved > 0:
            factor = math.sqrt(self.rates.target * self.share / self.moved)
            self.rates.rate *= min(max(factor, 1 / _CHANGE), _CHANGE)
