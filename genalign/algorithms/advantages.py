"""Advantages from scores and groups.

Scores are float and a group is a long tensor of the same length that says which prompt each sample answers, in any
order; groups may differ in size. A NaN score is missing. Arithmetic is in float64, results are float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from genalign.scoring.combine import _weights

# Scores are float32: what differs by less than this share of their size does not differ.
_RELATIVE_RESOLUTION = 1e-7
# A step's gain is a difference of scores: rounding leaves this share of their spread.
_STEP_RESOLUTION = 1e-5


def group_advantages(
    scores: Tensor,
    group: Tensor,
    epsilon: float = 1e-4,
    ddof: int = 0,
    std: Literal["group", "global"] = "group",
    clip: float | None = 5.0,
    least_std: float = 0.0,
) -> Tensor:
    """GRPO's advantages A = (score - mean of its group) / (std + epsilon), clipped to +-clip: (B,).

    arXiv 2402.03300, section 4.1.2; Flow-GRPO, arXiv 2505.05470, section 3. A NaN score is left out of the statistics
    and gets 0; so does, exactly, every sample of a group with fewer than two scores or without spread.

    Args:
        scores: (B,).
        group: (B,) prompt indices.
        epsilon: Added to the standard deviation.
        ddof: 0 or 1, subtracted from the count in the standard deviation.
        std: "group" for the standard deviation of the sample's group, "global" for that of all scores at once, as in
            Flow-GRPO's code.
        clip: The largest absolute advantage; None for no limit.
        least_std: The lower bound of the standard deviation.
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


def step_gains(scores: Tensor) -> Tensor:
    """Gains (B, S) or (B, S, K) of every step, from scores (B, S + 1) or (B, S + 1, K) of the states around them.

    The reward difference of DenseGRPO (arXiv 2601.20218, eq. 7); gains sum to the last minus the first score.
    """
    if scores.ndim not in (2, 3) or scores.shape[1] < 2:
        raise ValueError(f"scores must be (B, S + 1) or (B, S + 1, K) with S > 0, not {tuple(scores.shape)}")
    return scores.diff(dim=1)


def stepwise_advantages(gains: Tensor, group: Tensor, floor: float = 0.01, clip: float | None = 5.0) -> Tensor:
    """DenseGRPO's advantages (B, S): each step's gains normalized within the group (arXiv 2601.20218, eq. 8).

    A group whose gains of a step differ by no more than rounding errors gets exactly 0. Neither this nor the floor is
    in the paper, where a late step that changes nothing has its noise amplified to advantages of 1. NaN and groups
    without spread are treated as in ``group_advantages``.

    Args:
        gains: (B, S).
        group: (B,) prompt indices.
        floor: The lower bound of a step's standard deviation, in units of that of the samples' summed gains.
        clip: The largest absolute advantage; None for no limit.
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


def gdpo(
    scores_BK: Tensor,
    group: Tensor,
    weights: Sequence[float],
    epsilon: float = 1e-4,
    ddof: int = 0,
    clip: float | None = 5.0,
) -> Tensor:
    """GDPO (arXiv 2601.05242): each reward normalized within its group, their weighted sum over the batch: (B,).

    A NaN adds nothing, and a sample without any score does not count; it gets 0. So does, exactly, a sample whose
    every reward is without spread in its group.

    Args:
        scores_BK: (B, K).
        group: (B,) prompt indices.
        weights: (K,) of the rewards.
        epsilon: Added to standard deviations.
        ddof: 0 or 1, subtracted from the count in standard deviations.
        clip: The largest absolute advantage; None for no limit.
    """
    weight = _weights(scores_BK, weights)
    normalized = _normalized_columns(scores_BK, group, epsilon, ddof)
    total = (normalized * weight).sum(1)
    scale = _global_std(torch.where(scores_BK.isnan().all(dim=1), math.nan, total), ddof) + epsilon
    # No mean to subtract: every reward's advantages already sum to 0 within every group.
    advantages = torch.where(total == 0, 0.0, total / scale)
    return (advantages if clip is None else advantages.clamp(-clip, clip)).float()


def ngrpo(scores: Tensor, group: Tensor, best: float = 1.0, epsilon: float = 1e-6, clip: float | None = 5.0) -> Tensor:
    """NGRPO (arXiv 2509.18851): z-scores (B,) with one virtual sample of the best possible score in each group.

    A group that failed altogether is pushed away from instead of ignored. NaN is treated as in ``group_advantages``.

    Args:
        scores: (B,).
        group: (B,) prompt indices.
        best: The best possible score.
        epsilon: Added to the standard deviation.
        clip: The largest absolute advantage; None for no limit.
    """
    _require_grouped(scores, group)
    keys = torch.unique(group)
    joined = torch.cat([scores, scores.new_full((len(keys),), best)])
    return group_advantages(joined, torch.cat([group, keys]), epsilon, ddof=1, clip=clip)[: len(scores)]


def log_tamed(scores_BK: Tensor, epsilon: float = 0.0) -> Tensor:
    """PaCo-GRPO's rewards (arXiv 2512.04784): log(1 + R) for those whose std over mean, h, is above the mean of h.

    ValueError for a reward to be tamed of -1 or less. A reward whose mean is not positive has no such h and is left.
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
    """CMO (arXiv 2603.18528): z-scores of K rewards summed with weights softmax((1 - b) / temperature), (B,), not
    yet whitened over the batch.

    b is a reward's mean correlation with the others in the group (1 for one without spread), so that a reward that
    conflicts with them counts more. A group with a missing score sums its z-scores unweighted, missing ones as 0, and a
    single reward is only normalized.
    """
    _require_table(scores_BK)
    z = _normalized_columns(scores_BK, group, epsilon=0.0, ddof=0)
    advantages = z.sum(1)
    missing = scores_BK.isnan().any(dim=1)
    for key in torch.unique(group):
        rows = group == key
        if z.shape[1] > 1 and not bool(missing[rows].any()):
            advantages[rows] = z[rows] @ torch.softmax((1 - _agreement(z[rows])) / temperature, dim=0)
    return advantages.float()


def _agreement(z: Tensor) -> Tensor:
    """The mean correlation (K,) of every column of z-scores (G, K) with the others; 1 for a column of zeros."""
    correlation = z.T @ z / len(z)
    others = (correlation.sum(1) - 1) / (z.shape[1] - 1)
    return torch.where(correlation.diagonal() > 0, others, 1.0)


def _normalized_columns(scores_BK: Tensor, group: Tensor, epsilon: float, ddof: int) -> Tensor:
    """Each reward's group advantages, unclipped: (B, K) float64."""
    columns = [group_advantages(scores, group, epsilon, ddof, clip=None) for scores in scores_BK.unbind(1)]
    return torch.stack(columns, dim=1).double()


def leave_one_out(scores: Tensor, group: Tensor) -> Tensor:
    """RLOO (arXiv 2402.14740): a score minus the mean of the others of its group (B,).

    The result is in units of the score, unclipped. It is 0 for a NaN and in a group with fewer than two scores or
    without spread.
    """
    groups = _group_statistics(scores, group, ddof=0)
    count = torch.bincount(groups.index[~scores.isnan()], minlength=len(groups.mean))[groups.index]
    factor = count / (count - 1).clamp(min=1)
    advantages = (scores.double() - groups.mean[groups.index]) * factor
    return torch.where(groups.live[groups.index] & ~scores.isnan(), advantages, 0.0).float()


def zero_std_share(scores: Tensor, group: Tensor) -> float:
    """The fraction of groups without a gradient: without spread, or with fewer than two scores."""
    return 1.0 - float(_group_statistics(scores, group, ddof=0).live.double().mean())


@dataclass(frozen=True)
class _GroupStatistics:
    """Per group (P,) mean, std and whether it has spread; ``index`` (B,) is the group that each sample is in."""

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
