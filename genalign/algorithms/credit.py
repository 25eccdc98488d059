"""Credits: rules from the scores of a round to the credit of each sample (B,); for steps see ``step_credit``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from genalign.algorithms.advantages import (
    SmallGroupsError,
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
from genalign.diffusion.noise import derived_seed
from genalign.metrics.set_metric import with_quality
from genalign.types import AnyCallable, SetReward


@dataclass(frozen=True)
class GroupRelative:
    """GRPO's advantages (B,): the weighted sum of the rewards, normalized within the group.

    Args:
        std: "group" divides by the standard deviation of the sample's group, "global", as in Flow-GRPO's code, by that
            of the whole round.
    """

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

    They are not divided by a standard deviation, which would undo the saturation of a bounded reward such as a sigmoid,
    a ceiling or a log-sigmoid: where all samples of a group are near the bound, their advantages vanish.

    Args:
        scale: The factor from units of the score to advantages, before they are clipped.
    """

    scale: float = 1.0

    def __call__(self, scores: RoundScores) -> Tensor:
        return (self.scale * leave_one_out(scores.combined, scores.group)).clamp(-5.0, 5.0)


@dataclass(frozen=True)
class BestOfNCredit:
    """Credit (B,) for the best of ``n`` samples, for a model whose samples will be searched by ``search.BestOfN``.

    It is the expected amount by which a sample's weighted sum beats the best of n - 1 others of its group, over the
    standard deviation of all scores of the round, and clipped to 5, see ``advantages.best_of_n``. No sample gets
    negative credit. Raises SmallGroupsError where every group has fewer than ``n`` samples.

    Args:
        n: The number of samples of a prompt that the search draws, from 2 to the size of a group.
    """

    n: int = 4

    def __call__(self, scores: RoundScores) -> Tensor:
        largest = int(torch.unique(scores.group, return_counts=True)[1].max())
        if largest < self.n:
            raise SmallGroupsError(
                f"BestOfNCredit needs groups of {self.n} or more, not of {largest}: lower n, or raise group_size"
            )
        std = global_std(scores.combined) + 1e-4
        return (best_of_n(scores.combined, scores.group, self.n) / std).clamp(max=5.0).float()


@dataclass(frozen=True)
class BetaNormalized:
    """BNPO's advantages (B,) of each reward, times its weight, summed: see ``advantages.beta_normalized``.

    Made for rewards of 0 and 1: the more unusual the success rate of a group in the round, the more the group counts.
    A missing score adds nothing.

    Args:
        low: The lowest possible score of every reward.
        high: The highest possible score of every reward.
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
    """NGRPO's advantages (B,): group advantages with a virtual sample of the score ``best`` added to each group.

    So a group whose samples all failed gets negative credit, where other rules give none. The recipe ``ngrpo`` adds
    the paper's asymmetric clipping.

    Args:
        best: The largest possible weighted sum of the rewards.
    """

    best: float = 1.0

    def __call__(self, scores: RoundScores) -> Tensor:
        return ngrpo(scores.combined, scores.group, self.best)


@dataclass(frozen=True)
class GaussianRank:
    """G2RPO's advantages (B,): quantiles of the standard normal distribution by the rank of the weighted sum.

    Outliers and the scale of a reward have no influence, see ``advantages.gaussian_ranks``.
    """

    def __call__(self, scores: RoundScores) -> Tensor:
        return gaussian_ranks(scores.combined, scores.group)


@dataclass(frozen=True)
class TaskNormalized:
    """Advantages (B,) normalized by the task of the prompts, for tasks whose scores have different scales.

    The task of a prompt is its GenEval tag; without tags all prompts are one task.

    Args:
        center: "group" subtracts the mean of the group and divides by the scale of the task, as GoLongRL does, see
            ``advantages.task_normalized``. "task" uses the mean and the standard deviation of all samples of the task,
            like QwenLong-L1.5: there zero-variance groups and groups of one sample get credit, too.
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

    The weights are GoLongRL's, see ``advantages.difficulty_weights``.

    Args:
        credit: The credit to weigh, any ``genalign.algorithms.interfaces.Credit``; with ``TaskNormalized`` this is
            GoLongRL's TMN-Reweight.
        strength: How much the weights differ: they are from exp(-strength / 2) to exp(strength / 2).
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
    """``credit`` times exp(-strength U): a prompt whose samples have very different scores counts less.

    U is the standard deviation of the weighted sum within the group, over its root mean square among all groups of
    non-zero variance; 0 where there is no such group. It adapts the discount of Ctrl-U (arXiv 2410.11236), with the
    samples of one prompt in place of two predictions. Use it where a reward is noisy for some prompts, not where large
    differences within a prompt are the signal.

    Args:
        credit: The credit to discount, any ``genalign.algorithms.interfaces.Credit``.
        strength: How fast the credit decays with U; 0 leaves it unchanged.
    """

    credit: AnyCallable
    strength: float = 1.0

    def __call__(self, scores: RoundScores) -> Tensor:
        prompts, spread = group_spread(scores.combined, scores.group)
        live = spread[spread > 0]
        typical = live.square().mean().sqrt() if len(live) else spread.new_ones(())
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
class BestOnly:
    """Credit (B,) for fine-tuning on the best ``count`` samples of each prompt, which share a total of 1 equally.

    Samples that tie with the last of these are included. A group without scores gets none. The only sample of a prompt,
    as in a pool of good samples, is the best.

    Args:
        count: The number of samples of a prompt that get credit, 1 or more.
    """

    takes_single_samples: ClassVar[bool] = True
    count: int = 1

    def __call__(self, scores: RoundScores) -> Tensor:
        credit = torch.zeros(len(scores.group))
        for members in _scored_members(scores):
            values = scores.combined[members]
            least = values.sort(descending=True).values[: self.count][-1]
            best = members[values >= least]
            credit[best] = 1 / len(best)
        return credit


@dataclass(frozen=True)
class ExponentialWeights:
    """Reward-weighted regression's credit (B,): exp(reward / temperature) over its mean in the group (2501.13918).

    Args:
        temperature: In units of the reward: the lower it is, the more of a group's credit goes to the best samples.
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, in units of the reward, not {self.temperature}")

    def __call__(self, scores: RoundScores) -> Tensor:
        credit = torch.zeros(len(scores.group))
        for members in _scored_members(scores):
            values = scores.combined[members].double()
            credit[members] = (len(members) * torch.softmax(values / self.temperature, dim=0)).float()
        return credit


@dataclass(frozen=True)
class Thresholded:
    """Credit (B,): +1 for a weighted sum of at least ``threshold``, -1 below, 0 without a score; for Diffusion-KTO.

    Args:
        threshold: The lowest weighted sum of the rewards of a desirable sample.
    """

    takes_single_samples: ClassVar[bool] = True
    threshold: float

    def __call__(self, scores: RoundScores) -> Tensor:
        credit = torch.where(scores.combined >= self.threshold, 1.0, -1.0)
        return torch.where(scores.combined.isfinite(), credit, 0.0)


@dataclass(frozen=True)
class HierarchicalPairs:
    """DP2O-SR's credit (B,) (arXiv 2510.18851): the best ``count`` samples of a prompt against the worst.

    The rewards are mapped to [0, 1] within the group, flipped if their weight is negative, and averaged by the size of
    their weights. Half the difference of the credits of a winner and a loser is the weight of their pair,
    w_intra w_inter: w_intra = their lead + 1 - the mean lead in the group, and w_inter = the group's standard deviation
    + 1 - its mean over all groups. For ``DPOLoss(pairs="all", weighted=True)``. A group with a missing score, or whose
    last winner is no better than its first loser, has none.

    Args:
        count: The number of winners of a prompt, and of losers: at most half of a group.
    """

    count: int = 2

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count must be at least 1 sample, not {self.count}")

    def __call__(self, scores: RoundScores) -> Tensor:
        hybrid = _within_group(scores)
        credit, spreads, ranked = torch.zeros(len(scores.group), dtype=torch.float64), {}, {}
        for key in torch.unique(scores.group).tolist():
            members = (scores.group == key).nonzero()[:, 0]
            values = hybrid[members]
            if len(members) >= 2 * self.count and bool(values.isfinite().all()):
                order = torch.sort(values, descending=True, stable=True).indices
                spreads[key], ranked[key] = float(values.std(correction=0)), members[order]
        mean_spread = sum(spreads.values()) / max(len(spreads), 1)
        for key, members in ranked.items():
            best, worst = members[: self.count], members[-self.count :]
            if hybrid[best[-1]] <= hybrid[worst[0]]:
                continue
            middle = (hybrid[best[-1]] + hybrid[worst[0]]) / 2
            lead = (hybrid[best][:, None] - hybrid[worst][None]).mean()
            for rows, sign in ((best, 1.0), (worst, -1.0)):
                credit[rows] = (spreads[key] + 1 - mean_spread) * (2 * (hybrid[rows] - middle) + sign * (1 - lead))
        return credit.float()


def _within_group(scores: RoundScores) -> Tensor:
    """The mean of the rewards (B,) after each was mapped to [0, 1] within the group; float64."""
    weights = torch.tensor(scores.weights, dtype=torch.float64)
    turned = scores.scores.double() * weights.sign()
    unit = torch.empty_like(turned)
    for key in torch.unique(scores.group):
        rows = scores.group == key
        low, high = turned[rows].amin(0), turned[rows].amax(0)
        unit[rows] = (turned[rows] - low) / torch.where(high > low, high - low, 1.0)
    used = weights != 0
    return (unit[:, used] * weights[used].abs()).sum(1) / weights.abs().sum()


def _scored_members(scores: RoundScores) -> list[Tensor]:
    """The samples with a score of each prompt that has some."""
    finite = scores.combined.isfinite()
    members = [((scores.group == key) & finite).nonzero()[:, 0] for key in torch.unique(scores.group)]
    return [rows for rows in members if len(rows)]


@dataclass(frozen=True)
class BestAndWorst:
    """DRAGON's demonstrations for rewards of single samples, (B,): +1 for the best and -1 for the worst of a prompt.

    The best sample and the worst are a pair, the second best and the second worst another. All other samples get 0.

    Args:
        tolerance: The largest difference of the rewards of a pair that counts as a tie, for which both get 0.
        pairs: The largest number of pairs of a prompt.
    """

    tolerance: float = 0.0
    pairs: int = 1

    def __call__(self, scores: RoundScores) -> Tensor:
        pairs = best_and_worst_pairs(scores.combined, scores.group, self.tolerance, self.pairs)
        return pairs.signs(len(scores.group))


@dataclass(frozen=True)
class DrawnPreference:
    """RPO's credit (B,) (arXiv 2407.12164): a random preference between a reference image and a generated one.

    The reference is preferred with probability sigmoid(r_reference - r_generated), with r the weighted sum of the
    rewards; each round draws again. The preferred sample gets +1 and the other -1, times 2 for the reference, by which
    ``ReferencePreferenceLoss`` recognizes it. Groups that are not one of each, or lack a score, get 0.

    Args:
        reference: The name of the score that is above 0.5 for references, of weight 0.
    """

    reference: str = "preference"

    def __call__(self, scores: RoundScores) -> Tensor:
        marks = scores.scores[:, scores.column_of(self.reference)] > 0.5
        credit, combined = torch.zeros(len(scores.group)), scores.combined.double()
        for members in _scored_members(scores):
            if len(members) != 2 or bool(marks[members[0]] == marks[members[1]]):
                continue
            reference, generated = members[marks[members].long().argsort(descending=True)].tolist()
            name = derived_seed(scores.seed, "preference", int(scores.group[reference]))
            drawn = torch.rand((), dtype=torch.float64, generator=torch.Generator().manual_seed(name))
            sign = 1.0 if drawn < torch.sigmoid(combined[reference] - combined[generated]) else -1.0
            credit[reference], credit[generated] = 2 * sign, -sign
        if not bool(credit.any()):
            raise UnsuitableScoresError(
                f"no group of this round has one reference and one generated sample by {self.reference!r}: set"
                " training.group_size to 2, and collect pairs of one each"
            )
        return credit


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
    """Return the task index (B,) of each sample's prompt; without tasks all share one."""
    return torch.zeros_like(scores.group) if scores.task is None else scores.task
