"""Rules for the rounds in which a discriminator is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class DiscriminatorStatus:
    """Metrics of the discriminator against the generator before an update, over all ranks.

    ``generated`` and ``reference`` are mean scores, ``round`` counts updates so far, and ``training`` says whether the
    last one changed the weights (True at first). ``gradient_norm`` is the mean norm that a gradient penalty bounds.
    """

    round: int
    generated: float
    reference: float
    accuracy: float
    loss: float
    training: bool
    gradient_norm: float | None = None

    @property
    def gap(self) -> float:
        """The mean score of generated samples minus the mean score of references."""
        return self.generated - self.reference


class UpdateRule(Protocol):
    """Decides whether to train the discriminator in this round."""

    def __call__(self, status: DiscriminatorStatus) -> bool: ...


@dataclass(frozen=True)
class Overtake:
    """Train only when generated samples outscore the references by more than ``margin`` (Adv-GRPO, eq. 7)."""

    margin: float = 0.0

    def __call__(self, status: DiscriminatorStatus) -> bool:
        return status.gap > self.margin


@dataclass(frozen=True)
class Ratio:
    """Of every ``discriminator`` + ``generator`` rounds, train in the first ``discriminator``; (1, 0) is always.

    The generator learns in every round.
    """

    discriminator: int = 1
    generator: int = 0

    def __post_init__(self) -> None:
        if self.discriminator < 1 or self.generator < 0:
            raise ValueError(f"discriminator must be at least 1 round and generator at least 0, not {self}")

    def __call__(self, status: DiscriminatorStatus) -> bool:
        return status.round % (self.discriminator + self.generator) < self.discriminator


@dataclass(frozen=True)
class AccuracyBand:
    """Stop training once the accuracy reaches ``high``, resume when it falls below ``low``."""

    low: float = 0.6
    high: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high <= 1:
            raise ValueError(f"the band must satisfy 0 <= low <= high <= 1, not low {self.low}, high {self.high}")

    def __call__(self, status: DiscriminatorStatus) -> bool:
        return status.accuracy < (self.high if status.training else self.low)
