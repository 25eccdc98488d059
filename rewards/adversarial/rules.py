"""When a reward learns: rules on how it does against the generator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Standing:
    """How the reward does against the generator before an update, over all ranks.

    ``generated`` and ``reference`` are mean scores, ``round`` counts updates so far, and ``training`` tells whether the
    last one changed the weights (True at first).
    """

    round: int
    generated: float
    reference: float
    accuracy: float
    loss: float
    training: bool

    @property
    def gap(self) -> float:
        """How far generated samples are ahead of the references."""
        return self.generated - self.reference


class UpdateRule(Protocol):
    """Whether to train in this round."""

    def __call__(self, standing: Standing) -> bool: ...


@dataclass(frozen=True)
class Overtake:
    """Train only when generated samples outscore the references by more than ``margin`` (Adv-GRPO, eq. 7)."""

    margin: float = 0.0

    def __call__(self, standing: Standing) -> bool:
        return standing.gap > self.margin


@dataclass(frozen=True)
class Ratio:
    """Of every ``discriminator`` + ``generator`` rounds, train in the first ``discriminator``; (1, 0) is always.

    In the other rounds only the generator learns. Whether it rests in the first ones is for its own loop to say.
    """

    discriminator: int = 1
    generator: int = 0

    def __post_init__(self) -> None:
        if self.discriminator < 1 or self.generator < 0:
            raise ValueError(
                f"a ratio of {self.discriminator} to {self.generator} rounds is not possible: discriminator must be at"
                " least 1 and generator at least 0"
            )

    def __call__(self, standing: Standing) -> bool:
        return standing.round % (self.discriminator + self.generator) < self.discriminator


@dataclass(frozen=True)
class AccuracyBand:
    """Stop training once the accuracy reaches ``high``, start again when it has fallen below ``low``."""

    low: float = 0.6
    high: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high <= 1:
            raise ValueError(f"the band must satisfy 0 <= low <= high <= 1, not low {self.low}, high {self.high}")

    def __call__(self, standing: Standing) -> bool:
        return standing.accuracy < (self.high if standing.training else self.low)
