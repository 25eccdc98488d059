"""Objectives of losses that tie the steps of a trajectory and the samples of a prompt together, such as PRDP's.

B counts samples and S stored steps of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from genalign.algorithms.interfaces import Unit, UpdateBatch, UpdateContext
from genalign.algorithms.losses import require_clip_range, require_per_sample


def prdp_loss(
    log_ratios: Tensor,
    old_log_ratios: Tensor,
    rewards: Tensor,
    group: Tensor,
    beta: float,
    clip_range: float,
    steps: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """PRDP's loss (arXiv 2402.08714, eq. 14-21 and appendix G): log-ratio differences regress on reward differences.

    For a pair of a prompt's samples, let d be the difference of their log-ratios to the reference policy, reduced over
    steps, and g the difference of their rewards. The loss is max((d - g / beta)^2, (d_clipped - g / beta)^2), averaged
    over the pairs of a prompt and summed over prompts. In d_clipped, each step's log-ratio is clipped to within
    ``clip_range`` of the sampling policy's. Pairs of equal rewards, and pairs with a reward of NaN, are left out; a
    prompt without pairs adds 0.

    Args:
        log_ratios: Log-ratios (B, S) of the current to the reference policy.
        old_log_ratios: Log-ratios (B, S) of the sampling to the reference policy.
        rewards: Rewards (B,).
        group: Prompt indices (B,).
        beta: The strength of the KL constraint to the reference policy.
        clip_range: The range of a step's log-ratio around the sampling policy's.
        steps: The reduction over steps: "mean" as in the paper's listing, or "sum" as in its text. With "sum", beta
            must be S times smaller for the same strength.

    Returns:
        The loss ().

    Raises:
        ValueError: The shapes do not fit, ``beta`` or ``clip_range`` is not positive, or ``steps`` is unknown.
    """
    if log_ratios.ndim != 2 or log_ratios.shape != old_log_ratios.shape:
        shapes = f"{tuple(log_ratios.shape)} and {tuple(old_log_ratios.shape)}"
        raise ValueError(f"log_ratios and old_log_ratios must both be (B, S), not {shapes}")
    require_per_sample(len(log_ratios), rewards=rewards, group=group)
    if not beta > 0 or not clip_range > 0:
        raise ValueError(f"beta and clip_range must be positive, not {beta} and {clip_range}")
    if steps not in ("mean", "sum"):
        raise ValueError(f'steps must be "mean" or "sum", not {steps!r}')
    clipped = torch.clamp(log_ratios, old_log_ratios - clip_range, old_log_ratios + clip_range)
    plain, limited = (ratios.mean(1) if steps == "mean" else ratios.sum(1) for ratios in (log_ratios, clipped))
    total = log_ratios[:0].sum()  # 0 with a gradient of 0, also where the log-ratio of a left-out sample is NaN
    for key in torch.unique(group):
        better, worse = _untied_pairs(rewards, group == key)
        if len(better):
            target = (rewards[better] - rewards[worse]).to(plain.dtype) / beta
            losses = [(ratio[better] - ratio[worse] - target).square() for ratio in (plain, limited)]
            total = total + torch.maximum(*losses).mean()
    return total


def _untied_pairs(rewards: Tensor, member: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the better and of the worse sample of every pair of members; NaN forms no pair."""
    rows = member.nonzero()[:, 0]
    better = rewards[rows][:, None] > rewards[rows][None, :]
    first, second = better.nonzero(as_tuple=True)
    return rows[first], rows[second]


class CoupledLoss(Protocol):
    """A loss () of all samples and steps of a batch at once: a sum of terms, one for each prompt that has any.

    Its arguments are the log-ratios (B, S) of the current and of the sampling to the reference policy, the credit (B,)
    and the prompt index (B,). Only the samples that ``used`` selects may change it; the log-ratios of others may be 0.
    """

    @property
    def clip_range(self) -> float | None: ...

    def terms(self, credit: Tensor, group: Tensor) -> int: ...

    def used(self, credit: Tensor, group: Tensor) -> Tensor: ...

    def __call__(self, log_ratios: Tensor, old_log_ratios: Tensor, credit: Tensor, group: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class PRDPLoss:
    """PRDP's loss as a ``CoupledLoss`` with one term per prompt: see ``prdp_loss``."""

    beta: float
    clip_range: float
    steps: Literal["mean", "sum"] = "mean"

    def __post_init__(self) -> None:
        require_clip_range(self.clip_range)

    def terms(self, credit: Tensor, group: Tensor) -> int:
        return len(torch.unique(group[self.used(credit, group)]))

    def used(self, credit: Tensor, group: Tensor) -> Tensor:
        """Mask (B,) bool of the samples with a pair: their prompt has a sample of another reward."""
        require_per_sample(len(group), rewards=credit)
        mask = torch.zeros_like(group, dtype=torch.bool)
        for key in torch.unique(group):
            mask[torch.cat(_untied_pairs(credit, group == key))] = True
        return mask

    def __call__(self, log_ratios: Tensor, old_log_ratios: Tensor, credit: Tensor, group: Tensor) -> Tensor:
        return prdp_loss(log_ratios, old_log_ratios, credit, group, self.beta, self.clip_range, self.steps)


@dataclass(frozen=True)
class CoupledObjective:
    """The exact gradient of a coupled loss, in memory that does not grow with the number of steps.

    A first pass computes all log-ratios without a graph, and the derivative of the loss for each of them. A second pass
    replays step by step and adds this derivative times the gradient of the log-ratio. It needs no reference policy: a
    log-ratio has the same gradient for any fixed denominator.
    """

    unit: ClassVar[Unit] = "group"
    loss: CoupledLoss

    @property
    def clip_range(self) -> float | None:
        return self.loss.clip_range

    def terms(self, batch: UpdateBatch) -> int:
        return self.loss.terms(batch.credit, batch.group)

    def backward(self, context: UpdateContext, batch: UpdateBatch, scale: float, seed: int) -> None:
        used = self.loss.used(batch.credit, batch.group)[:, None].expand(-1, len(batch.rollout.steps))
        batches = context.replay_batches(used)
        old, current = batch.rollout.x.new_zeros(2, len(batch), len(batch.rollout.steps))
        with torch.no_grad():
            for pairs in batches:
                base = context.reference_replay(batch, pairs)
                old[pairs.index] = base.old.log_ratio(base.new, base.x_next)
                new = base.old if batch.on_policy else context.replay(batch, pairs).new
                current[pairs.index] = new.log_ratio(base.new, base.x_next)
                context.metrics.add("kl", new.kl(base.new))
        current.requires_grad_(True)
        loss = self.loss(current, old, batch.credit.to(current.device), batch.group.to(current.device))
        (slopes,) = torch.autograd.grad(loss, current)
        context.metrics.add("loss", loss.reshape(1))
        for pairs in batches:
            replayed = context.replay(batch, pairs)
            torch.autograd.backward(scale * (slopes[pairs.index] * replayed.log_ratio).sum())
            context.add_ratio_metrics(batch, replayed, self.clip_range)
