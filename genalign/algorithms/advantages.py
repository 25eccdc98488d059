"""Advantages from scores and groups.

B counts samples, K rewards, S stored steps and P groups. ``group`` (B,) long is the prompt index of each sample, in any
order; groups may differ in size. A NaN score is missing. Arithmetic is in float64; results are float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from genalign.scoring.score import weights_of_columns

Std = Literal["group", "global"]
"""The standard deviation that advantages are divided by: of the sample's own group, or of all scores."""

_RELATIVE_RESOLUTION = 1e-7  # scores are float32: a smaller relative spread is rounding
_STEP_RESOLUTION = 1e-5  # a step's gain is a difference of scores: a smaller fraction of their spread is rounding
_RANGE_TOLERANCE = 1e-6  # a weighted sum in float32 may exceed the range of scores by this fraction of it
_LARGEST_LOG_WEIGHT = math.log(1e6)  # of BNPO's 1 / f(p), as in its code


class UnsuitableScoresError(ValueError):
    """The scores of a round are outside a credit's range, or every group has too few of them."""


class SmallGroupsError(UnsuitableScoresError):
    """The groups of a round are too small for a credit, whatever their scores: training.group_size must be larger."""


def group_advantages(
    scores: Tensor,
    group: Tensor,
    epsilon: float = 1e-4,
    ddof: int = 0,
    std: Std = "group",
    clip: float | None = 5.0,
    least_std: float = 0.0,
) -> Tensor:
    """GRPO's advantages A = (score - mean of its group) / (std + epsilon), clipped to +-clip.

    See arXiv 2402.03300, section 4.1.2, and Flow-GRPO, arXiv 2505.05470, section 3. A NaN score is left out of the
    statistics and gets exactly 0, and so does every sample of a group with zero variance or fewer than two scores.

    Args:
        scores: Scores (B,).
        group: Prompt indices (B,).
        epsilon: The number added to the standard deviation.
        ddof: The number subtracted from the count in the standard deviation, 0 or 1.
        std: "group" divides by the standard deviation of the sample's group, "global", as in Flow-GRPO's code, by the
            standard deviation of all scores.
        clip: The largest absolute advantage; None for no limit.
        least_std: The lower bound of the standard deviation.

    Returns:
        Advantages (B,).
    """
    if std not in ("group", "global"):
        raise ValueError(f'std must be "group" or "global", not {std!r}')
    if ddof not in (0, 1):
        raise ValueError(f"ddof must be 0 or 1, not {ddof}")
    groups = _group_statistics(scores, group, ddof)
    scale = groups.std[groups.index] if std == "group" else global_std(scores, ddof)
    advantages = (scores.double() - groups.mean[groups.index]) / (scale.clamp(min=least_std) + epsilon)
    return _where_live(advantages, scores, groups, clip)


def stepwise_advantages(gains: Tensor, group: Tensor, floor: float = 0.01, clip: float | None = 5.0) -> Tensor:
    """DenseGRPO's advantages: the gains of each step, normalized within the group (arXiv 2601.20218, eq. 8).

    Two rules are ours: the floor, and exactly 0 for a group whose gains at a step differ only by rounding errors.
    Without them the noise of a late step that changes nothing is amplified to advantages of 1. NaN and zero-variance
    groups are treated as in ``group_advantages``.

    Args:
        gains: Gains (B, S).
        group: Prompt indices (B,).
        floor: The lower bound of a step's standard deviation, relative to the standard deviation of the gains that are
            summed over steps.
        clip: The largest absolute advantage; None for no limit.

    Returns:
        Advantages (B, S).
    """
    if gains.ndim != 2 or not floor >= 0:
        raise ValueError(f"gains must be (B, S) and floor 0 or more, not {tuple(gains.shape)} and {floor}")
    spread = float(global_std(gains.sum(1), ddof=0))
    columns = []
    for column in gains.unbind(1):
        groups = _group_statistics(column, group, ddof=0)
        resolved = torch.where(groups.std[groups.index] > _STEP_RESOLUTION * spread, column, math.nan)
        columns.append(group_advantages(resolved, group, clip=clip, least_std=floor * spread))
    return torch.stack(columns, dim=1)


def gdpo(scores_BK: Tensor, group: Tensor, weights: Sequence[float], epsilon: float = 1e-4) -> Tensor:
    """GDPO's advantages (arXiv 2601.05242): each reward normalized within its group, summed and normalized again.

    The weighted sum is divided by its standard deviation over the batch, and clipped to +-5. A NaN adds nothing. A
    sample without any score is not counted and gets 0; a sample whose rewards all have zero variance in its group gets
    exactly 0. A reward of weight 0 changes nothing.

    Args:
        scores_BK: Scores (B, K).
        group: Prompt indices (B,).
        weights: The weights (K,) of the rewards.
        epsilon: The number added to standard deviations.

    Returns:
        Advantages (B,).
    """
    weight = weights_of_columns(scores_BK, weights)
    total = (_normalized_columns(scores_BK, group, epsilon) * weight).sum(1)
    unscored = (scores_BK.isnan() | (weight == 0)).all(dim=1)
    scale = global_std(torch.where(unscored, math.nan, total), ddof=0) + epsilon
    # There is no mean to subtract: the advantages of each reward sum to 0 within every group.
    return torch.where(total == 0, 0.0, total / scale).clamp(-5.0, 5.0).float()


def ngrpo(scores: Tensor, group: Tensor, best: float = 1.0, epsilon: float = 1e-6, clip: float | None = 5.0) -> Tensor:
    """NGRPO's advantages (arXiv 2509.18851): z-scores with a virtual sample of the best possible score in each group.

    A zero-variance group of G samples below ``best`` gets -1 / sqrt(G + 1) instead of 0. NaN, and a group with fewer
    than two scores, are treated as in ``group_advantages``.

    Args:
        scores: Scores (B,).
        group: Prompt indices (B,).
        best: The best possible score.
        epsilon: The number added to the standard deviation.
        clip: The largest absolute advantage; None for no limit.

    Returns:
        Advantages (B,).

    Raises:
        UnsuitableScoresError: A score is above ``best``.
    """
    groups = _group_statistics(scores, group, ddof=1)
    highest = float(scores.nan_to_num(-math.inf).max())
    if highest > best + _RANGE_TOLERANCE * abs(best):
        raise UnsuitableScoresError(f"score {highest:g} is above best = {best:g}: set best to the highest possible one")
    keys = torch.unique(group)
    joined = torch.cat([scores, scores.new_full((len(keys),), best)])
    advantages = group_advantages(joined, torch.cat([group, keys]), epsilon, ddof=1, clip=clip)[: len(scores)]
    return torch.where(groups.count[groups.index] >= 2, advantages, 0.0)


def beta_normalized(
    scores: Tensor, group: Tensor, low: float = 0.0, high: float = 1.0, clip: float | None = 5.0
) -> Tensor:
    """BNPO's advantages A = (s - p) / f(p) (arXiv 2506.02864): s is the score in [0, 1], p the mean of its group.

    f is a Beta density that follows the distribution of the groups' means, of mean m and variance v: with
    c = m (1 - m) / v - 1 its parameters are alpha = 1 + c m / 3 and beta = 1 + c (1 - m) / 3, at least 1. So the
    groups of a round depend on each other. For alpha = beta = 1, as when all groups have the same mean, A = s - p.

    NaN, and groups with zero variance or fewer than two scores, are treated as in ``group_advantages``.

    Args:
        scores: Scores (B,).
        group: Prompt indices (B,).
        low: The lowest possible score.
        high: The highest possible score.
        clip: The largest absolute advantage; None for no limit.

    Returns:
        Advantages (B,).

    Raises:
        UnsuitableScoresError: A score is outside [``low``, ``high``].
    """
    if not low < high:
        raise ValueError(f"low must be less than high, not {low:g} and {high:g}")
    unit = (scores.double() - low) / (high - low)
    if bool(((unit < -_RANGE_TOLERANCE) | (unit > 1 + _RANGE_TOLERANCE)).any()):
        valid = scores[~scores.isnan()]
        raise UnsuitableScoresError(
            f"scores from {float(valid.min()):g} to {float(valid.max()):g} are outside [{low:g}, {high:g}]: set low"
            " and high to the range of the reward"
        )
    unit = unit.clamp(0.0, 1.0)
    groups = _group_statistics(unit, group, ddof=0)
    means = groups.mean[groups.count > 0]
    variance = means.var(correction=1) if len(means) > 1 else means.new_zeros(())
    alpha = beta = torch.ones_like(variance)
    if variance > _RELATIVE_RESOLUTION**2:
        mean = means.mean()
        concentration = mean * (1 - mean) / variance - 1
        alpha, beta = ((1 + concentration * part / 3).clamp(min=1.0) for part in (mean, 1 - mean))
    p = torch.where(groups.live, groups.mean, 0.5)
    log_beta = alpha.lgamma() + beta.lgamma() - (alpha + beta).lgamma()
    log_weight = log_beta - (alpha - 1) * p.log() - (beta - 1) * (-p).log1p()  # of 1 / f(p)
    weight = log_weight.clamp(max=_LARGEST_LOG_WEIGHT).exp()
    return _where_live(weight[groups.index] * (unit - groups.mean[groups.index]), scores, groups, clip)


def best_of_n(scores: Tensor, group: Tensor, n: int) -> Tensor:
    """Best-of-n credit (B,): the expected amount by which a sample beats the best of n - 1 others of its group.

    For a group of m with scores r_1 <= ... <= r_m it is the sum over j < i of C(j - 1, n - 2) (r_i - r_j), divided by
    C(m - 1, n - 1): exact over all subsets. n times the mean of credit times grad log p is an unbiased estimate of the
    gradient of E[best of n]. The form is ours; InfAlign (arXiv 2412.19792) pursues the same aim differently.

    It is in units of the score, 0 or more, and unclipped; 0 for a NaN, and in a group with zero variance or fewer than
    n scores.
    """
    if n < 2:
        raise ValueError(f"n must be 2 or more, not {n}: the best of 1 is the sample itself")
    groups = _group_statistics(scores, group, ddof=0)
    credit = scores.new_zeros(len(scores), dtype=torch.float64)
    for key in torch.nonzero(groups.live & (groups.count >= n))[:, 0]:
        rows = torch.nonzero((groups.index == key) & ~scores.isnan())[:, 0]
        values, order = torch.sort(scores[rows].double())
        subsets = math.comb(len(rows) - 1, n - 1)
        share = values.new_tensor([math.comb(lower, n - 2) / subsets for lower in range(len(rows))])
        credit[rows[order]] = (values[:, None] - values[None, :]).clamp(min=0.0) @ share
    return credit.float()


def gaussian_ranks(scores: Tensor, group: Tensor) -> Tensor:
    """G2RPO's advantages (B,) (arXiv 2604.08539): quantiles of the standard normal distribution by rank in the group.

    The r-th lowest of m scores gets Phi^-1((r - 1/2) / m); tied scores share their mean. So outliers and the scale of
    the reward have no influence. The published code then ranks the advantages of all samples of a task once more, which
    gives credit to zero-variance groups; this is left out.

    NaN, and groups with zero variance or fewer than two scores, are treated as in ``group_advantages``.
    """
    groups = _group_statistics(scores, group, ddof=0)
    advantages = scores.new_zeros(len(scores), dtype=torch.float64)
    for key in torch.nonzero(groups.live)[:, 0]:
        rows = torch.nonzero((groups.index == key) & ~scores.isnan())[:, 0]
        values, place, ties = torch.unique(scores[rows], return_inverse=True, return_counts=True)
        quantiles = torch.special.ndtri((torch.arange(len(rows)).to(advantages) + 0.5) / len(rows))
        sums = quantiles.new_zeros(len(values)).index_add(0, place.sort().values, quantiles)
        advantages[rows] = (sums / ties)[place]
    return advantages.float()


def task_normalized(
    scores: Tensor, group: Tensor, task: Tensor, epsilon: float = 1e-4, clip: float | None = 5.0
) -> Tensor:
    """GoLongRL's advantages (arXiv 2605.19577): (score - mean of its group) / (scale of its task + epsilon).

    The scale of a task is the root mean square of the standard deviations (ddof 1) of its groups with two scores or
    more. So tasks of different scales count equally, while a low-variance group counts less than others of its task.
    Groups of one task depend on each other. NaN, and groups with zero variance or fewer than two scores, are treated as
    in ``group_advantages``.

    Args:
        scores: Scores (B,).
        group: Prompt indices (B,).
        task: Task indices (B,) long; the samples of a group have the same.
        epsilon: The number added to the scale.
        clip: The largest absolute advantage; None for no limit.

    Returns:
        Advantages (B,).
    """
    groups = _group_statistics(scores, group, ddof=1)
    _require_grouped(scores, task)
    variance = torch.where(groups.count >= 2, groups.std.square(), math.nan)
    tasks = _group_statistics(variance, _task_of_groups(groups, task), ddof=0)
    scale = tasks.mean.sqrt()[tasks.index]
    advantages = (scores.double() - groups.mean[groups.index]) / (scale[groups.index] + epsilon)
    return _where_live(advantages, scores, groups, clip)


def difficulty_weights(
    scores: Tensor, group: Tensor, task: Tensor, strength: float = 1.0, group_share: float = 0.8
) -> tuple[Tensor, Tensor]:
    """GoLongRL's weights (arXiv 2605.19577) of positive and of negative credit, each (B,), by the group's success rate.

    A rare success and a rare failure count more: for a success rate p the weights are exp(strength (1/2 - p)) and
    exp(strength (p - 1/2)). A success is a score above group_share (group mean) + (1 - group_share) (mean of the means
    of the groups of its task); with scores of 0 and 1 it is a 1. NaN is left out; its weights are those of its group.

    Args:
        scores: Scores (B,).
        group: Prompt indices (B,).
        task: Task indices (B,) long; the samples of a group have the same.
        strength: How much the weights depend on the success rate; 0 for weights of 1.
        group_share: The weight of the group's own mean in the threshold of a success.

    Returns:
        The weights (B,) of positive and of negative credit, float32.
    """
    groups = _group_statistics(scores, group, ddof=0)
    _require_grouped(scores, task)
    means = torch.where(groups.count > 0, groups.mean, math.nan)
    tasks = _group_statistics(means, _task_of_groups(groups, task), ddof=0)
    level = group_share * groups.mean + (1 - group_share) * tasks.mean[tasks.index]
    level = level + _RELATIVE_RESOLUTION * level.abs()
    success = (scores.double() > level[groups.index]).double()
    rate = torch.zeros_like(level).index_add(0, groups.index, success) / groups.count.clamp(min=1)
    exponent = strength * (0.5 - rate[groups.index])
    return exponent.exp().float(), (-exponent).exp().float()


def log_tamed(scores_BK: Tensor, threshold: float | Literal["mean", "median"] = "mean", epsilon: float = 0.0) -> Tensor:
    """PaCo-GRPO's tamed rewards (B, K) (arXiv 2512.04784): log(1 + R) for rewards with a large relative spread.

    The relative spread h of a reward is std / (mean + ``epsilon``) over the batch. A reward is tamed if its h is above
    the ``threshold``: the mean or the median h of all rewards, or a number. A reward whose mean is not positive has
    h = 0 and stays as it is.

    Raises:
        UnsuitableScoresError: A reward to be tamed has a score of -1 or less.
        ValueError: The threshold is none of these.
    """
    _require_table(scores_BK)
    values = scores_BK.double()
    mean = values.nanmean(0)
    std = (values - mean).square().nanmean(0).sqrt()
    height = torch.where(mean > 0, std / (mean + epsilon), 0.0)
    if isinstance(threshold, str):
        if threshold not in ("mean", "median"):
            raise ValueError(f'threshold must be "mean", "median" or a number, not {threshold!r}')
        tamed = height > (height.mean() if threshold == "mean" else height.quantile(0.5))
    else:
        tamed = height > threshold
    if bool((values[:, tamed] <= -1).any()):
        raise UnsuitableScoresError(
            "a reward whose spread is to be tamed by log(1 + R) must be above -1: shift or rescale it"
        )
    return torch.where(tamed, values.clamp(min=-1 + 1e-12).log1p(), values).float()


def correlation_weighted(
    scores_BK: Tensor, group: Tensor, temperature: float = 0.5, weights: Sequence[float] | None = None
) -> Tensor:
    """CMO's advantages (arXiv 2603.18528): z-scores of K rewards summed with weights softmax((1 - b) / temperature).

    b is the mean correlation of a reward with the others in the group (1 for a zero-variance reward), so a reward in
    conflict with the others counts more. Where a group lacks a score, its z-scores are summed without weights, and
    missing ones count as 0. A single reward is only normalized. The rewards' own ``weights`` (K,) multiply the
    z-scores: a negative one flips its reward, in the correlations too. Returns (B,), not yet whitened over the batch.
    """
    _require_table(scores_BK)
    own = weights_of_columns(scores_BK, [1.0] * scores_BK.shape[1] if weights is None else weights)
    z = _normalized_columns(scores_BK, group, epsilon=0.0)
    advantages = (z * own).sum(1)
    missing = scores_BK.isnan().any(dim=1)
    for key in torch.unique(group):
        rows = group == key
        if z.shape[1] > 1 and not bool(missing[rows].any()):
            turned = z[rows] * own.sign()
            correlation = turned.T @ turned / len(turned)
            others = (correlation.sum(1) - correlation.diagonal()) / (z.shape[1] - 1)
            agreement = torch.where(correlation.diagonal() > 0, others, 1.0)
            advantages[rows] = (z[rows] * own) @ torch.softmax((1 - agreement) / temperature, dim=0)
    return advantages.float()


def _normalized_columns(scores_BK: Tensor, group: Tensor, epsilon: float) -> Tensor:
    """Group advantages of each reward, unclipped: (B, K) float64."""
    columns = [group_advantages(scores, group, epsilon, clip=None) for scores in scores_BK.unbind(1)]
    return torch.stack(columns, dim=1).double()


def leave_one_out(scores: Tensor, group: Tensor) -> Tensor:
    """RLOO's advantages (B,) (arXiv 2402.14740): a score minus the mean of the other scores of its group.

    They are in units of the score and unclipped; 0 for a NaN, and in a group with zero variance or fewer than two
    scores.
    """
    groups = _group_statistics(scores, group, ddof=0)
    factor = groups.count / (groups.count - 1).clamp(min=1)
    return _where_live((scores.double() - groups.mean[groups.index]) * factor[groups.index], scores, groups, None)


def global_std(scores: Tensor, ddof: int = 0) -> Tensor:
    """Standard deviation () of all scores, in float64; NaN is left out; 0 if there is no score."""
    values = scores[~scores.isnan()].double()
    variance = (values - values.mean()).square().sum() / max(len(values) - ddof, 1)
    return variance.sqrt()


def zero_std_share(scores: Tensor, group: Tensor) -> float:
    """Fraction of the groups that give no gradient: those with zero variance or fewer than two scores."""
    return 1.0 - float(_group_statistics(scores, group, ddof=0).live.double().mean())


def group_spread(scores: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Return the prompt indices (P,) of the groups, ascending, and the standard deviations (P,) of their scores.

    These are float64, and exactly 0 for a group that gives no gradient, with zero variance or fewer than two scores.
    """
    groups = _group_statistics(scores, group, ddof=0)
    return torch.unique(group), torch.where(groups.live, groups.std, 0.0)


@dataclass(frozen=True)
class _GroupStatistics:
    """Statistics (P,) of the groups, ``live`` where scores vary; ``index`` (B,) maps samples to groups."""

    count: Tensor
    mean: Tensor
    std: Tensor
    live: Tensor
    index: Tensor


def _group_statistics(scores: Tensor, group: Tensor, ddof: int) -> _GroupStatistics:
    _require_grouped(scores, group)
    keys, index = torch.unique(group, return_inverse=True)
    valid = ~scores.isnan()
    values = scores.double().nan_to_num(0.0)

    def total(per_sample: Tensor) -> Tensor:
        return values.new_zeros(len(keys)).index_add(0, index, per_sample)

    count = total(valid.double())
    mean = total(values) / count.clamp(min=1)
    deviation = torch.where(valid, values - mean[index], 0.0)
    std = (total(deviation * deviation) / (count - ddof).clamp(min=1)).sqrt()
    size = (total(values * values) / count.clamp(min=1)).sqrt()
    return _GroupStatistics(count, mean, std, live=(count >= 2) & (std > _RELATIVE_RESOLUTION * size), index=index)


def _where_live(advantages: Tensor, scores: Tensor, groups: _GroupStatistics, clip: float | None) -> Tensor:
    """Set advantages (B,) to 0 for NaN scores and for zero-variance groups, and clip them to +-``clip``."""
    advantages = torch.where(groups.live[groups.index] & ~scores.isnan(), advantages, 0.0)
    return (advantages if clip is None else advantages.clamp(-clip, clip)).float()


def _task_of_groups(groups: _GroupStatistics, task: Tensor) -> Tensor:
    """Return the task (P,) of each group, from the task (B,) of each sample."""
    return task.new_zeros(len(groups.mean)).index_put((groups.index,), task)


def _require_table(scores_BK: Tensor) -> None:
    if scores_BK.ndim != 2 or 0 in scores_BK.shape:
        raise ValueError(f"scores must be (B, K) with B > 0 and K > 0, not {tuple(scores_BK.shape)}")


def _require_grouped(scores: Tensor, group: Tensor) -> None:
    if scores.ndim != 1 or group.shape != scores.shape or len(scores) == 0:
        raise ValueError(f"scores and group must be (B,) with B > 0, not {tuple(scores.shape)}, {tuple(group.shape)}")
    if group.dtype != torch.long:
        raise TypeError(f"group must hold prompt indices (torch.long), not {group.dtype}")
    if bool(scores.isinf().any()):
        raise ValueError("scores must not be infinite; a reward that failed is NaN")
