"""Objectives on the log-ratios of stored transitions.

``PolicyGradient`` averages a loss over transitions, as the GRPO family does. ``CoupledObjective`` takes losses that
couple the steps of a trajectory and the samples of a prompt, such as PRDP's. B counts samples and S stored steps.

Stored transitions are replayed in batches of as many transitions as the update has samples, so memory holds the
graph of one network call, whatever the number of stored steps. Transitions without credit are not replayed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from genalign.algorithms.interfaces import TermCounts, TermScales, Unit, UpdateBatch, UpdateContext
from genalign.algorithms.losses import (
    ClipRange,
    KLForm,
    chi_squared,
    clip_fraction,
    clip_sides,
    clipped_surrogate,
    dppo_mask,
    guarded_log_ratio,
    kl_penalty,
    require_per_sample,
)
from genalign.diffusion.paths import expand
from genalign.diffusion.rollout import ReplayBatch, ReplayedStep
from genalign.diffusion.transitions import Kernel, trainable_steps
from genalign.types import Grid


class StepLoss(Protocol):
    """A loss (N,) of N replayed transitions, from their credit (N,)."""

    @property
    def clip_range(self) -> ClipRange:
        """The range of ratios against which the mismatch of sampling and replay is checked, see ``Objective``."""

    def clip_fraction(self, replayed: ReplayedStep) -> Tensor:
        """Fraction () of the transitions that are too far from the sampling policy, for any credit; detached."""

    def __call__(self, replayed: ReplayedStep, credit: Tensor) -> Tensor: ...


StepWeights = Callable[[Kernel, Grid, Sequence[int]], Tensor]
"""A rule for the weights (S,) of the losses of the stored steps."""


@dataclass(frozen=True)
class ClippedSurrogate:
    """PPO's clipped surrogate, the loss of Flow-GRPO: see ``losses.clipped_surrogate``."""

    clip_range: ClipRange

    def __post_init__(self) -> None:
        clip_sides(self.clip_range)

    def clip_fraction(self, replayed: ReplayedStep) -> Tensor:
        return clip_fraction(replayed.log_ratio.detach(), self.clip_range)

    def __call__(self, replayed: ReplayedStep, credit: Tensor) -> Tensor:
        return clipped_surrogate(replayed.log_ratio, credit, self.clip_range)


@dataclass(frozen=True)
class GuardedSurrogate(ClippedSurrogate):
    """GRPO-Guard (arXiv 2510.22319): the clipped surrogate of ``losses.guarded_log_ratio`` over the step size."""

    def clip_fraction(self, replayed: ReplayedStep) -> Tensor:
        with torch.no_grad():
            return clip_fraction(guarded_log_ratio(replayed.new, replayed.old, replayed.x_next), self.clip_range)

    def __call__(self, replayed: ReplayedStep, credit: Tensor) -> Tensor:
        log_ratio = guarded_log_ratio(replayed.new, replayed.old, replayed.x_next)
        step_size = expand(replayed.step.sigma - replayed.step.sigma_next, log_ratio)
        return clipped_surrogate(log_ratio, credit, self.clip_range) / step_size


@dataclass(frozen=True)
class MaskedSurrogate:
    """Flow-DPPO (arXiv 2606.11025): the surrogate -A r of the transitions in ``losses.dppo_mask``, without clipping.

    ``limit`` is the trust region in KL, a mean over dimensions. The loss of a transition outside the mask is exactly 0,
    and so is its gradient, whatever its ratio.
    """

    clip_range: ClassVar[float] = 1e-4  # clips nothing: the usual range, which sampling and replay are compared by
    limit: float = 1e-5

    def __post_init__(self) -> None:
        if not self.limit >= 0:
            raise ValueError(f"limit must be a KL divergence of 0 or more, not {self.limit}")

    def clip_fraction(self, replayed: ReplayedStep) -> Tensor:
        with torch.no_grad():
            return (replayed.new.kl(replayed.old) > self.limit).float().mean()

    def __call__(self, replayed: ReplayedStep, credit: Tensor) -> Tensor:
        log_ratio = replayed.log_ratio
        with torch.no_grad():
            mask = dppo_mask(log_ratio, replayed.new.kl(replayed.old), credit, self.limit)
        # Twice: an infinite ratio times the gradient 0 of the outer one would be NaN
        ratio = torch.where(mask, log_ratio, 0.0).exp()
        return torch.where(mask, -credit * ratio, 0.0)


def noise_weighted(kernel: Kernel, grid: Grid, steps: Sequence[int]) -> Tensor:
    """TempFlow-GRPO's weights (S,) of steps, std / mean(std) (arXiv 2508.04324, eq. 8).

    The mean is over all trainable steps of the grid: a step's weight does not depend on the others of its round.
    """
    std = kernel(grid[torch.arange(len(grid))]).s
    return std[list(steps)] / std[list(trainable_steps(kernel, grid))].mean()


@dataclass(frozen=True)
class PolicyGradient:
    """The mean of a loss over samples and stored steps that have credit, plus a KL penalty over the same ones.

    The published Flow-GRPO likewise drops samples without advantage together with their KL.

    Attributes:
        loss: The loss of a transition.
        kl: The weight of the mean distance from the reference policy, which is added to the loss; 0 for none.
        kl_form: The form of this distance, see ``losses.kl_penalty``.
        weights: The weights of the steps' losses; None weights all steps by 1.
        kl_sharpness: The sharpness of the penalty, see ``losses.chi_squared``; 0 for the distance itself, which the
            metrics show for any sharpness.
    """

    unit: ClassVar[Unit] = "sample"
    loss: StepLoss
    kl: float = 0.0
    kl_form: KLForm = "exact"
    weights: StepWeights | None = None
    kl_sharpness: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.kl_sharpness < math.inf:
            raise ValueError(f"kl_sharpness must be at least 0, not {self.kl_sharpness}; 0 is the KL itself")

    @property
    def clip_range(self) -> float:
        """The clip range of the loss, the smaller one where it has two."""
        return min(clip_sides(self.loss.clip_range))

    def with_stronger_kl(self, minimum: float) -> PolicyGradient:
        return replace(self, kl=max(2 * self.kl, minimum))

    def terms(self, batch: UpdateBatch) -> TermCounts:
        """Count the transitions that have credit."""
        count = int((batch.step_credit != 0).sum())
        return TermCounts(count, count)

    def backward(self, context: UpdateContext, batch: UpdateBatch, scales: TermScales, seed: int) -> None:
        """Replay the transitions with credit, and accumulate their gradients.

        The distance from the reference policy is also a metric. Without a penalty it is measured on the first batch of
        a round only: by the main rank, or by all ranks if they run a sharded network together.

        Args:
            context: The model, the sampler and the metrics.
            batch: B samples with S stored transitions each.
            scales: The factors of the summed losses and distances.
            seed: Unused, since replay draws no noise.
        """
        steps, credit, policy = batch.rollout.steps, batch.step_credit, context.policy
        weights = self.weights(context.kernel, context.grid, steps) if self.weights else torch.ones(len(steps))
        batches = context.replay_batches(credit != 0)
        unmeasured = "kl" not in context.metrics.sizes and (policy.processes.is_main or policy.sharded)
        if not batches and unmeasured:
            with torch.no_grad():
                pairs = ReplayBatch.of_step(0, len(batch))
                self._distance(context, batch, pairs, context.replay(batch, pairs))
        for pairs in batches:
            replayed = context.replay(batch, pairs)
            advantages = credit[pairs.index]
            device = replayed.x_next.device
            losses = self.loss(replayed, advantages.to(device, non_blocking=True))
            losses = weights[pairs.index[1]].to(device, losses.dtype, non_blocking=True) * losses
            total = losses.sum() * scales.losses
            if self.kl or unmeasured:
                distance = self._distance(context, batch, pairs, replayed)
                sharpened = chi_squared(distance, self.kl_sharpness)
                penalty = self.kl * (advantages != 0).to(device, distance.dtype, non_blocking=True) * sharpened
                losses, total = losses + penalty, total + penalty.sum() * scales.distances
                unmeasured = False
            torch.autograd.backward(total)
            context.metrics.add("loss", losses)
            context.add_ratio_metrics(batch, replayed, self.loss.clip_fraction(replayed))

    def _distance(
        self, context: UpdateContext, batch: UpdateBatch, pairs: ReplayBatch, replayed: ReplayedStep
    ) -> Tensor:
        """Distance (N,) of replayed transitions from the reference policy, which is also added to the metrics."""
        base = context.reference_replay(batch, pairs)
        distance = kl_penalty(self.kl_form, replayed.new, base.new, replayed.prediction, base.prediction, replayed.step)
        context.metrics.add("kl", distance)
        return distance


class CoupledLoss(Protocol):
    """A loss () of all samples and steps of a batch at once: a sum of terms, one for each prompt that has any.

    Its arguments are the log-ratios (B, S) of the current and of the sampling policy to the reference policy, and on
    the CPU the credit (B,) and the prompt index (B,). It may depend only on the samples that ``used`` selects; the
    log-ratios of others may be 0.
    """

    @property
    def clip_range(self) -> float | None: ...

    def terms(self, credit: Tensor, group: Tensor) -> int: ...

    def used(self, credit: Tensor, group: Tensor) -> Tensor: ...

    def __call__(self, log_ratios: Tensor, old_log_ratios: Tensor, credit: Tensor, group: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class PRDPLoss:
    """PRDP (arXiv 2402.08714, eq. 14-21 and appendix G): regression of log-ratio differences on reward differences.

    For a pair of a prompt's samples, let d be the difference of their log-ratios to the reference policy, reduced over
    steps, and g the difference of their rewards. The loss is max((d - g / beta)^2, (d_clipped - g / beta)^2), averaged
    over the pairs of a prompt and summed over prompts. In d_clipped, each step's log-ratio is clipped to within
    ``clip_range`` of the sampling policy's. Pairs of equal rewards, and pairs with a reward of NaN, are left out; a
    prompt without pairs adds 0.

    Attributes:
        beta: The strength of the KL constraint to the reference policy.
        clip_range: The range of a step's log-ratio around the sampling policy's.
        steps: The reduction over steps: "mean" as in the paper's listing, or "sum" as in its text. With "sum", beta
            must be S times smaller for the same strength.
    """

    beta: float
    clip_range: float
    steps: Literal["mean", "sum"] = "mean"

    def __post_init__(self) -> None:
        clip_sides(self.clip_range)
        if not self.beta > 0:
            raise ValueError(f"beta must be positive, not {self.beta}")
        if self.steps not in ("mean", "sum"):
            raise ValueError(f'steps must be "mean" or "sum", not {self.steps!r}')

    def terms(self, credit: Tensor, group: Tensor) -> int:
        return len(torch.unique(group[self.used(credit, group)]))

    def used(self, credit: Tensor, group: Tensor) -> Tensor:
        """Mask (B,) bool of the samples in a pair: those whose prompt has a sample with a different reward."""
        require_per_sample(len(group), rewards=credit)
        mask = torch.zeros_like(group, dtype=torch.bool)
        for key in torch.unique(group):
            mask[torch.cat(_untied_pairs(credit, group == key))] = True
        return mask

    def __call__(self, log_ratios: Tensor, old_log_ratios: Tensor, credit: Tensor, group: Tensor) -> Tensor:
        clipped = torch.clamp(log_ratios, old_log_ratios - self.clip_range, old_log_ratios + self.clip_range)
        plain, limited = (ratio.mean(1) if self.steps == "mean" else ratio.sum(1) for ratio in (log_ratios, clipped))
        total = log_ratios[:0].sum()  # 0 with a gradient of 0, also where the log-ratio of a left-out sample is NaN
        for key in torch.unique(group):
            better, worse = _untied_pairs(credit, group == key)
            if len(better):
                target = (credit[better] - credit[worse]).to(plain.dtype) / self.beta
                pair = (better, worse, target)
                better, worse, target = (part.to(plain.device, non_blocking=True) for part in pair)
                losses = [(ratio[better] - ratio[worse] - target).square() for ratio in (plain, limited)]
                total = total + torch.maximum(*losses).mean()
        return total


def _untied_pairs(rewards: Tensor, member: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the better and of the worse sample of every pair of members; NaN forms no pair."""
    rows = member.nonzero()[:, 0]
    better = rewards[rows][:, None] > rewards[rows][None, :]
    first, second = better.nonzero(as_tuple=True)
    return rows[first], rows[second]


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

    def terms(self, batch: UpdateBatch) -> TermCounts:
        return TermCounts(self.loss.terms(batch.credit, batch.group), 0)

    def backward(self, context: UpdateContext, batch: UpdateBatch, scales: TermScales, seed: int) -> None:
        used = self.loss.used(batch.credit, batch.group)[:, None].expand(-1, len(batch.rollout.steps))
        batches = context.replay_batches(used)
        old, current = batch.rollout.final.new_zeros(2, len(batch), len(batch.rollout.steps))
        with torch.no_grad():
            for pairs in batches:
                base = context.reference_replay(batch, pairs)
                place = pairs.index_on(old.device)
                old[place] = base.old.log_ratio(base.new, base.x_next)
                new = base.old if batch.on_policy else context.replay(batch, pairs).new
                current[place] = new.log_ratio(base.new, base.x_next)
                context.metrics.add("kl", new.kl(base.new))
        current.requires_grad_(True)
        loss = self.loss(current, old, batch.credit, batch.group)
        (slopes,) = torch.autograd.grad(loss, current)
        context.metrics.add("loss", loss.reshape(1))
        for pairs in batches:
            replayed = context.replay(batch, pairs)
            slope = slopes[pairs.index_on(slopes.device)]
            torch.autograd.backward(scales.losses * (slope * replayed.log_ratio).sum())
            fraction = None if self.clip_range is None else clip_fraction(replayed.log_ratio, self.clip_range)
            context.add_ratio_metrics(batch, replayed, fraction)
