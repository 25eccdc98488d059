"""Credits over several rewards, which control what each of them contributes to the advantages.

Rewards are the columns of ``RoundScores.scores``. A reward of weight 0 contributes nothing, and a sample that lacks the
score of any other gets exactly 0 and is left out of all statistics, as in ``credit.GroupRelative``. A credit that
treats one reward differently takes its name; ``NormalizedSum`` (GDPO) is in ``credit``, ensembles in
``rewards.combine``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from genalign.algorithms.advantages import Std, correlation_weighted, group_advantages, log_tamed
from genalign.algorithms.interfaces import RoundScores
from genalign.scoring.score import combine
from genalign.types import AnyCallable

_CLIP = 5.0
_RESOLUTION = 1e-7  # scores are float32: a smaller relative spread is rounding


@dataclass(frozen=True)
class CorrelationWeighted:
    """CMO's advantages (B,) (arXiv 2603.18528): rewards in conflict with the others of their group count more.

    The z-scores of the rewards in the group, times their weights, are summed with the weights of
    ``advantages.correlation_weighted``, divided by the standard deviation over the batch, and clipped to +-5. Meant for
    one reward per concept, such as ``ShapesReward("color")``. In groups of 8 a correlation has a standard error of
    about 0.4.

    Args:
        temperature: The temperature of the softmax of 1 minus a reward's mean correlation with the others: the lower it
            is, the larger the share of a conflicting reward.
    """

    temperature: float = 0.5

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, not {self.temperature}")

    def __call__(self, scores: RoundScores) -> Tensor:
        def whitened(columns: Tensor, weights: Sequence[float], group: Tensor) -> Tensor:
            total = correlation_weighted(columns, group, self.temperature, weights).double()
            scale = total.square().mean().sqrt() + 1e-8  # their mean is 0 in every group
            return torch.where(total == 0, 0.0, total / scale).clamp(-_CLIP, _CLIP).float()

        return _of_complete_samples(scores, whitened)


@dataclass(frozen=True)
class LogTamed:
    """PaCo-GRPO's advantages (B,) (arXiv 2512.04784): rewards with a large relative spread are tamed by log(1 + R).

    The weighted sum of the tamed rewards, see ``advantages.log_tamed``, is normalized within the group.

    Args:
        threshold: The relative spread above which a reward is tamed: the "mean" or "median" over the rewards, or a
            number. Of two rewards, "mean" and "median" tame exactly one, unless their relative spreads are equal.
        std: "group" divides by the standard deviation of the sample's group, "global" by that of the whole round.
    """

    threshold: float | Literal["mean", "median"] = "mean"
    std: Std = "group"

    def __call__(self, scores: RoundScores) -> Tensor:
        def tamed(columns: Tensor, weights: Sequence[float], group: Tensor) -> Tensor:
            return group_advantages(combine(log_tamed(columns, self.threshold), weights), group, std=self.std)

        return _of_complete_samples(scores, tamed)


@dataclass(frozen=True)
class AmongCorrect:
    """Advantages (B,) of a rule, plus those of the other rewards among the correct samples (adapted from DRPO).

    The z-score of the reward ``rule`` in the group, plus ``weight`` times the z-score of the weighted sum of the other
    rewards among the correct samples of the group. A correct sample gets at least 0, so style never counts against
    correctness; incorrect samples are compared only by the rule.

    Args:
        rule: The name of the reward that says which samples are correct.
        weight: The factor of the other rewards' z-score; 0 ignores them.
        threshold: The lowest score by the rule of a correct sample.
    """

    rule: str
    weight: float = 0.3
    threshold: float = 1.0

    def __call__(self, scores: RoundScores) -> Tensor:
        rule, others = _split(scores, self.rule)
        missing = others.isnan() | rule.isnan()
        rule = torch.where(missing, math.nan, rule)
        right = rule >= self.threshold
        style = group_advantages(torch.where(right, others, math.nan), scores.group, clip=None).double()
        advantages = group_advantages(rule, scores.group, clip=None).double()
        advantages = torch.where(right, (advantages + self.weight * style).clamp(min=0.0), advantages)
        return advantages.clamp(-_CLIP, _CLIP).float()


@dataclass(frozen=True)
class GatedBySuccess:
    """Advantages (B,) from only the reward ``rule`` where a group succeeds too rarely, else from all rewards' sum.

    So an easier reward cannot distract from a goal that is not yet reached. It adapts GRPO-lambda's penalty, which is
    off in groups of low accuracy; ``rewards.combine.Gate`` switches a reward for each sample instead.

    Args:
        rule: The name of the reward that says which samples succeed.
        rate: The fraction of a group's samples, in (0, 1], that must succeed for the other rewards to count.
        threshold: The lowest score by the rule of a sample that succeeds.
        std: "group" divides by the standard deviation of the sample's group, "global" by that of the whole round.
    """

    rule: str
    rate: float = 0.5
    threshold: float = 1.0
    std: Std = "group"

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise ValueError(f"rate is a fraction of a group's samples, in (0, 1], not {self.rate}")

    def __call__(self, scores: RoundScores) -> Tensor:
        rule, others = _split(scores, self.rule)
        weighted = rule * scores.weights[scores.column_of(self.rule)]
        complete = ~(weighted + others).isnan()
        keys, index = torch.unique(scores.group, return_inverse=True)
        count, successes = (
            torch.zeros(len(keys), dtype=torch.float64).index_add(0, index, rows.double())
            for rows in (complete, complete & (rule >= self.threshold))
        )
        opened = (successes >= self.rate * count)[index]
        total = torch.where(opened, weighted + others, weighted)
        return group_advantages(torch.where(complete, total, math.nan), scores.group, std=self.std)


@dataclass(frozen=True)
class Decorrelated:
    """``credit`` minus the part that the ``nuisances`` explain linearly within groups: (B,) or (B, S).

    The credit and the nuisances, centered in their groups, enter one regression over all groups of the round, whose
    residual is returned (a post-hoc form of ODIN, arXiv 2402.07319, by the Frisch-Waugh theorem). What a prompt asks
    for is kept, as it is the same within a group; nonlinear dependence on a nuisance is kept, too. A sample without a
    nuisance's score gets 0, and so does a group without credit.

    Args:
        credit: The credit to correct, any ``genalign.algorithms.interfaces.Credit``.
        nuisances: The names of rewards of weight 0, such as one that measures the saturation of an image.
    """

    credit: AnyCallable
    nuisances: Sequence[str]

    def __post_init__(self) -> None:
        if isinstance(self.nuisances, str) or not self.nuisances:
            raise ValueError("nuisances must be a list of names of rewards of weight 0, such as [saturation]")

    def __call__(self, scores: RoundScores) -> Tensor:
        places = [scores.column_of(name) for name in self.nuisances]
        for name, place in zip(self.nuisances, places, strict=True):
            if scores.weights[place]:
                raise ValueError(
                    f"the nuisance {name!r} has weight {scores.weights[place]:g}, so the credit contains it: give"
                    " it weight 0"
                )
        credit: Tensor = self.credit(scores)
        nuisances = scores.scores[:, places]
        scored = ~(nuisances.isnan().any(1) | scores.combined.isnan())
        columns = [
            decorrelated(column, nuisances, scores.group, scored)
            for column in credit.reshape(len(credit), -1).unbind(1)
        ]
        return torch.stack(columns, dim=1).view_as(credit)


def decorrelated(credit: Tensor, nuisances: Tensor, group: Tensor, counted: Tensor) -> Tensor:
    """Subtract from a credit what nuisances explain of it within groups, by least squares over all groups.

    Args:
        credit: Credit (B,).
        nuisances: Nuisances (B, N), of any units.
        group: Prompt indices (B,).
        counted: Which samples (B,) bool count; the others get 0, and so does a group with credit of zero variance.

    Returns:
        The residual (B,) of the credit, centered in its group.
    """
    rows = counted.clone()
    for key in torch.unique(group):
        own = (group == key) & counted
        rows &= ~own | bool((credit[own] != credit[own][:1]).any())
    if not bool(rows.any()):
        return torch.zeros_like(credit)
    centered = _centered(credit[rows].double(), group[rows])
    explaining = _centered(nuisances[rows].double(), group[rows])
    # In equal units, and exactly 0 where a nuisance is constant in every group
    size, length = nuisances[rows].double().norm(dim=0), explaining.norm(dim=0)
    explaining = torch.where(length > _RESOLUTION * size, explaining / length, 0.0)
    slope = torch.linalg.pinv(explaining, rtol=1e-6) @ centered
    residual = torch.zeros_like(credit)
    residual[rows] = (centered - explaining @ slope).to(credit.dtype)
    return residual


def _centered(values: Tensor, group: Tensor) -> Tensor:
    """Subtract the mean of its group from each of the values (B,) or (B, N)."""
    keys, index = torch.unique(group, return_inverse=True)
    count = torch.bincount(index, minlength=len(keys)).to(values)
    total = values.new_zeros(len(keys), *values.shape[1:]).index_add(0, index, values)
    return values - (total / count.view(-1, *[1] * (values.ndim - 1)))[index]


def _of_complete_samples(scores: RoundScores, rule: Callable[[Tensor, Sequence[float], Tensor], Tensor]) -> Tensor:
    """Compute advantages (B,) by a rule from the n samples that have all scores of rewards of non-zero weight.

    Args:
        scores: The scores of a round.
        rule: Returns advantages (n,) for scores (n, K'), weights (K') and prompt indices (n,).
    """
    used = [place for place, weight in enumerate(scores.weights) if weight]
    columns, weights = scores.scores[:, used], [scores.weights[place] for place in used]
    complete = ~columns.isnan().any(1)
    advantages = torch.zeros(len(columns))
    if used and bool(complete.any()):
        advantages[complete] = rule(columns[complete], weights, scores.group[complete])
    return advantages


def _split(scores: RoundScores, rule: str) -> tuple[Tensor, Tensor]:
    """Return the scores (B,) of the reward ``rule``, and the weighted sum (B,) of all others."""
    place = scores.column_of(rule)
    weights = [0.0 if column == place else weight for column, weight in enumerate(scores.weights)]
    return scores.scores[:, place], combine(scores.scores, weights)
