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
    statistics and gets exactly 0, and so does every sample of a group with fewer than two scores or without spread.

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
    scale = groups.std[groups.index] if std == "group" else _global_std(scores, ddof)
    advantages = (scores.double() - groups.mean[groups.index]) / (scale.clamp(min=least_std) + epsilon)
    counted = groups.live[groups.index] & ~scores.isnan()
    advantages = torch.where(counted, advantages, 0.0)
    return (advantages if clip is None else advantages.clamp(-clip, clip)).float()


def stepwise_advantages(gains: Tensor, group: Tensor, floor: float = 0.01, clip: float | None = 5.0) -> Tensor:
    """DenseGRPO's advantages: the gains of each step, normalized within the group (arXiv 2601.20218, eq. 8).

    Two rules are not in the paper, where the noise of a late step that changes nothing is amplified to advantages of 1:
    the floor, and exactly 0 for a group whose gains of a step differ by no more than rounding errors. NaN and groups
    without spread are treated as in ``group_advantages``.

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
    spread = float(_global_std(gains.sum(1), ddof=0))
    columns = []
    for column in gains.unbind(1):
        groups = _group_statistics(column, group, ddof=0)
        resolved = torch.where(groups.std[groups.index] > _STEP_RESOLUTION * spread, column, math.nan)
        columns.append(group_advantages(resolved, group, clip=clip, least_std=floor * spread))
    return torch.stack(columns, dim=1)


def gdpo(scores_BK: Tensor, group: Tensor, weights: Sequence[float], epsilon: float = 1e-4) -> Tensor:
    """GDPO's advantages (arXiv 2601.05242): each reward normalized within its group, summed and normalized again.

    The weighted sum is divided by its standard deviation over the batch, and clipped to +-5. A NaN adds nothing. A
    sample without any score is not counted and gets 0; so does, exactly, a sample whose rewards all lack spread in its
    group.

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
    scale = _global_std(torch.where(scores_BK.isnan().all(dim=1), math.nan, total), ddof=0) + epsilon
    # There is no mean to subtract: the advantages of each reward sum to 0 within every group.
    return torch.where(total == 0, 0.0, total / scale).clamp(-5.0, 5.0).float()


def ngrpo(scores: Tensor, group: Tensor, best: float = 1.0, epsilon: float = 1e-6, clip: float | None = 5.0) -> Tensor:
    """NGRPO's advantages (arXiv 2509.18851): z-scores with a virtual sample of the best possible score in each group.

    A group whose samples all failed gets negative advantages instead of 0. NaN is treated as in ``group_advantages``.

    Args:
        scores: Scores (B,).
        group: Prompt indices (B,).
        best: The best possible score.
        epsilon: The number added to the standard deviation.
        clip: The largest absolute advantage; None for no limit.

    Returns:
        Advantages (B,).
    """
    _require_grouped(scores, group)
    keys = torch.unique(group)
    joined = torch.cat([scores, scores.new_full((len(keys),), best)])
    return group_advantages(joined, torch.cat([group, keys]), epsilon, ddof=1, clip=clip)[: len(scores)]


def log_tamed(scores_BK: Tensor, epsilon: float = 0.0) -> Tensor:
    """PaCo-GRPO's tamed rewards (B, K) (arXiv 2512.04784): log(1 + R) for the rewards with the largest relative spread.

    The relative spread h of a reward is std / (mean + ``epsilon``) over the batch; rewards whose h is above the mean h
    are tamed. A reward whose mean is not positive has h = 0 and stays as it is.

    Raises:
        ValueError: A reward to be tamed has a score of -1 or less.
    """
    _require_table(scores_BK)
    values = scores_BK.double()
    mean = values.nanmean(0)
    std = (values - mean).square().nanmean(0).sqrt()
    height = torch.where(mean > 0, std / (mean + epsilon), 0.0)
    tamed = height > height.mean()
    if bool((values[:, tamed] <= -1).any()):
        raise ValueError("a reward whose spread is to be tamed by log(1 + R) must be above -1: shift or rescale it")
    return torch.where(tamed, values.clamp(min=-1 + 1e-12).log1p(), values).float()


def correlation_weighted(scores_BK: Tensor, group: Tensor, temperature: float = 0.5) -> Tensor:
    """CMO's advantages (arXiv 2603.18528): z-scores of K rewards summed with weights softmax((1 - b) / temperature).

    b is the mean correlation of a reward with the others in the group (1 for a reward without spread), so that a reward
    in conflict with the others counts more. Where a group lacks a score, its z-scores are summed without weights, and
    missing ones count as 0. A single reward is only normalized. Returns (B,), not yet whitened over the batch.
    """
    _require_table(scores_BK)
    z = _normalized_columns(scores_BK, group, epsilon=0.0)
    advantages = z.sum(1)
    missing = scores_BK.isnan().any(dim=1)
    for key in torch.unique(group):
        rows = group == key
        if z.shape[1] > 1 and not bool(missing[rows].any()):
            correlation = z[rows].T @ z[rows] / len(z[rows])
            others = (correlation.sum(1) - 1) / (z.shape[1] - 1)
            agreement = torch.where(correlation.diagonal() > 0, others, 1.0)
            advantages[rows] = z[rows] @ torch.softmax((1 - agreement) / temperature, dim=0)
    return advantages.float()


def _normalized_columns(scores_BK: Tensor, group: Tensor, epsilon: float) -> Tensor:
    """Group advantages of each reward, unclipped: (B, K) float64."""
    columns = [group_advantages(scores, group, epsilon, clip=None) for scores in scores_BK.unbind(1)]
    return torch.stack(columns, dim=1).double()


def leave_one_out(scores: Tensor, group: Tensor) -> Tensor:
    """RLOO's advantages (B,) (arXiv 2402.14740): a score minus the mean of the other scores of its group.

    They are in units of the score and unclipped; 0 for a NaN, and in a group with fewer than two scores or without
    spread.
    """
    groups = _group_statistics(scores, group, ddof=0)
    count = torch.bincount(groups.index[~scores.isnan()], minlength=len(groups.mean))[groups.index]
    factor = count / (count - 1).clamp(min=1)
    advantages = (scores.double() - groups.mean[groups.index]) * factor
    return torch.where(groups.live[groups.index] & ~scores.isnan(), advantages, 0.0).float()


def zero_std_share(scores: Tensor, group: Tensor) -> float:
    """Fraction of the groups that give no gradient: without spread, or with fewer than two scores."""
    return 1.0 - float(_group_statistics(scores, group, ddof=0).live.double().mean())


@dataclass(frozen=True)
class _GroupStatistics:
    """Statistics (P,) of the groups, ``live`` where a group has spread; ``index`` (B,) maps samples to groups."""

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
    return _GroupStatistics(mean, std, live=(count >= 2) & (std > _RELATIVE_RESOLUTION * size), index=index)


def _global_std(scores: Tensor, ddof: int) -> Tensor:
    values = scores[~scores.isnan()].double()
    variance = (values - values.mean()).square().sum() / max(len(values) - ddof, 1)
    return variance.sqrt()


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
