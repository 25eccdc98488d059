"""The seam between a strategy that only selects among scored particles, and a loop that it does not drive.

``pipelines.steer`` runs any strategy with a ``stepwise`` method in a diffusers pipeline of the user's own. N particles
of P prompts, T steps, K rewards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from genalign.diffusion.transitions import Kernel
from genalign.scoring.score import combine
from genalign.search.ranking import best_per_prompt
from genalign.search.strategy import StandaloneScorer


@dataclass(frozen=True)
class StepwiseCall:
    """One call of a pipeline, which samples all particles side by side.

    ``prompt`` (N,) long is the index of each particle's prompt, ascending; ``steps`` is T; ``reward_weights`` (K,) are
    the weights of the rewards in their sum.
    """

    prompt: Tensor
    steps: int
    seed: int | str
    reward_weights: tuple[float, ...]

    def weighted_sum(self, scores: Tensor) -> Tensor:
        """Combine the scores (N, K) of several rewards into one figure (N,)."""
        return combine(scores, self.reward_weights)


class Selection:
    """The choices of a strategy during one call.

    This one keeps every particle and returns the best sample of each prompt; subclasses override what they decide.
    """

    def __init__(self, call: StepwiseCall) -> None:
        self.call = call

    def select(self, step: int, scores: Tensor) -> Tensor | None:
        """Choose which particles go on after ``step``, from the scores (N, K) of their previews, NaN where one failed.

        Returns (N,) long, the particle that each place continues from, of the same prompt; None keeps all in place.
        """
        return None

    def choose(self, scores: Tensor) -> Tensor:
        """Choose the sample (P,) long that each prompt returns, from the scores (N, K) of the finished samples."""
        return best_per_prompt(scores, self.call.prompt, 1, self.call.reward_weights)


@dataclass(frozen=True)
class Stepwise:
    """What a strategy asks of a pipeline that is not a genalign pipeline.

    Attributes:
        particles: The number of particles of each prompt; None takes as many as the call makes.
        kernel: The transition that replaces the scheduler's moves; None keeps them.
        scoring_steps: The steps, counted from 0, whose previews are scored for ``Selection.select``, given T; None for
            a strategy that scores finished samples alone. The last step is always scored, for ``Selection.choose``.
        selection: Makes the choices of one call.
        scorer: Scores the previews in place of the rewards, such as a noise-aware reward.
    """

    particles: int | None = None
    kernel: Kernel | None = None
    scoring_steps: Callable[[int], Sequence[int]] | None = None
    selection: Callable[[StepwiseCall], Selection] = Selection
    scorer: StandaloneScorer | None = None


@runtime_checkable
class StepwiseStrategy(Protocol):
    """A strategy that can run in a pipeline of the user's own."""

    def stepwise(self) -> Stepwise:
        """Describe the strategy. Raises ValueError for settings that need more than the scores of previews."""
