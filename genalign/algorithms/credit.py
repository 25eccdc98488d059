"""Credit: from a round's outcome to what each sample, or each of its steps, is worth to the objective."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from genalign.algorithms.advantages import gdpo, group_advantages, step_gains, stepwise_advantages
from genalign.algorithms.interfaces import RoundScores
from genalign.algorithms.preference_pairs import (
    Criterion,
    PreferencePairs,
    best_and_worst_pairs,
    greedy_swap,
    paired_halves,
)
from genalign.metrics.set_metric import with_quality
from genalign.scoring.combine import combine
from genalign.types import SetReward


@dataclass(frozen=True)
class GroupRelative:
    """The weighted sum of the rewards, normalised within the group: GRPO's advantages (B,)."""

    std: Literal["group", "global"] = "group"

    def __call__(self, outcome: RoundScores) -> Tensor:
        return group_advantages(outcome.combined, outcome.group, std=self.std)


@dataclass(frozen=True)
class NormalizedSum:
    """Each reward normalised within the group before they are summed: GDPO's advantages (B,)."""

    def __call__(self, outcome: RoundScores) -> Tensor:
        return gdpo(outcome.scores, outcome.group, outcome.weights)


@dataclass(frozen=True)
class RewardGain:
    """What each step added to the reward of the ODE completion, normalised within the group at each step: DenseGRPO's
    advantages (B, S). ``floor`` is the least standard deviation of a step's gains, in units of the rewards' own."""

    floor: float

    def __call__(self, outcome: RoundScores) -> Tensor:
        if outcome.stepwise is None:
            raise ValueError("step-wise gains need scores of completions: give the recipe a completion")
        samples, boundaries, rewards = outcome.stepwise.shape
        combined = combine(outcome.stepwise.reshape(-1, rewards), outcome.weights).view(samples, boundaries)
        return stepwise_advantages(step_gains(combined), outcome.group, self.floor)


@dataclass(frozen=True)
class PlainReward:
    """The weighted sum of the rewards as it is (B,)."""

    def __call__(self, outcome: RoundScores) -> Tensor:
        return outcome.combined


@dataclass(frozen=True)
class BestAndWorst:
    """+1 for the best and -1 for the worst sample of each prompt, ``pairs`` of them, 0 for the others (B,): DRAGON's
    demonstrations for rewards of single samples. A pair that differs by no more than ``tolerance`` gets 0."""

    tolerance: float = 0.0
    pairs: int = 1

    def __call__(self, outcome: RoundScores) -> Tensor:
        return signs(
            best_and_worst_pairs(outcome.combined, outcome.group, self.tolerance, self.pairs), len(outcome.group)
        )


@dataclass(frozen=True)
class SetContrast:
    """+1 for the samples of the set D+ and -1 for those of D- (B,), two sets with the same prompts that exchange
    members until ``reward`` tells them apart best: DRAGON's demonstrations for rewards of whole sets.

    ``quality`` > 0 adds that much of the samples' own rewards, each of the two in units of what the choice of samples
    can change. A pair with a sample that is not finite, or has no reward of its own where that counts, gets 0.
    """

    reward: SetReward
    criterion: Criterion = "plus"
    passes: int = 1
    quality: float = 0.0

    def __call__(self, outcome: RoundScores) -> Tensor:
        if outcome.features is None:
            raise ValueError("a set reward needs features of the samples: give the recipe a feature function")
        features = outcome.features
        if self.quality:
            features = torch.cat([features, outcome.combined.to(features)[:, None]], 1)
        halves = paired_halves(outcome.group).where(features.isfinite().all(1))
        first, second = features[halves.first], features[halves.second]
        reward = with_quality(self.reward, self.quality, first, second) if self.quality else self.reward
        split = greedy_swap(first, second, reward, self.criterion, self.passes)
        return signs(split.demonstrations(halves), len(outcome.group))


def signs(demonstrations: PreferencePairs, samples: int) -> Tensor:
    """+1 for winners, -1 for losers and 0 for the rest, (samples,) float32."""
    credit = torch.zeros(samples)
    credit[demonstrations.winners] = 1.0
    credit[demonstrations.losers] = -1.0
    return credit
