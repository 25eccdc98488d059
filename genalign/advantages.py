"""Credit: from scores and groups to advantages.

Scores are float and a group is a long tensor of the same length that says which prompt each sample answers, in any
order; groups may differ in size. NaN means that a score is missing. Arithmetic is in float64, results are float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

# Scores are float32: what differs by less than this share of their size does not differ.
_RELATIVE_RESOLUTION = 1e-7


def combine(scores_BK: Tensor, weights: Sequence[float]) -> Tensor:
    """The weighted sum (B,) of K rewards; NaN where a reward of non-zero weight is NaN.

    A reward of weight 0 is only reported: it changes nothing, NaN or not.
    """
    if scores_BK.ndim != 2 or scores_BK.shape[1] != len(weights):
        raise ValueError(f"scores must be (B, K) with one weight per column, not {tuple(scores_BK.shape)}, {weights}")
    weight = torch.tensor(weights, dtype=torch.float64, device=scores_BK.device)
    if not bool(weight.isfinite().all()):
        raise ValueError(f"weights must be finite, not {weights}")
    used = weight != 0
    return (scores_BK.double()[:, used] * weight[used]).sum(1).float()


def group_advantages(
    scores: Tensor,
    group: Tensor,
    epsilon: float = 1e-4,
    ddof: int = 0,
    std: Literal["group", "global"] = "group",
    clip: float | None = 5.0,
) -> Tensor:
    """(score - mean of its group) / (std + epsilon), clipped to +-clip: (B,). GRPO (arXiv 2402.03300, section 4.1.2).

    ``std`` is that of the sample's group or, as in Flow-GRPO's code, of all scores at once; ``ddof`` 0 or 1 is what its
    count is reduced by. A NaN score is left out of the statistics and gets 0; so does, exactly, every sample of a group
    with fewer than two scores or without spread.
    """
    if std not in ("group", "global"):
        raise ValueError(f'std must be "group" or "global", not {std!r}')
    if ddof not in (0, 1):
        raise ValueError(f"ddof must be 0 or 1, not {ddof}")
    groups = _group_statistics(scores, group, ddof)
    scale = groups.std[groups.index] if std == "group" else _global_std(scores, ddof)
    advantages = (scores.double() - groups.mean[groups.index]) / (scale + epsilon)
    counted = groups.live[groups.index] & ~scores.isnan()
    advantages = torch.where(counted, advantages, 0.0)
    return (advantages if clip is None else advantages.clamp(-clip, clip)).float()


def zero_std_share(scores: Tensor, group: Tensor) -> float:
    """The share of groups that teach nothing: without spread, or with fewer than two scores."""
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


def _require_grouped(scores: Tensor, group: Tensor) -> None:
    if scores.ndim != 1 or group.shape != scores.shape or len(scores) == 0:
        raise ValueError(f"scores and group must be (B,) with B > 0, not {tuple(scores.shape)}, {tuple(group.shape)}")
    if group.dtype != torch.long:
        raise TypeError(f"group must hold prompt indices (torch.long), not {group.dtype}")
    if bool(scores.isinf().any()):
        raise ValueError("scores must not be infinite; a reward that failed is NaN")
