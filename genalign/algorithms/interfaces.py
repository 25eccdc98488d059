"""Interfaces between the training loop and a training method: scores in, credit and gradients out.

B = P prompts x G samples, S stored steps, K rewards.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from genalign.diffusion.policy import Policy, WeightSnapshot
from genalign.diffusion.rollout import ReplayBatch, ReplayedStep, Rollout, replay
from genalign.diffusion.transitions import Kernel
from genalign.scoring.combine import combine
from genalign.types import Grid, Pipeline


@dataclass(frozen=True)
class RoundScores:
    """The scores of a round's samples.

    ``scores`` (B, K) and their ``weights`` (K,), by prompt index ``group`` (B,). ``stepwise`` (B, S + 1, K) scores the
    ODE completions from before the first stored step to after the last, and ``features`` (B, d) describes the samples;
    both are None unless the recipe asks for them.
    """

    scores: Tensor
    weights: tuple[float, ...]
    group: Tensor
    stepwise: Tensor | None = None
    features: Tensor | None = None

    @property
    def combined(self) -> Tensor:
        """The weighted sum (B,) of the rewards."""
        return combine(self.scores, self.weights)


class Credit(Protocol):
    """A rule that credits each sample (B,), or each of its stored steps (B, S), for the scores of a round."""

    def __call__(self, scores: RoundScores, /) -> Tensor: ...


@dataclass(frozen=True)
class UpdateBatch:
    """Samples of whole groups for one update. ``on_policy``: the current weights sampled them."""

    rollout: Rollout
    credit: Tensor
    group: Tensor
    on_policy: bool

    def __len__(self) -> int:
        return len(self.credit)

    def split(self, size: int) -> Iterator[UpdateBatch]:
        """Split into consecutive parts of at most ``size`` samples."""
        parts = (self.rollout.split(size), torch.split(self.credit, size), torch.split(self.group, size))
        for rollout, credit, group in zip(*parts, strict=True):
            yield UpdateBatch(rollout, credit, group, self.on_policy)

    @property
    def step_credit(self) -> Tensor:
        """The credit (B, S) of every stored step."""
        return self.credit if self.credit.ndim == 2 else self.credit[:, None].expand(-1, len(self.rollout.steps))


@dataclass
class MetricSums:
    """Sums of a round's metrics over its micro-batches, by name, with their element counts.

    ``log_ratio_max`` is a maximum over on-policy samples. ``skipped`` updates are part of no sum.
    """

    values: dict[str, float] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    log_ratio_max: float = 0.0
    skipped: int = 0

    def add(self, name: str, values: Tensor) -> None:
        """Add every element of ``values`` to the sum of ``name``."""
        values = values.detach()
        self.values[name] = self.values.get(name, 0.0) + float(values.sum())
        self.sizes[name] = self.sizes.get(name, 0) + values.numel()

    def snapshot(self) -> MetricSums:
        """A copy of the current sums, for ``rollback``."""
        return MetricSums(dict(self.values), dict(self.sizes), self.log_ratio_max, self.skipped)

    def rollback(self, earlier: MetricSums) -> None:
        """Restore the sums of a ``snapshot``."""
        self.values, self.sizes = dict(earlier.values), dict(earlier.sizes)
        self.log_ratio_max, self.skipped = earlier.log_ratio_max, earlier.skipped

    @classmethod
    def merge(cls, parts: Sequence[Mapping[str, Any]]) -> MetricSums:
        """Add up the sums of several ranks, each as ``vars`` returns it; all ranks skip the same updates."""
        total = cls(log_ratio_max=max(part["log_ratio_max"] for part in parts), skipped=parts[0]["skipped"])
        for part in parts:
            for name, value in part["values"].items():
                total.values[name] = total.values.get(name, 0.0) + value
                total.sizes[name] = total.sizes.get(name, 0) + part["sizes"][name]
        return total

    def mean(self, name: str) -> float:
        """The mean of the elements of ``name``; NaN without any."""
        return self.values[name] / self.sizes[name] if self.sizes.get(name) else math.nan

    def means(self) -> dict[str, float]:
        """The means of all metrics, by name."""
        return {name: self.mean(name) for name in self.values}


@dataclass(frozen=True)
class UpdateContext:
    """The model, the sampler and the metrics of an update. ``old`` are the weights that sample, where they lag."""

    pipeline: Pipeline
    policy: Policy
    grid: Grid
    kernel: Kernel
    guidance: float
    old: WeightSnapshot | None
    metrics: MetricSums

    def replay_batches(self, mask: Tensor) -> list[ReplayBatch]:
        """Batch the pairs (B, S) bool that take part in a loss; with a sharded network batch all pairs, since its ranks
        must run it equally often.
        """
        return ReplayBatch.batches(torch.ones_like(mask) if self.policy.sharded else mask)

    def replay(self, batch: UpdateBatch, pairs: ReplayBatch) -> ReplayedStep:
        """Run stored transitions under the current weights; differentiable."""
        return replay(self.pipeline, batch.rollout, self.grid, self.kernel, pairs, self.guidance)

    def reference_replay(self, batch: UpdateBatch, pairs: ReplayBatch) -> ReplayedStep:
        """Run stored transitions under the reference policy, without gradients."""
        with torch.no_grad(), self.policy.reference():
            return self.replay(batch, pairs)

    @contextlib.contextmanager
    def old_policy(self) -> Iterator[None]:
        """Run the network with the lagging weights that sample, without gradients, within the context."""
        if self.old is None:
            raise ValueError("this objective needs an old policy: give the recipe a lag")
        with torch.no_grad(), self.policy.using(self.old):
            yield


Unit = Literal["sample", "group", "batch"]
"""The samples that a loss ties together, which a micro-batch must not separate."""


class Objective(Protocol):
    """A rule from credit to gradients. The loss of an update is a mean of terms; a micro-batch holds some of them."""

    @property
    def unit(self) -> Unit:
        """The samples that the loss ties together."""

    @property
    def clip_range(self) -> float | None:
        """The clip range of ratios; on-policy log-ratios above 2 % of it hint at a sampling mismatch."""

    def terms(self, batch: UpdateBatch) -> int:
        """The number of terms of the mean in ``batch``."""

    def backward(self, context: UpdateContext, batch: UpdateBatch, scale: float, seed: int) -> None:
        """Add the gradient of ``scale`` times the sum of the batch's terms; ``seed`` draws its noise."""


@runtime_checkable
class KLRegularized(Protocol):
    """An objective with a penalty on the distance from the reference policy."""

    def with_stronger_kl(self, minimum: float) -> Objective:
        """Double the weight of the penalty, to ``minimum`` or more."""


def with_stronger_kl(objective: Objective, minimum: float) -> Objective:
    """Double the weight of an objective's KL penalty, to ``minimum`` or more. ValueError where it cannot have one."""
    if not isinstance(objective, KLRegularized):
        raise ValueError(
            f"{type(objective).__name__} has no distance from the reference policy to weigh: leave raise_kl out, or"
            " choose a recipe with kl or anchor"
        )
    return objective.with_stronger_kl(minimum)


def half_micro_batch(size: int, unit: Unit, group_size: int) -> int | None:
    """At most half of a micro-batch's ``size``, without separating a ``unit``; None where that leaves nothing."""
    if unit == "batch":
        return None
    multiple = group_size if unit == "group" else 1
    return size // 2 // multiple * multiple or None
