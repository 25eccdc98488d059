"""The objective of the GRPO family: a loss on the log-ratios of stored transitions, averaged over samples and steps.

Stored transitions are replayed in batches of as many transitions as the update has samples, so that memory holds the
graph of one network call, whatever the number of stored steps. Transitions without credit are not replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from genalign.algorithms.interfaces import Unit, UpdateBatch, UpdateContext
from genalign.algorithms.losses import (
    KLForm,
    clipped_surrogate,
    guarded_log_ratio,
    kl_penalty,
    require_clip_range,
)
from genalign.diffusion.rollout import ReplayBatch, ReplayedStep
from genalign.diffusion.transitions import Kernel
from genalign.types import Grid


class StepLoss(Protocol):
    """A loss (N,) of N replayed transitions, from their credit (N,)."""

    @property
    def clip_range(self) -> float | None: ...

    def __call__(self, replayed: ReplayedStep, credit: Tensor) -> Tensor: ...


StepWeights = Callable[[Kernel, Grid, Sequence[int]], Tensor]
"""A rule for the weights (S,) of the losses of the stored steps."""


@dataclass(frozen=True)
class ClippedSurrogate:
    """PPO's clipped surrogate, the loss of Flow-GRPO: see ``losses.clipped_surrogate``."""

    clip_range: float

    def __post_init__(self) -> None:
        require_clip_range(self.clip_range)

    def __call__(self, replayed: ReplayedStep, credit: Tensor) -> Tensor:
        return clipped_surrogate(replayed.log_ratio, credit, self.clip_range)


@dataclass(frozen=True)
class GuardedSurrogate(ClippedSurrogate):
    """GRPO-Guard (arXiv 2510.22319): the clipped surrogate of ``losses.guarded_log_ratio`` over the step size."""

    def __call__(self, replayed: ReplayedStep, credit: Tensor) -> Tensor:
        log_ratio = guarded_log_ratio(replayed.new, replayed.old, replayed.x_next)
        step_size = (replayed.step.sigma - replayed.step.sigma_next).to(credit)
        return clipped_surrogate(log_ratio, credit, self.clip_range) / step_size


def noise_weighted(kernel: Kernel, grid: Grid, steps: Sequence[int]) -> Tensor:
    """TempFlow-GRPO's weights (S,) of the trained steps, std / mean(std) (arXiv 2508.04324, eq. 8)."""
    std = kernel(grid[torch.tensor(steps)]).s
    return std / std.mean()


@dataclass(frozen=True)
class PolicyGradient:
    """The mean of a loss over samples and stored steps that have credit, plus a KL penalty.

    Attributes:
        loss: The loss of a transition.
        kl: The weight of the distance from the reference policy, which is added to the loss; 0 for none.
        kl_form: The form of this distance, see ``losses.kl_penalty``.
        weights: The weights of the steps' losses; None weights all steps by 1.
    """

    unit: ClassVar[Unit] = "sample"
    loss: StepLoss
    kl: float = 0.0
    kl_form: KLForm = "exact"
    weights: StepWeights | None = None

    @property
    def clip_range(self) -> float | None:
        return self.loss.clip_range

    def with_stronger_kl(self, minimum: float) -> PolicyGradient:
        return replace(self, kl=max(2 * self.kl, minimum))

    def terms(self, batch: UpdateBatch) -> int:
        """Count the transitions that have credit."""
        return int((batch.step_credit != 0).sum())

    def backward(self, context: UpdateContext, batch: UpdateBatch, scale: float, seed: int) -> None:
        """Replay the transitions with credit, or all transitions under a KL penalty, and accumulate their gradients.

        The distance from the reference policy is also a metric. Without a penalty it is measured on the first batch of
        a round only: by the main rank, or by all ranks if they run a sharded network together.

        Args:
            context: The model, the sampler and the metrics.
            batch: B samples with S stored transitions each.
            scale: The factor of the summed losses.
            seed: Unused, since replay draws no noise.
        """
        steps, credit, policy = batch.rollout.steps, batch.step_credit, context.policy
        weights = self.weights(context.kernel, context.grid, steps) if self.weights else torch.ones(len(steps))
        batches = context.replay_batches((credit != 0) | bool(self.kl))
        unmeasured = "kl" not in context.metrics.values and (policy.processes.is_main or policy.sharded)
        if not batches and unmeasured:
            with torch.no_grad():
                pairs = ReplayBatch.of_step(0, len(batch))
                self._distance(context, batch, pairs, context.replay(batch, pairs))
        for pairs in batches:
            replayed = context.replay(batch, pairs)
            losses = self.loss(replayed, credit[pairs.index].to(replayed.x_next.device))
            losses = weights[pairs.index[1]].to(losses) * losses
            if self.kl or unmeasured:
                losses = losses + self.kl * self._distance(context, batch, pairs, replayed)
                unmeasured = False
            torch.autograd.backward(losses.sum() * scale)
            context.metrics.add("loss", losses)
            context.add_ratio_metrics(batch, replayed, self.clip_range)

    def _distance(
        self, context: UpdateContext, batch: UpdateBatch, pairs: ReplayBatch, replayed: ReplayedStep
    ) -> Tensor:
        """Distance (N,) of replayed transitions from the reference policy, which is also added to the metrics."""
        base = context.reference_replay(batch, pairs)
        distance = kl_penalty(self.kl_form, replayed.new, base.new, replayed.prediction, base.prediction, replayed.step)
        context.metrics.add("kl", distance)
        return distance
