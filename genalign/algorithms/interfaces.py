"""What the loop hands to a training method: a round's outcome to be credited, and batches to learn from.

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
from genalign.types import Conditioning, Grid, NoiseLevel, Pipeline


@dataclass(frozen=True)
class RoundScores:
    """What a round's samples were worth.

    ``scores`` (B, K) and their ``weights`` (K,), by prompt index ``group`` (B,). ``stepwise`` (B, S + 1, K) scores the
    ODE completions from before the first stored step to after the last, where the recipe asks for them, and
    ``features`` (B, d) describes the samples, likewise.
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
    """From a round's outcome to what each sample (B,), or each of its stored steps (B, S), is credited with."""

    def __call__(self, outcome: RoundScores) -> Tensor: ...


@dataclass(frozen=True)
class UpdateBatch:
    """Samples of whole groups that are learnt from together. ``on_policy``: the current weights sampled them."""

    rollout: Rollout
    credit: Tensor
    group: Tensor
    on_policy: bool

    def __len__(self) -> int:
        return len(self.credit)

    def split(self, size: int) -> Iterator[UpdateBatch]:
        """Consecutive parts of at most ``size`` samples."""
        parts = (self.rollout.split(size), torch.split(self.credit, size), torch.split(self.group, size))
        for sampled, credit, group in zip(*parts, strict=True):
            yield UpdateBatch(sampled, credit, group, self.on_policy)

    @property
    def step_credit(self) -> Tensor:
        """The credit (B, S) of every stored step."""
        return self.credit if self.credit.ndim == 2 else self.credit[:, None].expand(-1, len(self.rollout.steps))


@dataclass
class MetricSums:
    """What is logged about a round: sums over its micro-batches, by name, of means weighted by their sizes; updates
    that were ``skipped`` are in none."""

    values: dict[str, float] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    log_ratio_max: float = 0.0
    skipped: int = 0

    def add(self, name: str, values: Tensor) -> None:
        """Take in the elements of ``values``."""
        found = values.detach()
        self.values[name] = self.values.get(name, 0.0) + float(found.sum())
        self.sizes[name] = self.sizes.get(name, 0) + found.numel()

    def snapshot(self) -> MetricSums:
        """As they are now."""
        return MetricSums(dict(self.values), dict(self.sizes), self.log_ratio_max, self.skipped)

    def rollback(self, earlier: MetricSums) -> None:
        """To a copy."""
        self.values, self.sizes = dict(earlier.values), dict(earlier.sizes)
        self.log_ratio_max, self.skipped = earlier.log_ratio_max, earlier.skipped

    @classmethod
    def merge(cls, parts: Sequence[Mapping[str, Any]]) -> MetricSums:
        """Those of several processes, each as ``vars`` shows it; all skip the same updates."""
        total = cls(log_ratio_max=max(part["log_ratio_max"] for part in parts), skipped=parts[0]["skipped"])
        for part in parts:
            for name, value in part["values"].items():
                total.values[name] = total.values.get(name, 0.0) + value
                total.sizes[name] = total.sizes.get(name, 0) + part["sizes"][name]
        return total

    def mean(self, name: str) -> float:
        """The mean of what was added under ``name``; NaN for nothing."""
        return self.values[name] / self.sizes[name] if self.sizes.get(name) else math.nan

    def means(self) -> dict[str, float]:
        """All means."""
        return {name: self.mean(name) for name in self.values}


@dataclass(frozen=True)
class UpdateContext:
    """The model and the sampler as they are now."""

    pipeline: Pipeline
    policy: Policy
    grid: Grid
    kernel: Kernel
    guidance: float
    old: WeightSnapshot | None
    metrics: MetricSums

    def replay_batches(self, live: Tensor) -> list[ReplayBatch]:
        """Batches of the pairs (B, S) bool that have a part in a loss; of all, where the network is divided among
        processes, which must run it equally often."""
        return ReplayBatch.batches(torch.ones_like(live) if self.policy.sharded else live)

    def replay(self, batch: UpdateBatch, pairs: ReplayBatch) -> ReplayedStep:
        """Stored transitions under the current weights; differentiable."""
        return replay(self.pipeline, batch.rollout, self.grid, self.kernel, pairs, self.guidance)

    def reference_replay(self, batch: UpdateBatch, pairs: ReplayBatch) -> ReplayedStep:
        """The same under the weights that training started from."""
        with torch.no_grad(), self.policy.reference():
            return self.replay(batch, pairs)

    def predict(self, x: Tensor, level: NoiseLevel, conditioning: Conditioning) -> Tensor:
        """The network's output under the current weights; differentiable."""
        return self.pipeline.predict(x, level, conditioning, self.guidance)

    @contextlib.contextmanager
    def old_policy(self) -> Iterator[None]:
        """The weights that sample, where the recipe lets them lag behind the current ones."""
        if self.old is None:
            raise ValueError("this objective needs an old policy: give the recipe a lag")
        with torch.no_grad(), self.policy.using(self.old):
            yield


Unit = Literal["sample", "group", "batch"]
"""What a loss ties together, and a micro-batch must not part."""


class Objective(Protocol):
    """How credit becomes a gradient. An update's loss is a mean of terms; a micro-batch holds some of them."""

    @property
    def unit(self) -> Unit:
        """What it ties together."""

    @property
    def clip_range(self) -> float | None:
        """Where on-policy log-ratios above 2% of it hint at a disagreement between sampling and training."""

    def terms(self, batch: UpdateBatch) -> int:
        """How many terms of the mean are in ``batch``."""

    def backward(self, context: UpdateContext, batch: UpdateBatch, scale: float, seed: int) -> None:
        """Add the gradient of ``scale`` times the sum of the batch's terms; ``seed`` is for what it draws."""


@runtime_checkable
class KLRegularized(Protocol):
    """An objective that can pull the policy towards the one that training started from."""

    def with_stronger_kl(self, least: float) -> Objective:
        """With twice the pull, of weight ``least`` or more."""


def with_stronger_kl(objective: Objective, least: float) -> Objective:
    """With twice the pull, of weight ``least`` or more. ValueError for an objective that has none."""
    if not isinstance(objective, KLRegularized):
        raise ValueError(
            f"{type(objective).__name__} has no distance from the reference policy to weigh: leave raise_kl out, or"
            " choose a recipe with kl or anchor"
        )
    return objective.with_stronger_kl(least)


def half_micro_batch(size: int, unit: Unit, group_size: int) -> int | None:
    """At most half of a micro-batch's ``size``, which parts no ``unit``; None where that leaves nothing."""
    if unit == "batch":
        return None
    whole = group_size if unit == "group" else 1
    return size // 2 // whole * whole or None
