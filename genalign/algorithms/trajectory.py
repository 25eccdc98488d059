"""The trajectory family: objectives on log-ratios of stored transitions.

Stored transitions are replayed in batches of as many as there are samples, so that memory holds the graph of one step,
however many are stored. Transitions that are not part of the loss are not replayed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from genalign.algorithms.interfaces import Unit, UpdateBatch, UpdateContext
from genalign.algorithms.losses import (
    KLForm,
    clip_fraction,
    clipped_surrogate,
    dppo_mask,
    guarded_log_ratio,
    kl_penalty,
    noise_weights,
    prdp_loss,
    require_clip_range,
    untied,
    untied_groups,
)
from genalign.diffusion.rollout import ReplayBatch, ReplayedStep
from genalign.diffusion.transitions import Kernel
from genalign.types import Grid


class StepLoss(Protocol):
    """The loss (N,) of N replayed transitions, from their credit (N,)."""

    @property
    def clip_range(self) -> float | None: ...

    def __call__(self, replayed: ReplayedStep, credit: Tensor) -> Tensor: ...


class StepWeights(Protocol):
    """Weights (S,) of the losses of the stored steps."""

    def __call__(self, kernel: Kernel, grid: Grid, steps: Sequence[int]) -> Tensor: ...


@dataclass(frozen=True)
class ClippedSurrogate:
    """PPO's clipped surrogate (arXiv 1707.06347, eq. 7), the loss of Flow-GRPO."""

    clip_range: float

    def __post_init__(self) -> None:
        require_clip_range(self.clip_range)

    def __call__(self, replayed: ReplayedStep, credit: Tensor) -> Tensor:
        return clipped_surrogate(replayed.log_ratio, credit, self.clip_range)


@dataclass(frozen=True)
class GuardedSurrogate:
    """GRPO-Guard (arXiv 2510.22319): the clipped surrogate on normalized log-ratios, divided by sigma - sigma_next."""

    clip_range: float

    def __post_init__(self) -> None:
        require_clip_range(self.clip_range)

    def __call__(self, replayed: ReplayedStep, credit: Tensor) -> Tensor:
        log_ratio = guarded_log_ratio(replayed.new, replayed.old, replayed.x_next)
        step_size = (replayed.step.sigma - replayed.step.sigma_next).to(credit)
        return clipped_surrogate(log_ratio, credit, self.clip_range) / step_size


@dataclass(frozen=True)
class MaskedSurrogate:
    """Flow-DPPO (arXiv 2606.11025): no clipping; steps beyond ``limit`` in KL that would move further are left out."""

    limit: float = 1e-5
    clip_range: float | None = None

    def __call__(self, replayed: ReplayedStep, credit: Tensor) -> Tensor:
        with torch.no_grad():
            mask = dppo_mask(replayed.log_ratio, replayed.new.kl(replayed.old), credit, self.limit)
        return -credit * replayed.log_ratio.exp() * mask


def noise_weighted(kernel: Kernel, grid: Grid, steps: Sequence[int]) -> Tensor:
    """TempFlow-GRPO's ``StepWeights``: each step weighted by its noise, with mean 1 over the trained steps."""
    return noise_weights(kernel(grid[torch.tensor(steps)]).s)


@dataclass(frozen=True)
class PolicyGradient:
    """The objective of the GRPO family: the mean of a loss over samples and stored steps, plus a KL penalty.

    Each step's ``loss`` is multiplied by its weight, and ``kl`` times the distance from the reference policy is added.
    Samples without credit do not count in the mean.
    """

    loss: StepLoss
    kl: float = 0.0
    kl_form: KLForm = "exact"
    weights: StepWeights | None = None

    @property
    def unit(self) -> Unit:
        return "sample"

    @property
    def clip_range(self) -> float | None:
        return self.loss.clip_range

    def with_stronger_kl(self, minimum: float) -> PolicyGradient:
        return replace(self, kl=max(2 * self.kl, minimum))

    def terms(self, batch: UpdateBatch) -> int:
        """Count the pairs of a sample and a stored step that have credit."""
        return int((batch.step_credit != 0).sum())

    def backward(self, context: UpdateContext, batch: UpdateBatch, scale: float, seed: int) -> None:
        """Replay the pairs with credit, or all pairs under a KL penalty, and accumulate their gradients.

        The distance from the reference policy is a metric too: without a penalty, one replay a round measures it.

        Args:
            context: The model and the sampler.
            batch: The samples.
            scale: The factor of the sum of losses.
            seed: Not used, since replay draws no noise.
        """
        steps, credit = batch.rollout.steps, batch.step_credit
        weights = self.weights(context.kernel, context.grid, steps) if self.weights else torch.ones(len(steps))
        parts = context.replay_batches((credit != 0) | bool(self.kl))
        if not parts and _measures_distance(context):
            with torch.no_grad():
                pairs = ReplayBatch.of_step(0, len(batch))
                self._distance(context, batch, pairs, context.replay(batch, pairs))
        for pairs in parts:
            replayed = context.replay(batch, pairs)
            losses = self.loss(replayed, credit[pairs.index].to(replayed.x_next.device))
            losses = weights[pairs.index[1]].to(losses) * losses
            if self.kl or _measures_distance(context):
                losses = losses + self.kl * self._distance(context, batch, pairs, replayed)
            torch.autograd.backward(losses.sum() * scale)
            context.metrics.add("loss", losses)
            _add_ratio_metrics(context, batch, replayed, self.clip_range)

    def _distance(
        self, context: UpdateContext, batch: UpdateBatch, pairs: ReplayBatch, replayed: ReplayedStep
    ) -> Tensor:
        """The distance (N,) from the reference policy, which is added to the metrics."""
        base = context.reference_replay(batch, pairs)
        distance = kl_penalty(self.kl_form, replayed.new, base.new, replayed.prediction, base.prediction, replayed.step)
        context.metrics.add("kl", distance)
        return distance


def _measures_distance(context: UpdateContext) -> bool:
    """Whether this rank measures the distance from the reference for the metrics: once a round, on the main rank, or on
    all ranks where they run a sharded network together.
    """
    policy = context.policy
    return "kl" not in context.metrics.values and (policy.processes.is_main or policy.sharded)


def _add_ratio_metrics(
    context: UpdateContext, batch: UpdateBatch, replayed: ReplayedStep, clip_range: float | None
) -> None:
    log_ratio = replayed.log_ratio.detach()
    if clip_range is not None:
        context.metrics.add("clip_fraction", clip_fraction(log_ratio, clip_range).reshape(1))
    if batch.on_policy:
        context.metrics.log_ratio_max = max(context.metrics.log_ratio_max, float(log_ratio.abs().max()))


class CoupledLoss(Protocol):
    """A loss () over all samples and steps of a batch at once, a sum over ``terms`` of one prompt each.

    It takes the log-ratios (B, S) to the reference policy under the current and the sampling weights, the credit (B,)
    and the prompt index (B,). It depends on the samples ``used`` (B,) bool alone; log-ratios of the others may be 0.
    """

    @property
    def clip_range(self) -> float | None: ...

    def terms(self, credit: Tensor, group: Tensor) -> int: ...

    def used(self, credit: Tensor, group: Tensor) -> Tensor: ...

    def __call__(self, log_ratios: Tensor, old_log_ratios: Tensor, credit: Tensor, group: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class PRDPLoss:
    """PRDP (arXiv 2402.08714): differences of log-ratios regress on those of rewards; a term is a prompt."""

    beta: float
    clip_range: float
    steps: Literal["mean", "sum"] = "mean"

    def __post_init__(self) -> None:
        require_clip_range(self.clip_range)

    def terms(self, credit: Tensor, group: Tensor) -> int:
        return untied_groups(credit, group)

    def used(self, credit: Tensor, group: Tensor) -> Tensor:
        return untied(credit, group)

    def __call__(self, log_ratios: Tensor, old_log_ratios: Tensor, credit: Tensor, group: Tensor) -> Tensor:
        return prdp_loss(log_ratios, old_log_ratios, credit, group, self.beta, self.clip_range, self.steps)


@dataclass(frozen=True)
class CoupledObjective:
    """The objective of a loss that ties a trajectory's steps and a group's samples together, in two passes.

    The first pass evaluates every log-ratio without a graph, which gives the loss and its derivative for each of them;
    the second replays step by step and adds that multiple of its gradient. The sum is the exact gradient, and memory
    does not grow with the number of steps. (The derivative of a log-ratio does not depend on what it is a ratio to, so
    that the second pass needs no reference.)
    """

    loss: CoupledLoss

    @property
    def unit(self) -> Unit:
        return "group"

    @property
    def clip_range(self) -> float | None:
        return self.loss.clip_range

    def terms(self, batch: UpdateBatch) -> int:
        return self.loss.terms(batch.credit, batch.group)

    def backward(self, context: UpdateContext, batch: UpdateBatch, scale: float, seed: int) -> None:
        used = self.loss.used(batch.credit, batch.group)[:, None].expand(-1, len(batch.rollout.steps))
        parts = context.replay_batches(used)
        old, current = batch.rollout.x.new_zeros(2, len(batch), len(batch.rollout.steps))
        with torch.no_grad():
            for pairs in parts:
                base = context.reference_replay(batch, pairs)
                old[pairs.index] = base.old.log_ratio(base.new, base.x_next)
                new = base.old if batch.on_policy else context.replay(batch, pairs).new
                current[pairs.index] = new.log_ratio(base.new, base.x_next)
                context.metrics.add("kl", new.kl(base.new))
        current.requires_grad_(True)
        loss = self.loss(current, old, batch.credit.to(current.device), batch.group.to(current.device))
        (slopes,) = torch.autograd.grad(loss, current)
        context.metrics.add("loss", loss.reshape(1))
        for pairs in parts:
            replayed = context.replay(batch, pairs)
            torch.autograd.backward(scale * (slopes[pairs.index] * replayed.log_ratio).sum())
            _add_ratio_metrics(context, batch, replayed, self.clip_range)
