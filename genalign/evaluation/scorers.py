"""Scorers of an evaluation: rewards, verifiers and judges behind one interface, which may explain their scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import Tensor

from genalign.scoring.score import NamedReward, RewardError, described, score
from genalign.types import Prompt


@dataclass(frozen=True)
class ExplainedScores:
    """Scores (B,) of a batch, and for each sample what its score rests on, as JSON types, such as a judge's answers."""

    scores: Tensor
    details: Sequence[Any]


RECOGNIZED = "recognized"
"""The key of a detail that is true where a verifier knows everything that it detects in the sample, right or wrong.

By it comparisons tell samples whose content was corrected from samples whose noise was removed (``paired``).
"""

Scorer = Callable[[Tensor, Sequence[Prompt]], Tensor | ExplainedScores]
"""A reward function, or one that also explains its scores."""


@dataclass(frozen=True)
class SampleScore:
    """The scores of one sample by name, NaN where it could not be scored, and details by the name of their scorer.

    Pages show the "reason" of a detail beside the sample.
    """

    scores: Mapping[str, float]
    details: Mapping[str, Any] = field(default_factory=dict)


class SampleScorer(Protocol):
    """Scores samples under one name or several; higher is better. Comparisons sort by the first name."""

    @property
    def score_names(self) -> tuple[str, ...]:
        """The names of the scores of every sample, in order."""

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Sequence[SampleScore]:
        """Score samples (B, ...) of one shape and medium, of B prompts."""


class RewardScorer:
    """Scores samples by rewards; one that fails gives NaN, as in training.

    Args:
        rewards: Functions or rewards by name.

    Raises:
        ValueError: There is no reward.
    """

    def __init__(self, rewards: Mapping[str, Scorer]) -> None:
        if not rewards:
            raise ValueError("an evaluation needs at least one reward")
        self._rewards = [self._watched(name, reward) for name, reward in rewards.items()]
        self._details: dict[str, list[Any]] = {}  # of the last batch
        self._failures: dict[str, str] = {}  # what rewards raised on the last batch
        self._working: set[str] = set()  # rewards that have scored a sample

    @property
    def score_names(self) -> tuple[str, ...]:
        return tuple(reward.name for reward in self._rewards)

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> list[SampleScore]:
        """Score samples (B, ...).

        Raises RewardError for a result that is not (B,), and for a reward that raised on all samples and has scored
        none before: that is a bug and no sample's fault.
        """
        self._details.clear()
        self._failures.clear()
        scores_BK = score(self._rewards, samples, prompts)
        for name, column in zip(self.score_names, scores_BK.unbind(1), strict=True):
            if bool(column.isfinite().any()):
                self._working.add(name)
            elif name in self._failures and name not in self._working:
                raise RewardError(
                    f"reward {name!r} failed on all {len(samples)} samples of a batch, which are not saved as scored:"
                    f" {self._failures[name]}. Correct it, and start the command again"
                )
        explained = {name: items for name, items in self._details.items() if len(items) == len(samples)}
        return [
            SampleScore(
                dict(zip(self.score_names, row, strict=True)), {name: items[i] for name, items in explained.items()}
            )
            for i, row in enumerate(scores_BK.tolist())
        ]

    def _watched(self, name: str, reward: Scorer) -> NamedReward:
        """Wrap a reward so that its details, and what it raised, are known once it has returned scores or NaN."""
        named = reward if isinstance(reward, NamedReward) else None
        function: Scorer = named.function if named else reward

        def watched(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
            try:
                result = function(samples, prompts)
            except Exception as error:
                self._failures[name] = described(error)
                raise
            if isinstance(result, ExplainedScores):
                self._details.setdefault(name, []).extend(result.details)
                return result.scores
            return result

        return replace(named, name=name, function=watched) if named else NamedReward(name, watched)


@dataclass(frozen=True)
class JoinedScorer:
    """Several scorers as one; the first one's scores come first. Raises ValueError for a name that two of them have."""

    scorers: Sequence[SampleScorer]

    def __post_init__(self) -> None:
        names = self.score_names
        if repeated := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"two scores are named {repeated[0]!r}: give the reward another name")

    @property
    def score_names(self) -> tuple[str, ...]:
        return tuple(name for scorer in self.scorers for name in scorer.score_names)

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> list[SampleScore]:
        """Score samples (B, ...) by every scorer."""
        columns = [scorer(samples, prompts) for scorer in self.scorers]
        return [
            SampleScore(
                {name: value for part in row for name, value in part.scores.items()},
                {name: value for part in row for name, value in part.details.items()},
            )
            for row in zip(*columns, strict=True)
        ]
