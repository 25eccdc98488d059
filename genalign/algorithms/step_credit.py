"""Credits of steps: rules from the scores of a trajectory's completions to the credit (B, S) of its stored steps.

B counts samples and S stored steps. R_0, ..., R_S are the weighted sums of the rewards of the completions of the states
before the first stored step, between stored steps, and after the last, which is the final sample. Credit that needs a
missing score is 0, and does not affect other credit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from genalign.algorithms.advantages import group_advantages, stepwise_advantages
from genalign.algorithms.interfaces import RoundScores

Reduction = Literal["sum", "min"]
"""The value of a step, from the scores that follow it: their discounted sum, or the lowest of them."""

_LARGEST_ADVANTAGE = 5.0
_GAIN_RESOLUTION = 1e-5  # a smaller difference, as a fraction of the scores' spread, is rounding and has no sign


@dataclass(frozen=True)
class RewardGain:
    """DenseGRPO's advantages (B, S): each step's gain in the reward of the ODE completion, normalized in the group.

    A gain is the score after a step minus the score before it (arXiv 2601.20218, eq. 7).

    Args:
        floor: The lower bound of the standard deviation of a step's gains, as a fraction of that of their sum over
            steps, see ``advantages.stepwise_advantages``.
    """

    floor: float

    def __call__(self, scores: RoundScores) -> Tensor:
        return stepwise_advantages(scores.combined_stepwise.diff(dim=1), scores.group, self.floor)


@dataclass(frozen=True)
class TurningPoint:
    """TurningPoint-GRPO's advantages (B, S): ``turning_gains``, normalized per step in the group (arXiv 2602.06422).

    This is the method as its published launch script runs it; the published configuration file differs.

    Args:
        bonus: The factor of the gain at turning points.
        balanced: Whether equally many turning points of trajectories that gained and of those that lost count, see
            ``turning_gains``.
        floor: The lower bound of the standard deviation of a step's gains, see ``advantages.stepwise_advantages``.
    """

    bonus: float = 1.0
    balanced: bool = True
    floor: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.bonus < math.inf:
            raise ValueError(f"bonus must be a positive number, not {self.bonus}")

    def __call__(self, scores: RoundScores) -> Tensor:
        gains = turning_gains(scores.combined_stepwise, self.bonus, self.balanced)
        return stepwise_advantages(gains, scores.group, self.floor)


def turning_gains(scores: Tensor, bonus: float = 1.0, balanced: bool = True) -> Tensor:
    """TurningPoint-GRPO's gains of steps: a turning point has the gain of the rest of the trajectory.

    The gain of step i is R_{i+1} - R_i, and ``bonus`` (R_S - R_i) at a turning point. Step i > 0 is one if it moves the
    score in the direction of R_S - R_0 while step i - 1 moved it in the opposite one, and R_S lies further in that
    direction than R_{i+1}; step 0 is one if R_S lies further in the direction in which it moved the score. The last
    step never is. Differences below 1e-5 of the standard deviation of all scores count as 0.

    ``balanced`` selects equally many turning points of trajectories that gained and of those that lost, with the
    largest |R_S - R_0|; ties go to the first. If there are none of one kind, all are kept. This couples the samples of
    a round across groups.

    Args:
        scores: R_0, ..., R_S, (B, S + 1). A row with a NaN has gains of NaN.
        bonus: The factor of the gain at turning points.
        balanced: Whether turning points are balanced.

    Returns:
        Gains (B, S).
    """
    if scores.ndim != 2 or scores.shape[1] < 2:
        raise ValueError(f"scores must be (B, S + 1) with S > 0, not {tuple(scores.shape)}")
    complete = ~scores.isnan().any(1)
    values = torch.where(complete[:, None], scores.double(), 0.0)
    resolution = _GAIN_RESOLUTION * float(scores[complete].double().std(correction=0)) if complete.any() else 0.0

    def sign(difference: Tensor) -> Tensor:
        return torch.where(difference.abs() > resolution, difference.sign(), 0.0)

    gains, total = values.diff(dim=1), values[:, -1] - values[:, 0]
    turning = sign(gains) * sign(values[:, -1:] - values[:, 1:]) > 0
    agreement = sign(gains) * sign(total)[:, None]
    turning[:, 1:] &= (agreement[:, :-1] < 0) & (agreement[:, 1:] > 0)
    if balanced:
        turning = _balanced(turning, total)
    gains = torch.where(turning, bonus * (values[:, -1:] - values[:, :-1]), gains)
    return torch.where(complete[:, None], gains, math.nan).float()


def _balanced(turning: Tensor, total: Tensor) -> Tensor:
    """Select turning points (B, S) as ``turning_gains`` says, by the total gains (B,) of their trajectories."""
    kinds = [(turning & (total * sign > 0)[:, None]).nonzero() for sign in (1, -1)]
    count = min(map(len, kinds))
    if count == 0:
        return turning
    selected = torch.zeros_like(turning)
    for points in kinds:
        order = total[points[:, 0]].abs().argsort(descending=True, stable=True)
        selected[points[order[:count]].unbind(1)] = True
    return selected


@dataclass(frozen=True)
class ValueAnchored:
    """VGPO's advantages (B, S), from values of steps instead of gains (arXiv 2512.12387, eq. 10-13).

    Let Q_i be the value of stored step i: the discounted sum of the scores R_{i+1}, ..., R_S that follow it. Then

        A_i = w_i ((Q_i - mean Q_i) / (std Q_i + 1e-4) + anchor Q_i 1[i < anchored_steps]),   w_i = Q_i / mean_j Q_j

    with mean and std of Q_i over the group, and clipped to +-5. We had no access to the paper: which terms w
    multiplies, the discount and the anchor are our choices and may differ.

    The anchor is off by default. Its absolute term is meant to give credit in zero-variance groups, but there it is a
    constant c that does not depend on x', and E[c grad log p(x' | x)] = 0: it adds variance and no expected gradient.
    Set it, to 0.1 for example, only to reproduce the paper.

    Args:
        discount: The factor in [0, 1] by which a score counts less for each further step; 0 takes only the score right
            after the step.
        anchor: The weight of the absolute term, 0 or more.
        anchored_steps: The number of stored steps, from the first, that have the absolute term.
        reduction: "sum" as above; "min" takes the lowest of the scores that follow, after PURE's min-form (arXiv
            2504.15275): a high score on the way is worth nothing if a later one is low. It ignores ``discount``.

    Raises:
        ValueError: An argument is out of range; or, on the scores of a round, one is negative, for which the share w is
            undefined.
    """

    discount: float = 0.9
    anchor: float = 0.0
    anchored_steps: int = 5
    reduction: Reduction = "sum"

    def __post_init__(self) -> None:
        if not 0 <= self.discount <= 1:
            raise ValueError(f"discount must be in [0, 1], not {self.discount}")
        if not 0 <= self.anchor < math.inf or self.anchored_steps < 0:
            raise ValueError(
                f"anchor and anchored_steps must be 0 or more, not {self.anchor} and {self.anchored_steps}"
            )
        if self.reduction not in get_args(Reduction):
            raise ValueError(f'reduction must be "sum" or "min", not {self.reduction!r}')

    def __call__(self, scores: RoundScores) -> Tensor:
        rewards = scores.combined_stepwise[:, 1:].double()
        missing = rewards.isnan().any(1, keepdim=True)
        if bool((rewards < 0).any()):
            raise ValueError(
                f"ValueAnchored weighs steps by their share of a trajectory's score, and a score is"
                f" {float(rewards.nan_to_num(0.0).min()):g}: use rewards of 0 or more with positive weights"
            )
        rewards = torch.where(missing, math.nan, rewards)
        values = discounted(rewards, self.discount) if self.reduction == "sum" else rewards.flip(1).cummin(1)[0].flip(1)
        mean = values.mean(1, keepdim=True)
        share = torch.where(mean > 0, values / mean, 1.0)  # equal shares of nothing
        relative = [group_advantages(column, scores.group, clip=None) for column in values.unbind(1)]
        anchored = torch.arange(values.shape[1]) < self.anchored_steps
        advantages = share * (torch.stack(relative, dim=1) + self.anchor * values * anchored)
        return torch.where(missing, 0.0, advantages).clamp(-_LARGEST_ADVANTAGE, _LARGEST_ADVANTAGE).float()


def discounted(scores: Tensor, discount: float) -> Tensor:
    """Discounted sums Q_i = sum over j >= i of discount^(j - i) scores_j, (B, S) from scores (B, S)."""
    columns = [scores[:, -1]]
    for score in reversed(scores.unbind(1)[:-1]):
        columns.append(score + discount * columns[-1])
    return torch.stack(columns[::-1], dim=1)
