"""Credit of each sample, or of each of its steps, from the scores of a round."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from genalign.algorithms.advantages import gdpo, group_advantages, step_gains, stepwise_advantages
from genalign.algorithms.interfaces import RoundScores
from genalign.algorithms.preference_pairs import (
    Criterion,
    best_and_worst_pairs,
    greedy_swap,
    paired_halves,
)
from genalign.metrics.set_metric import with_quality
from genalign.scoring.combine import combine
from genalign.types import SetReward


@dataclass(frozen=True)
class GroupRelative:
    """The weighted sum of the rewards, normalized within the group: GRPO's advantages (B,)."""

    std: Literal["group", "global"] = "group"

    def __call__(self, scores: RoundScores) -> Tensor:
        return group_advantages(scores.combined, scores.group, std=self.std)


@dataclass(frozen=True)
class NormalizedSum:
    """Each reward normalized within the group before they are summed: GDPO's advantages (B,)."""

    def __call__(self, scores: RoundScores) -> Tensor:
        return gdpo(scores.scores, scores.group, scores.weights)


@dataclass(frozen=True)
class RewardGain:
    """Gains of each step in the reward of its ODE completion, normalized in the group: DenseGRPO's advantages (B, S).

    ``floor`` is the lower bound of the standard deviation of a step's gains, in units of that of the rewards.
    """

    floor: float

    def __call__(self, scores: RoundScores) -> Tensor:
        if scores.stepwise is None:
            raise ValueError("step-wise gains need scores of completions: give the recipe a completion")
        samples, boundaries, rewards = scores.stepwise.shape
        combined = combine(scores.stepwise.reshape(-1, rewards), scores.weights).view(samples, boundaries)
        return stepwise_advantages(step_gains(combined), scores.group, self.floor)


@dataclass(frozen=True)
class PlainReward:
    """The weighted sum of the rewards (B,), not normalized."""

    def __call__(self, scores: RoundScores) -> Tensor:
        return scores.combined


@dataclass(frozen=True)
class BestAndWorst:
    """+1 for the best and -1 for the worst sample of each prompt, ``pairs`` of them, 0 for the others (B,): DRAGON's
    demonstrations for rewards of single samples. A pair that differs by no more than ``tolerance`` gets 0.
    """

    tolerance: float = 0.0
    pairs: int = 1

    def __call__(self, scores: RoundScores) -> Tensor:
        pairs = best_and_worst_pairs(scores.combined, scores.group, self.tolerance, self.pairs)
        return pairs.signs(len(scores.group))


@dataclass(frozen=True)
class SetContrast:
    """+1 for the samples of the set D+ and -1 for those of D- (B,): DRAGON's demonstrations for rewards of whole sets.

    D+ and D- hold the same prompts and swap members until their ``reward`` differs most, see ``greedy_swap``.
    ``quality`` > 0 adds that much of the samples' own rewards, each of the two in units of the difference that swaps
    can make. A pair with a sample that is not finite, or has no reward of its own where ``quality`` counts, gets 0.
    """

    reward: SetReward
    criterion: Criterion = "plus"
    passes: int = 1
    quality: float = 0.0

    def __call__(self, scores: RoundScores) -> Tensor:
        if scores.features is None:
            raise ValueError("a set reward needs features of the samples: give the recipe a feature function")
        features = scores.features
        if self.quality:
            features = torch.cat([features, scores.combined.to(features)[:, None]], 1)
        halves = paired_halves(scores.group).where(features.isfinite().all(1))
        first, second = features[halves.first], features[halves.second]
        reward = with_quality(self.reward, self.quality, first, second) if self.quality else self.reward
        split = greedy_swap(first, second, reward, self.criterion, self.passes)
        return split.pairs(halves).signs(len(scores.group))
