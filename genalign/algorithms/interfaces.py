"""Interfaces between the training loop and a training method: scores in, credit and gradients out.

B counts the samples of a round or batch (P prompts x G samples per prompt), S stored steps, K rewards.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from genalign.diffusion.paths import promote
from genalign.diffusion.policy import Policy, WeightSnapshot
from genalign.diffusion.rollout import ReplayBatch, ReplayedStep, Rollout, replay
from genalign.diffusion.transitions import ODE, Kernel
from genalign.runtime.state import Stateful
from genalign.scoring.score import NamedReward, combine
from genalign.types import Grid, Pipeline, Prompt


@dataclass(frozen=True)
class RoundScores:
    """The scores of a round's samples.

    Attributes:
        scores: Scores (B, K); NaN where a reward failed.
        weights: The weights (K,) of the rewards.
        group: The prompt index (B,) long of each sample.
        stepwise: Scores (B, S + 1, K) of the ODE completions of the states before the first stored step, between stored
            steps, and after the last; None without a ``completion`` of the recipe.
        features: Features (B, d) of the samples; None without ``features`` of the recipe.
        task: The task index (B,) long of each sample's prompt; None counts all prompts as one task.
        names: The names (K,) of the rewards, for credit that treats some of them differently.
        seed: The name of the round, from which a credit derives random numbers; the same on every rank.
    """

    scores: Tensor
    weights: tuple[float, ...]
    group: Tensor
    stepwise: Tensor | None = None
    features: Tensor | None = None
    task: Tensor | None = None
    names: tuple[str, ...] = ()
    seed: str = ""

    @property
    def combined(self) -> Tensor:
        """Weighted sum (B,) of the rewards."""
        return combine(self.scores, self.weights)

    @property
    def combined_stepwise(self) -> Tensor:
        """Weighted sums (B, S + 1) of the completions' rewards. Raises ValueError if there are none."""
        if self.stepwise is None:
            raise ValueError("credit per step needs scores of every stored state: give the recipe a completion")
        samples, states, rewards = self.stepwise.shape
        return combine(self.stepwise.reshape(-1, rewards), self.weights).view(samples, states)

    def column_of(self, name: str) -> int:
        """Return the column of the reward ``name``. Raises ValueError where no reward has this name."""
        if name not in self.names:
            names = f"the rewards are {', '.join(self.names)}" if self.names else "the rewards have no names"
            raise ValueError(f"the credit names the reward {name!r}, but {names}")
        return self.names.index(name)


class Credit(Protocol):
    """A rule from the scores of a round to the credit of each sample (B,), or of each of its stored steps (B, S)."""

    def __call__(self, scores: RoundScores, /) -> Tensor: ...


@runtime_checkable
class SingleSampleCredit(Protocol):
    """A credit that does not compare the samples of a prompt, so groups of one are allowed."""

    takes_single_samples: ClassVar[bool]


@dataclass(frozen=True)
class UpdateBatch:
    """The samples of one update: whole groups, with their credit (B,) or (B, S) and prompt index ``group`` (B,).

    ``on_policy`` says that the current weights sampled them. ``by_reward`` is the credit by each of K rewards
    separately, (B, K) or (B, S, K), for a recipe that balances rewards.
    """

    rollout: Rollout
    credit: Tensor
    group: Tensor
    on_policy: bool
    by_reward: Tensor | None = None

    def __len__(self) -> int:
        return len(self.credit)

    def split(self, size: int) -> Iterator[UpdateBatch]:
        """Split into consecutive parts of at most ``size`` samples."""
        parts = (self.rollout.split(size), torch.split(self.credit, size), torch.split(self.group, size))
        for rollout, credit, group in zip(*parts, strict=True):
            yield UpdateBatch(rollout, credit, group, self.on_policy)

    def select(self, rows: Tensor) -> UpdateBatch:
        """Copy the samples ``rows`` (N,)."""
        by_reward = None if self.by_reward is None else self.by_reward[rows]
        return UpdateBatch(self.rollout.select(rows), self.credit[rows], self.group[rows], self.on_policy, by_reward)

    def weighted(self, weights: Tensor) -> UpdateBatch:
        """Replace the credit by the sum of the rewards' own credits, times ``weights`` (K,)."""
        assert self.by_reward is not None, "the recipe balances rewards"
        return replace(self, credit=(self.by_reward.double() @ weights).float())

    def to(self, device: torch.device) -> UpdateBatch:
        """Move the trajectories to ``device``; credit and prompt index stay on the CPU."""
        return replace(self, rollout=self.rollout.to(device))

    @property
    def step_credit(self) -> Tensor:
        """Credit (B, S) of every stored step; the credit of a sample applies to all of its steps."""
        return self.credit if self.credit.ndim == 2 else self.credit[:, None].expand(-1, len(self.rollout.steps))


@dataclass
class MetricSums:
    """Sums of a round's metrics over its micro-batches, by name, with the numbers of their elements.

    ``log_ratio_max`` is the largest |log-ratio| of on-policy samples. ``skipped`` counts the updates that were left
    out because of values that are not finite; they are part of no sum.
    """

    values: dict[str, float] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    log_ratio_max: float = 0.0
    skipped: int = 0
    _unread: list[tuple[str, Tensor]] = field(default_factory=list)  # on the device, which is not waited for

    def add(self, name: str, values: Tensor, size: int | None = None) -> None:
        """Add the elements of ``values`` to the sum of ``name``, counted as ``size`` elements (None: their number)."""
        values = values.detach()
        self.sizes[name] = self.sizes.get(name, 0) + (values.numel() if size is None else size)
        self._unread.append((name, values.sum()))

    def measures(self, name: str) -> bool:
        """Whether ``name`` has any element yet."""
        return bool(self.sizes.get(name))

    def add_log_ratios(self, log_ratios: Tensor) -> None:
        """Raise ``log_ratio_max`` to the largest absolute value of ``log_ratios``."""
        self._unread.append(("log_ratio_max", log_ratios.detach().abs().max()))

    def read(self) -> MetricSums:
        """Wait for the device, and add what is pending to ``values`` and ``log_ratio_max``."""
        names, tensors = zip(*self._unread, strict=True) if self._unread else ((), ())
        for name, value in zip(names, torch.stack(promote(*tensors)).tolist() if tensors else (), strict=True):
            if name == "log_ratio_max":
                self.log_ratio_max = max(self.log_ratio_max, value)
            else:
                self.values[name] = self.values.get(name, 0.0) + value
        self._unread.clear()
        return self

    def as_dict(self) -> dict[str, Any]:
        """Return the sums for ``merge``."""
        return {name: value for name, value in vars(self.read()).items() if name != "_unread"}

    def snapshot(self) -> MetricSums:
        """Copy the current sums, for ``rollback``."""
        return copy.deepcopy(self.read())

    def rollback(self, earlier: MetricSums) -> None:
        """Restore the sums of a ``snapshot``."""
        vars(self).update(copy.deepcopy(vars(earlier)))

    @classmethod
    def merge(cls, parts: Sequence[Mapping[str, Any]]) -> MetricSums:
        """Add up the sums of several ranks, each as ``as_dict`` returns them; all ranks skip the same updates."""
        total = cls(log_ratio_max=max(part["log_ratio_max"] for part in parts), skipped=parts[0]["skipped"])
        for part in parts:
            for name, value in part["values"].items():
                total.values[name] = total.values.get(name, 0.0) + value
                total.sizes[name] = total.sizes.get(name, 0) + part["sizes"][name]
        return total

    def mean(self, name: str) -> float:
        """Return the mean of the elements of ``name``; NaN if there are none."""
        self.read()
        return self.values[name] / self.sizes[name] if self.sizes.get(name) else math.nan

    def means(self) -> dict[str, float]:
        """Return the means of all metrics, by name."""
        return {name: self.mean(name) for name in self.read().values}


class PartMetrics(MetricSums):
    """The metrics of one part of a sum of objectives, written into the sum's metrics as ``part/metric``.

    The loss, times ``share``, is also added to the sum's loss, and the distance ``kl`` to the sum's mean.

    Args:
        whole: The metrics of the sum.
        part: The name of the part.
        share: The factor of an element of its loss in the sum's loss.
        counted: Whether its elements count in the size of the sum's loss, as those of exactly one part do.
    """

    def __init__(self, whole: MetricSums, part: str, share: float, counted: bool) -> None:
        super().__init__()
        self.whole, self.part, self.share, self.counted = whole, part, share, counted

    def add(self, name: str, values: Tensor, size: int | None = None) -> None:
        self.whole.add(f"{self.part}/{name}", values, size)
        if name == "loss":
            self.whole.add("loss", self.share * values, size if self.counted else 0)
        if name == "kl":
            self.whole.add("kl", values, size)

    def measures(self, name: str) -> bool:
        return self.whole.measures(f"{self.part}/{name}")

    def add_log_ratios(self, log_ratios: Tensor) -> None:
        self.whole.add_log_ratios(log_ratios)


@dataclass(frozen=True)
class UpdateContext:
    """The model, the sampler, the rewards, the metrics of an update, and the recipe's companion, if it has one.

    ``old`` holds the sampling weights of a recipe with a lag (None without one), ``memory`` the weights of its memory.
    ``prompts`` are those of the round, which ``UpdateBatch.group`` indexes. ``kernel`` samples the stored steps and
    ``elsewhere`` the others.
    """

    pipeline: Pipeline
    policy: Policy
    grid: Grid
    kernel: Kernel
    guidance: float
    old: WeightSnapshot | None
    metrics: MetricSums
    prompts: Sequence[Prompt] = ()
    rewards: Sequence[NamedReward] = ()
    memory: WeightSnapshot | None = None
    companion: Companion | None = None
    elsewhere: Kernel = ODE()  # noqa: RUF009  # kernels are frozen

    def replay_batches(self, mask: Tensor) -> list[ReplayBatch]:
        """Batch the stored transitions that a mask (B, S) bool selects.

        With a sharded network all transitions are batched: its ranks must run it equally often.
        """
        return ReplayBatch.batches(torch.ones_like(mask) if self.policy.sharded else mask)

    def replay(self, batch: UpdateBatch, pairs: ReplayBatch) -> ReplayedStep:
        """Replay stored transitions under the current weights; differentiable."""
        return replay(self.pipeline, batch.rollout, self.grid, self.kernel, pairs, self.guidance)

    def reference_replay(self, batch: UpdateBatch, pairs: ReplayBatch) -> ReplayedStep:
        """Replay stored transitions under the reference policy, without gradients."""
        with torch.no_grad(), self.policy.reference():
            return self.replay(batch, pairs)

    def add_ratio_metrics(self, batch: UpdateBatch, replayed: ReplayedStep, clip_fraction: Tensor | None) -> None:
        """Add the clip fraction () and, on-policy, the largest |log-ratio| of replayed transitions to the metrics."""
        if clip_fraction is not None:
            self.metrics.add("clip_fraction", clip_fraction.reshape(1))
        if batch.on_policy:
            self.metrics.add_log_ratios(replayed.log_ratio)


class Companion(Stateful, Protocol):
    """A network that learns beside the policy, once per round from its samples, and is part of checkpoints."""

    def update(self, context: UpdateContext, parts: Sequence[UpdateBatch], total: int, seed: int) -> None:
        """Learn from a round before the policy does, and add metrics to ``context.metrics``.

        Every rank calls this with its own samples, and must make the same update.

        Args:
            context: The model, the policy, the rewards and the metrics.
            parts: This rank's samples in micro-batches.
            total: The number of samples on all ranks.
            seed: The seed of all noise.
        """


@dataclass(frozen=True)
class TermCounts:
    """The numbers of terms of an update's two means: the losses, and the distances from the reference policy.

    ``parts`` are the counts of the objectives in a sum, each of which takes its own means.
    """

    losses: int
    distances: int
    parts: tuple[TermCounts, ...] = ()

    def __add__(self, other: TermCounts) -> TermCounts:
        parts = self.parts or other.parts
        if self.parts and other.parts:
            parts = tuple(one + another for one, another in zip(self.parts, other.parts, strict=True))
        return TermCounts(self.losses + other.losses, self.distances + other.distances, parts)

    def as_list(self) -> list[Any]:
        """Return the numbers as JSON types."""
        return [self.losses, self.distances, [part.as_list() for part in self.parts]]

    @classmethod
    def from_list(cls, value: Sequence[Any]) -> Self:
        """Restore the result of ``as_list``."""
        losses, distances, parts = value
        return cls(losses, distances, tuple(map(cls.from_list, parts)))


@dataclass(frozen=True)
class TermScales:
    """The factors of the summed losses and of the summed distances of a micro-batch, for an update's means."""

    losses: float
    distances: float
    parts: tuple[TermScales, ...] = ()

    @classmethod
    def of_means(cls, counts: TermCounts, loss_scale: float = 1.0) -> Self:
        """Divide ``loss_scale`` by the counts; 0 where there are none."""
        losses, distances = (loss_scale / count if count else 0.0 for count in (counts.losses, counts.distances))
        return cls(losses, distances, tuple(cls.of_means(part, loss_scale) for part in counts.parts))

    def without_distances(self) -> TermScales:
        """Return the scales with 0 for all distances."""
        return TermScales(self.losses, 0.0, tuple(part.without_distances() for part in self.parts))

    def times(self, weight: float) -> TermScales:
        """Multiply all scales by ``weight``."""
        return TermScales(weight * self.losses, weight * self.distances, tuple(p.times(weight) for p in self.parts))


Unit = Literal["sample", "group", "batch"]
"""The samples that a loss ties together: a micro-batch must not separate them."""


class Objective(Protocol):
    """A rule from credit to gradients.

    The loss of an update is a mean of losses plus a weighted mean of distances from the reference policy; some of the
    terms of both are in each micro-batch.
    """

    @property
    def unit(self) -> Unit:
        """The samples that the loss ties together."""

    @property
    def clip_range(self) -> float | None:
        """The clip range of ratios, or None.

        On-policy log-ratios above 2 % of it hint at a mismatch between sampling and replay.
        """

    def terms(self, batch: UpdateBatch) -> TermCounts:
        """Count the terms of both means in ``batch``."""

    def backward(self, context: UpdateContext, batch: UpdateBatch, scales: TermScales, seed: int) -> None:
        """Accumulate the gradient of the sums of the batch's losses and distances, each times its scale.

        All noise of the loss is drawn from ``seed``.
        """


@dataclass(frozen=True)
class ObjectiveTraits:
    """What the training loop must know about an objective.

    Attributes:
        through_sampler: Whether its gradient runs through the sampler that made the samples. These must then be the
            current policy's, and the graph of one sample may span all of its stored steps.
        reward_gradients: Whether it differentiates the rewards that count.
        student_guidance: The CFG scale that is distilled into the policy, a few-step student of a guided teacher that
            samples at guidance 1; None for none.
    """

    through_sampler: bool = False
    reward_gradients: bool = False
    student_guidance: float | None = None


@runtime_checkable
class HasTraits(Protocol):
    """An objective with traits other than those of a loss on stored steps or final samples."""

    @property
    def traits(self) -> ObjectiveTraits:
        """What the training loop must know about it."""


def traits_of(objective: Objective) -> ObjectiveTraits:
    """Return the traits of an objective, or the defaults if it declares none."""
    return objective.traits if isinstance(objective, HasTraits) else ObjectiveTraits()


@runtime_checkable
class KLRegularized(Protocol):
    """An objective with a penalty on the distance from the reference policy."""

    def with_stronger_kl(self, minimum: float) -> Objective:
        """Return the objective with twice the weight of the penalty, and at least ``minimum``."""


def with_stronger_kl(objective: Objective, minimum: float) -> Objective:
    """Return an objective with twice the weight of its KL penalty, and at least ``minimum``.

    Raises:
        ValueError: The objective has no such penalty.
    """
    if not isinstance(objective, KLRegularized):
        raise ValueError(
            f"{type(objective).__name__} has no penalty on the distance from the reference policy: leave raise_kl out,"
            " or choose a recipe with kl or anchor"
        )
    return objective.with_stronger_kl(minimum)


def half_micro_batch(size: int, unit: Unit, group_size: int) -> int | None:
    """Return the largest size up to half a micro-batch that splits no ``unit``; None if there is none."""
    if unit == "batch":
        return None
    multiple = group_size if unit == "group" else 1
    return size // 2 // multiple * multiple or None
