"""The trajectory family: objectives on log-ratios of stored transitions, one replayed step at a time.

Memory holds one step's graph, however many steps are stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from genalign.dynamics import Kernel
from genalign.learning import Batch, Context, live_pairs, per_step
from genalign.objectives import KLForm, clip_fraction, clipped_surrogate, kl_penalty
from genalign.rollout import Replay
from genalign.types import Grid


class StepLoss(Protocol):
    """The loss (B,) of one transition of each sample, from its credit (B,)."""

    @property
    def clip_range(self) -> float | None: ...

    def __call__(self, again: Replay, credit: Tensor) -> Tensor: ...


class StepWeights(Protocol):
    """What the losses of the stored steps are multiplied by: (S,)."""

    def __call__(self, kernel: Kernel, grid: Grid, steps: Sequence[int]) -> Tensor: ...


@dataclass(frozen=True)
class Clipped:
    """PPO's clipped surrogate (arXiv 1707.06347, eq. 7)."""

    clip_range: float

    def __call__(self, again: Replay, credit: Tensor) -> Tensor:
        return clipped_surrogate(again.log_ratio, credit, self.clip_range)


@dataclass(frozen=True)
class Surrogate:
    """A mean over samples and stored steps of ``loss``, each step times its weight, plus ``kl`` times a distance from
    the reference policy. Samples without credit do not count in the mean."""

    loss: StepLoss
    kl: float = 0.0
    kl_form: KLForm = "exact"
    weights: StepWeights | None = None

    @property
    def clip_range(self) -> float | None:
        """That of the loss."""
        return self.loss.clip_range

    def terms(self, batch: Batch) -> int:
        """Pairs of a sample and a stored step that have credit."""
        return live_pairs(batch)

    def backward(self, context: Context, batch: Batch, scale: float, seed: int) -> None:
        """Step by step."""
        steps = batch.sampled.steps
        weights = self.weights(context.kernel, context.grid, steps).tolist() if self.weights else [1.0] * len(steps)
        for stored, weight in enumerate(weights):
            again = context.replay(batch, stored)
            losses = weight * self.loss(again, batch.step_credit(stored).to(again.x_next.device))
            if self.kl or "kl" not in context.readings.values:
                losses = losses + self.kl * self._distance(context, batch, stored, again)
            (losses.sum() * scale).backward()
            context.readings.add("loss", losses)
            _read_ratio(context, batch, again, self.clip_range)

    def _distance(self, context: Context, batch: Batch, stored: int, again: Replay) -> Tensor:
        """The distance (B,) from the reference policy; read at least once a round."""
        base = context.reference_replay(batch, stored)
        distance = kl_penalty(self.kl_form, again.new, base.new, again.prediction, base.prediction, again.step)
        context.readings.add("kl", distance)
        return distance


def _read_ratio(context: Context, batch: Batch, again: Replay, clip_range: float | None) -> None:
    log_ratio = again.log_ratio.detach()
    if clip_range is not None:
        context.readings.add("clip_fraction", clip_fraction(log_ratio, clip_range).reshape(1))
    if batch.first:
        context.readings.log_ratio_max = max(context.readings.log_ratio_max, float(log_ratio.abs().max()))


class CoupledLoss(Protocol):
    """A loss () over all samples and steps of a batch at once: of the log-ratios (B, S) to the reference policy under
    the current and the sampling weights, the credit (B,) and the prompt index (B,). A sum over prompts."""

    def __call__(self, log_ratios: Tensor, old_log_ratios: Tensor, credit: Tensor, group: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Coupled:
    """A loss that ties a trajectory's steps and a group's samples together, by two passes.

    The first evaluates every log-ratio without a graph, which gives the loss and its derivative for each of them; the
    second replays step by step and adds that multiple of its gradient. That is exact, and memory does not grow with
    the number of steps. (The derivative of a log-ratio does not depend on what it is a ratio to, so that the second
    pass needs no reference.)
    """

    loss: CoupledLoss
    live_groups: GroupCount
    clip_range: float | None = None

    def terms(self, batch: Batch) -> int:
        """Prompts that teach something."""
        return self.live_groups(batch.credit, batch.group)

    def backward(self, context: Context, batch: Batch, scale: float, seed: int) -> None:
        """Two passes."""
        old, current = self._log_ratios(context, batch)
        current.requires_grad_(True)
        loss = self.loss(current, old, batch.credit.to(current.device), batch.group.to(current.device))
        (slopes,) = torch.autograd.grad(loss, current)
        context.readings.add("loss", loss.reshape(1))
        for stored in range(len(batch.sampled.steps)):
            again = context.replay(batch, stored)
            (scale * (slopes[:, stored] * again.log_ratio).sum()).backward()  # type: ignore[no-untyped-call]
            _read_ratio(context, batch, again, self.clip_range)

    @torch.no_grad()
    def _log_ratios(self, context: Context, batch: Batch) -> tuple[Tensor, Tensor]:
        """Log-ratios to the reference (B, S) of the sampling and of the current policy."""
        old, current = [], []
        for stored in range(len(batch.sampled.steps)):
            base = context.reference_replay(batch, stored)
            old.append(base.old.log_ratio(base.new, base.x_next))
            moved = base.old if batch.first else context.replay(batch, stored).new
            current.append(moved.log_ratio(base.new, base.x_next))
            context.readings.add("kl", moved.kl(base.new))
        return per_step(old), per_step(current)


class GroupCount(Protocol):
    """How many prompts of a batch have something to learn from, by credit (B,) and prompt index (B,)."""

    def __call__(self, credit: Tensor, group: Tensor) -> int: ...
