"""The trajectory family: objectives on log-ratios of stored transitions.

They are replayed in batches of as many as there are samples: memory holds the graph of one, however many steps are
stored. What has no part in the loss is not replayed.
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
    """The loss (B,) of one transition of each sample, from its credit (B,)."""

    @property
    def clip_range(self) -> float | None: ...

    def __call__(self, again: ReplayedStep, credit: Tensor) -> Tensor: ...


class StepWeights(Protocol):
    """What the losses of the stored steps are multiplied by: (S,)."""

    def __call__(self, kernel: Kernel, grid: Grid, steps: Sequence[int]) -> Tensor: ...


@dataclass(frozen=True)
class ClippedSurrogate:
    """PPO's clipped surrogate (arXiv 1707.06347, eq. 7)."""

    clip_range: float

    def __post_init__(self) -> None:
        require_clip_range(self.clip_range)

    def __call__(self, again: ReplayedStep, credit: Tensor) -> Tensor:
        return clipped_surrogate(again.log_ratio, credit, self.clip_range)


@dataclass(frozen=True)
class GuardedSurrogate:
    """GRPO-Guard (arXiv 2510.22319): the clipped surrogate on normalised log-ratios, divided by sigma - sigma_next."""

    clip_range: float

    def __post_init__(self) -> None:
        require_clip_range(self.clip_range)

    def __call__(self, again: ReplayedStep, credit: Tensor) -> Tensor:
        log_ratio = guarded_log_ratio(again.new, again.old, again.x_next)
        return clipped_surrogate(log_ratio, credit, self.clip_range) / (again.step.sigma - again.step.sigma_next).to(
            credit
        )


@dataclass(frozen=True)
class MaskedSurrogate:
    """Flow-DPPO (arXiv 2606.11025): no clipping; what is further than ``limit`` in KL and moving away is left out."""

    limit: float = 1e-5
    clip_range: float | None = None

    def __call__(self, again: ReplayedStep, credit: Tensor) -> Tensor:
        with torch.no_grad():
            keep = dppo_mask(again.log_ratio, again.new.kl(again.old), credit, self.limit)
        return -credit * again.log_ratio.exp() * keep


def noise_weighted(kernel: Kernel, grid: Grid, steps: Sequence[int]) -> Tensor:
    """TempFlow-GRPO's ``StepWeights``: a step counts by its noise, with mean 1 over the trained steps."""
    return noise_weights(kernel(grid[torch.tensor(steps)]).s)


@dataclass(frozen=True)
class PolicyGradient:
    """A mean over samples and stored steps of ``loss``, each step times its weight, plus ``kl`` times a distance from
    the reference policy. Samples without credit do not count in the mean."""

    loss: StepLoss
    kl: float = 0.0
    kl_form: KLForm = "exact"
    weights: StepWeights | None = None

    @property
    def unit(self) -> Unit:
        """A sample."""
        return "sample"

    @property
    def clip_range(self) -> float | None:
        """That of the loss."""
        return self.loss.clip_range

    def with_stronger_kl(self, least: float) -> PolicyGradient:
        """With twice ``kl``, ``least`` or more."""
        return replace(self, kl=max(2 * self.kl, least))

    def terms(self, batch: UpdateBatch) -> int:
        """Pairs of a sample and a stored step that have credit."""
        return int((batch.step_credit != 0).sum())

    def backward(self, context: UpdateContext, batch: UpdateBatch, scale: float, seed: int) -> None:
        """Only pairs with credit are replayed, unless all are pulled towards the reference policy."""
        steps, credit = batch.rollout.steps, batch.step_credit
        weights = self.weights(context.kernel, context.grid, steps) if self.weights else torch.ones(len(steps))
        parts = context.replay_batches((credit != 0) | bool(self.kl))
        if not parts and _reads_distance(context):
            self._report(context, batch)
        for pairs in parts:
            again, (_, stored) = context.replay(batch, pairs), pairs.index
            losses = self.loss(again, credit[pairs.index].to(again.x_next.device))
            losses = weights[stored].to(losses) * losses
            if self.kl or _reads_distance(context):
                losses = losses + self.kl * self._distance(context, batch, pairs, again)
            torch.autograd.backward(losses.sum() * scale)
            context.metrics.add("loss", losses)
            _read_ratio(context, batch, again, self.clip_range)

    @torch.no_grad()
    def _report(self, context: UpdateContext, batch: UpdateBatch) -> None:
        """Read the distance where nothing is learnt."""
        pairs = ReplayBatch.of_step(0, len(batch))
        self._distance(context, batch, pairs, context.replay(batch, pairs))

    def _distance(self, context: UpdateContext, batch: UpdateBatch, pairs: ReplayBatch, again: ReplayedStep) -> Tensor:
        """The distance (N,) from the reference policy; read at least once a round."""
        base = context.reference_replay(batch, pairs)
        distance = kl_penalty(self.kl_form, again.new, base.new, again.prediction, base.prediction, again.step)
        context.metrics.add("kl", distance)
        return distance


def _reads_distance(context: UpdateContext) -> bool:
    """Whether a distance is due that only reports: one in a round, by the first process, or by all of them where they
    run the network together."""
    policy = context.policy
    return "kl" not in context.metrics.values and (policy.processes.is_main or policy.sharded)


def _read_ratio(context: UpdateContext, batch: UpdateBatch, again: ReplayedStep, clip_range: float | None) -> None:
    log_ratio = again.log_ratio.detach()
    if clip_range is not None:
        context.metrics.add("clip_fraction", clip_fraction(log_ratio, clip_range).reshape(1))
    if batch.on_policy:
        context.metrics.log_ratio_max = max(context.metrics.log_ratio_max, float(log_ratio.abs().max()))


class CoupledLoss(Protocol):
    """A loss () over all samples and steps of a batch at once: of the log-ratios (B, S) to the reference policy under
    the current and the sampling weights, the credit (B,) and the prompt index (B,). A sum over ``terms`` of them, each
    of one prompt. It depends on the samples ``used`` (B,) bool alone; the log-ratios of the others may be 0."""

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
        """Prompts whose rewards are not all equal."""
        return untied_groups(credit, group)

    def used(self, credit: Tensor, group: Tensor) -> Tensor:
        """Their samples."""
        return untied(credit, group)

    def __call__(self, log_ratios: Tensor, old_log_ratios: Tensor, credit: Tensor, group: Tensor) -> Tensor:
        return prdp_loss(log_ratios, old_log_ratios, credit, group, self.beta, self.clip_range, self.steps)


@dataclass(frozen=True)
class CoupledObjective:
    """A loss that ties a trajectory's steps and a group's samples together, by two passes.

    The first evaluates every log-ratio without a graph, which gives the loss and its derivative for each of them; the
    second replays step by step and adds that multiple of its gradient. That is exact, and memory does not grow with
    the number of steps. (The derivative of a log-ratio does not depend on what it is a ratio to, so that the second
    pass needs no reference.)
    """

    loss: CoupledLoss

    @property
    def unit(self) -> Unit:
        """A group."""
        return "group"

    @property
    def clip_range(self) -> float | None:
        """That of the loss."""
        return self.loss.clip_range

    def terms(self, batch: UpdateBatch) -> int:
        """Those of the loss."""
        return self.loss.terms(batch.credit, batch.group)

    def backward(self, context: UpdateContext, batch: UpdateBatch, scale: float, seed: int) -> None:
        """Two passes."""
        used = self.loss.used(batch.credit, batch.group)[:, None].expand(-1, len(batch.rollout.steps))
        parts = context.replay_batches(used)
        old, current = self._log_ratios(context, batch, parts)
        current.requires_grad_(True)
        loss = self.loss(current, old, batch.credit.to(current.device), batch.group.to(current.device))
        (slopes,) = torch.autograd.grad(loss, current)
        context.metrics.add("loss", loss.reshape(1))
        for pairs in parts:
            again = context.replay(batch, pairs)
            torch.autograd.backward(scale * (slopes[pairs.index] * again.log_ratio).sum())
            _read_ratio(context, batch, again, self.clip_range)

    @torch.no_grad()
    def _log_ratios(
        self, context: UpdateContext, batch: UpdateBatch, parts: Sequence[ReplayBatch]
    ) -> tuple[Tensor, Tensor]:
        """Log-ratios to the reference (B, S) of the sampling and of the current policy; 0 for what is in no part."""
        old, current = batch.rollout.x.new_zeros(2, len(batch), len(batch.rollout.steps))
        for pairs in parts:
            base = context.reference_replay(batch, pairs)
            old[pairs.index] = base.old.log_ratio(base.new, base.x_next)
            moved = base.old if batch.on_policy else context.replay(batch, pairs).new
            current[pairs.index] = moved.log_ratio(base.new, base.x_next)
            context.metrics.add("kl", moved.kl(base.new))
        return old, current
