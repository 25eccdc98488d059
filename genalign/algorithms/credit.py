"""Credits: rules from the scores of a round to the credit of each sample (B,), or of each stored step (B, S)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from genalign.algorithms.advantages import Std, gdpo, group_advantages, stepwise_advantages
from genalign.algorithms.interfaces import RoundScores
from genalign.algorithms.preference_pairs import (
    Criterion,
    PreferencePairs,
    best_and_worst_pairs,
    greedy_swap,
    paired_halves,
)
from genalign.metrics.set_metric import with_quality
from genalign.scoring.score import combine
from genalign.types import SetReward


@dataclass(frozen=True)
class GroupRelative:
    """GRPO's advantages (B,): the weighted sum of the rewards, normalized within the group."""

    std: Std = "group"

    def __call__(self, scores: RoundScores) -> Tensor:
        return group_advantages(scores.combined, scores.group, std=self.std)


@dataclass(frozen=True)
class NormalizedSum:
    """GDPO's advantages (B,): each reward normalized within the group before they are summed."""

    def __call__(self, scores: RoundScores) -> Tensor:
        return gdpo(scores.scores, scores.group, scores.weights)


@dataclass(frozen=True)
class RewardGain:
    """DenseGRPO's advantages (B, S): each step's gain in the reward of the ODE completion, normalized in the group.

    A gain is the score after a step minus the score before it (arXiv 2601.20218, eq. 7).

    ``floor`` is the lower bound of the standard deviation of a step's gains, see ``advantages.stepwise_advantages``.
    """

    floor: float

    def __call__(self, scores: RoundScores) -> Tensor:
        if scores.stepwise is None:
            raise ValueError("RewardGain needs scores of every stored state: give the recipe a completion")
        samples, boundaries, rewards = scores.stepwise.shape
        combined = combine(scores.stepwise.reshape(-1, rewards), scores.weights).view(samples, boundaries)
        return stepwise_advantages(combined.diff(dim=1), scores.group, self.floor)


@dataclass(frozen=True)
class PlainReward:
    """Weighted sum (B,) of the rewards, not normalized."""

    def __call__(self, scores: RoundScores) -> Tensor:
        return scores.combined


@dataclass(frozen=True)
class BestAndWorst:
    """DRAGON's demonstrations for rewards of single samples, (B,): +1 for the best and -1 for the worst of a prompt.

    ``pairs`` samples of each prompt get +1 and as many -1; all others, and pairs whose rewards differ by no more than
    ``tolerance``, get 0.
    """

    tolerance: float = 0.0
    pairs: int = 1

    def __call__(self, scores: RoundScores) -> Tensor:
        pairs = best_and_worst_pairs(scores.combined, scores.group, self.tolerance, self.pairs)
        return pairs.signs(len(scores.group))


@dataclass(frozen=True)
class SetContrast:
    """DRAGON's demonstrations for rewards of whole sets, (B,): +1 for samples of the set D+, -1 for samples of D-.

    D+ and D- have the same prompts and swap members until their rewards differ, see ``preference_pairs.greedy_swap``.
    A pair with features that are not finite gets 0; with ``quality`` also a pair without a reward of its own.

    Attributes:
        reward: The reward of a set of features (n, d).
        criterion: The quantity that a swap must raise.
        quality: The weight of the samples' own rewards, see ``metrics.set_metric.with_quality``; 0 ignores them.
    """

    reward: SetReward
    criterion: Criterion = "plus"
    quality: float = 0.0

    def __call__(self, scores: RoundScores) -> Tensor:
        if scores.features is None:
            raise ValueError("SetContrast needs features of the samples: give the recipe a feature function")
        features = scores.features
        if features.ndim != 2:
            raise ValueError(f"the features of samples must be (samples, dimensions), not {tuple(features.shape)}")
        if self.quality:
            features = torch.cat([features, scores.combined.to(features)[:, None]], 1)
        first, second = paired_halves(scores.group)
        finite = features.isfinite().all(1)
        paired = finite[first] & finite[second]
        first, second = first[paired], second[paired]
        sets = features[first], features[second]
        reward = with_quality(self.reward, self.quality, *sets) if self.quality else self.reward
        swap = greedy_swap(*sets, reward, self.criterion).to(first.device)
        pairs = PreferencePairs(torch.where(swap, second, first), torch.where(swap, first, second))
        return pairs.signs(len(scores.group))
