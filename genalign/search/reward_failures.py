"""What the rewards of a search raised or returned, so a reward that never scores ends the search with its name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from genalign.scoring.score import NamedReward, RewardError, described
from genalign.types import Prompt, RewardFunction


class RewardFailures:
    """The outcome of the last call of each reward, by its name."""

    def __init__(self) -> None:
        self.last: dict[str, str] = {}

    def watched(self, rewards: Sequence[NamedReward]) -> list[NamedReward]:
        """Wrap rewards so that the outcome of every call is noted."""
        return [replace(reward, function=self._watched(reward)) for reward in rewards]

    def _watched(self, reward: NamedReward) -> RewardFunction:
        def call(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
            self.last[reward.name] = f"did not answer within {reward.timeout} s"  # until it does
            try:
                scores = reward.function(samples, prompts)
            except Exception as error:
                self.last[reward.name] = f"raised {described(error)}"
                raise
            self.last[reward.name] = "returned NaN or infinite scores"
            return scores

        return call

    def require_scores(self, rewards: Sequence[NamedReward], scores: Tensor, scored: str) -> None:
        """Raise RewardError if all of a reward's ``scores`` (N, K) failed, with what it raised and where.

        ``scored`` describes the samples in the message.
        """
        for reward, column in zip(rewards, scores.unbind(1), strict=True):
            if not bool(column.isfinite().any()):
                outcome = self.last.get(reward.name, "returned NaN or infinite scores")
                raise RewardError(
                    f"reward {reward.name!r} scored none of {scored}: it {outcome}; check it separately with: genalign"
                    " reward check"
                )
