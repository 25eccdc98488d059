"""Credits: rules from the scores of a round to the credit of each sample (B,); ``step_credit`` has those of steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from genalign.algorithms.advantages import (
    Std,
    UnsuitableScoresError,
    best_of_n,
    beta_normalized,
    difficulty_weights,
    gaussian_ranks,
    gdpo,
    global_std,
    group_advantages,
    group_spread,
    leave_one_out,
    ngrpo,
    task_normalized,
)
from genalign.algorithms.interfaces import RoundScores
from genalign.algorithms.preference_pairs import (
    Criterion,
    PreferencePairs,
    best_and_worst_pairs,
    greedy_swap,
    paired_halves,
)
from genalign.metrics.set_metric import with_quality
from genalign.types import AnyCallable, SetReward


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
class LeaveOneOut:
    """RLOO's advantages (B,) times ``scale``, clipped to +-5: the weighted sum minus the mean of the group's others.

    They are not divided by a standard deviation, which would undo a reward that is bounded or saturates, such as a
    sigmoid, a ceiling or a log-sigmoid: where all samples of a group are near the bound, their advantages fade.
    """

    scale: float = 1.0

    def __call__(self, scores: RoundScores) -> Tensor:
        return (self.scale * leave_one_out(scores.combined, scores.group)).clamp(-5.0, 5.0)


@dataclass(frozen=True)
class BestOfNCredit:
    """Credit (B,) for the best of ``n`` samples, for a model whose samples will be searched by ``search.BestOfN``.

    It is the expected amount by which a sample's weighted sum beats the best of n - 1 others of its group, over the
    standard deviation of all scores of the round, and clipped to 5, see ``advantages.best_of_n``. No sample gets
    negative credit.
    """

    n: int = 4

    def __call__(self, scores: RoundScores) -> Tensor:
        largest = int(torch.unique(scores.group, return_counts=True)[1].max())
        if largest < self.n:
            raise UnsuitableScoresError(
                f"BestOfNCredit needs groups of {self.n} or more, not of {largest}: lower n, or raise group_size"
            )
        std = global_std(scores.combined) + 1e-4
        return (best_of_n(scores.combined, scores.group, self.n) / std).clamp(max=5.0).float()


@dataclass(frozen=True)
class BetaNormalized:
    """BNPO's advantages (B,) of each reward, times its weight, summed: see ``advantages.beta_normalized``.

    Made for rewards of 0 and 1: the less usual the success rate of a group in the round, the more the group counts.
    ``low`` and ``high`` are the range of every reward. A missing score adds nothing.
    """

    low: float = 0.0
    high: float = 1.0

    def __call__(self, scores: RoundScores) -> Tensor:
        total = torch.zeros(len(scores.group))
        for column, weight in zip(scores.scores.unbind(1), scores.weights, strict=True):
            if weight:
                total += weight * beta_normalized(column, scores.group, self.low, self.high)
        return total


@dataclass(frozen=True)
class VirtualBest:
    """NGRPO's advantages (B,): group advantages where each group has one more, virtual sample of the score ``best``.

    So a group whose samples all failed gets negative credit, where others get none. ``best`` is the largest possible
    weighted sum of the rewards. The recipe ``ngrpo`` adds the unequal clipping of the paper.
    """

    best: float = 1.0

    def __call__(self, scores: RoundScores) -> Tensor:
        return ngrpo(scores.combined, scores.group, self.best)


@dataclass(frozen=True)
class GaussianRank:
    """G2RPO's advantages (B,): quantiles of the standard normal distribution by the rank of the weighted sum.

    Outliers and the scale of a reward do not count, see ``advantages.gaussian_ranks``.
    """

    def __call__(self, scores: RoundScores) -> Tensor:
        return gaussian_ranks(scores.combined, scores.group)


@dataclass(frozen=True)
class TaskNormalized:
    """Advantages (B,) normalized by the task of the prompts, for tasks whose scores have different scales.

    ``center`` "group" subtracts the mean of the group and divides by the scale of the task, as GoLongRL does, see
    ``advantages.task_normalized``. "task" takes the mean and the standard deviation of all samples of the task, in the
    form of QwenLong-L1.5: there a group without spread, or of one sample, gets credit too. The task of a prompt is its
    GenEval tag; without tags all prompts are one task.
    """

    center: Literal["group", "task"] = "group"

    def __call__(self, scores: RoundScores) -> Tensor:
        if self.center == "task":
            return group_advantages(scores.combined, _task(scores), ddof=1)
        if self.center == "group":
            return task_normalized(scores.combined, scores.group, _task(scores))
        raise ValueError(f'center must be "group" or "task", not {self.center!r}')


@dataclass(frozen=True)
class DifficultyWeighted:
    """``credit`` times a weight by the success rate of the group: rare successes and rare failures count more.

    The weights are GoLongRL's, see ``advantages.difficulty_weights``, from exp(-strength / 2) to exp(strength / 2).
    ``credit`` is any ``genalign.algorithms.interfaces.Credit``; with ``TaskNormalized`` this is its TMN-Reweight.
    """

    credit: AnyCallable
    strength: float = 1.0

    def __call__(self, scores: RoundScores) -> Tensor:
        positive, negative = difficulty_weights(scores.combined, scores.group, _task(scores), self.strength)
        credit: Tensor = self.credit(scores)
        per_sample = (-1, *[1] * (credit.ndim - 1))
        return credit * torch.where(credit > 0, positive.view(per_sample), negative.view(per_sample))


@dataclass(frozen=True)
class SpreadDiscounted:
    """``credit`` times exp(-strength U): a prompt whose samples have very different scores teaches less.

    U is the standard deviation of the weighted sum within the group, over its root mean square among all groups. It is
    the discount of Ctrl-U (arXiv 2410.11236) in our form, with the samples of one prompt in place of two predictions.
    Use it where a reward is noisy for some prompts; where its spread is what there is to learn, it takes that away.
    ``credit`` is any ``genalign.algorithms.interfaces.Credit``.
    """

    credit: AnyCallable
    strength: float = 1.0

    def __call__(self, scores: RoundScores) -> Tensor:
        prompts, spread = group_spread(scores.combined, scores.group)
        typical = spread[spread > 0].square().mean().sqrt()
        factor = torch.exp(-self.strength * spread / typical)[torch.searchsorted(prompts, scores.group)]
        credit: Tensor = self.credit(scores)
        discounted = credit * factor.view(-1, *[1] * (credit.ndim - 1))
        return torch.where(credit == 0, 0.0, discounted).float()


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


def _task(scores: RoundScores) -> Tensor:
    """Return the task index (B,) of each sample's prompt; all are of one task where none is given."""
    return torch.zeros_like(scores.group) if scores.task is None else scores.task
