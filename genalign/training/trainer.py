"""The loop: prompts -> rollouts -> rewards -> credit -> objective on replays -> optimiser step. One screen a stage.

B = P prompts x G samples, S trained steps, K rewards.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from genalign.algorithms.advantages import zero_std_share
from genalign.algorithms.interfaces import MetricSums, RoundScores, UpdateBatch, UpdateContext, anchored, halved
from genalign.algorithms.recipes import Recipe
from genalign.diffusion.noise import derived_seed
from genalign.diffusion.policy import Policy, WeightSnapshot
from genalign.diffusion.sampling import Sampling
from genalign.prompts import PromptSampler
from genalign.runtime.files import load_optimizer_tensors, optimizer_tensors, with_prefix, without_prefix
from genalign.runtime.fsdp import whole
from genalign.runtime.state import State
from genalign.scoring.budget import Ledger, Metered, metered_rewards, peak_memory
from genalign.scoring.score import NamedReward, Watch
from genalign.training.nonfinite import BadUpdate, Skipping, finite, is_out_of_memory
from genalign.training.sampler import Sampled, Sampler
from genalign.types import Pipeline, Prompt, PromptSet, TrainableReward

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """Geometry and optimisation.

    A round samples ``prompts_per_round`` x ``group_size`` images in batches of ``batch_size`` and makes
    ``updates_per_round`` optimiser steps on them. A run ends after ``rounds``, or with the round that reaches
    ``max_forwards`` denoiser evaluations of single samples, guidance twice. The learning rate stays, or falls linearly
    to zero at the run's end. "adamw8bit" keeps Adam's moments in 8 bits (bitsandbytes, an extra).

    A run ends with a round of which more than ``failed_share`` could not be scored, and after ``skipped_updates`` in a
    row that were left out because their gradient was not finite. Where memory runs out while learning, it ends
    ("stop"), or goes on with fewer samples at a time ("halve"), which changes no gradient beyond rounding.

    With ``overlap``, a batch is decoded and scored while the next one is sampled, in a thread: for rewards that take
    time elsewhere, such as on a server. The results are the same, and one batch more is in memory.
    """

    rounds: int = 100
    max_forwards: int | None = None
    prompts_per_round: int = 16
    group_size: int = 12
    batch_size: int = 96
    updates_per_round: int = 2
    learning_rate: float = 3e-4
    learning_rate_schedule: Literal["constant", "linear"] = "constant"
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    seed: int = 0
    failed_share: float = 0.05
    skipped_updates: int = 5
    out_of_memory: Literal["stop", "halve"] = "stop"
    overlap: bool = True

    def __post_init__(self) -> None:
        counts = ("rounds", "max_forwards", "prompts_per_round", "batch_size", "updates_per_round", "skipped_updates")
        for name in counts:
            value = vars(self)[name]
            if value is not None and value < 1:
                raise ValueError(f"training.{name} must be at least 1, not {value}")
        for name in ("learning_rate", "max_grad_norm"):
            if not vars(self)[name] > 0:
                raise ValueError(f"training.{name} must be positive, not {vars(self)[name]}")
        if not 0 <= self.failed_share <= 1:
            raise ValueError(f"training.failed_share must be a share in [0, 1], not {self.failed_share}")
        self._require_whole_groups()

    def _require_whole_groups(self) -> None:
        if self.group_size < 2:
            raise ValueError(f"group_size is {self.group_size}: a group needs at least 2 samples to be compared")
        if self.batch_size % self.group_size:
            raise ValueError(
                f"batch_size {self.batch_size} must be a multiple of group_size {self.group_size}, so that groups stay"
                f" whole: try {self.group_size * max(1, self.batch_size // self.group_size)}"
            )
        images = self.prompts_per_round * self.group_size
        if images % (self.batch_size * self.updates_per_round):
            raise ValueError(
                f"prompts_per_round {self.prompts_per_round} x group_size {self.group_size} = {images} images do not"
                f" divide into {self.updates_per_round} updates of batches of {self.batch_size}: change one of them"
            )

    def require_shares(self, processes: int) -> None:
        """Raise ValueError where the batches of an update do not divide among so many processes."""
        batches = self.prompts_per_round * self.group_size // (self.batch_size * self.updates_per_round)
        if batches % processes:
            raise ValueError(
                f"an update's {batches} batches of {self.batch_size} images do not divide among {processes} processes:"
                " change training.batch_size, prompts_per_round or updates_per_round, or the number of processes"
            )

    def progress(self, rounds_done: int, forwards_done: int) -> float:
        """The share of the run that is done, 1 at its end."""
        return max(rounds_done / self.rounds, forwards_done / self.max_forwards if self.max_forwards else 0.0)

    def rate(self, progress: float) -> float:
        """The learning rate at a share of the run."""
        return self.learning_rate * (1 - progress if self.learning_rate_schedule == "linear" else 1.0)


@dataclass(frozen=True)
class RoundResult:
    """What one round did. ``log_ratio_max`` is the largest |log-ratio| of the round's first update, 0 in exact
    arithmetic; ``skipped_updates`` had a gradient that was not finite, and are in no mean; ``readings`` are a
    method's own and its trainable rewards'; ``forwards`` counts denoiser evaluations of single samples so far,
    ``calls`` everything that was billed (see ``budget.Ledger``), ``images`` samples so far."""

    round: int
    reward: float
    reward_std: float
    rewards: dict[str, float]
    kl: float
    clip_fraction: float
    zero_std_share: float
    grad_norm: float
    loss: float
    log_ratio_max: float
    failed_rewards: int
    skipped_updates: int
    readings: dict[str, float]
    images: int
    forwards: int
    calls: dict[str, int]
    seconds: float

    def metrics(self) -> dict[str, object]:
        """The row of ``metrics.jsonl``; what is not finite is null, and readings of the machine stand apart."""
        row: dict[str, object] = {
            name: (value if not isinstance(value, float) or math.isfinite(value) else None)
            for name, value in vars(self).items()
            if name != "seconds"
        }
        peak = peak_memory()
        speed = self.images / self.seconds if self.seconds else 0.0
        return row | {"machine": {"seconds": self.seconds, "images_per_second": speed, "peak_memory_bytes": peak}}


class Trainer:
    """One run. ``rounds()`` yields after every round; between two of them the policy may be evaluated or saved.
    ``suspects`` is the folder for what was learnt from in updates that were left out."""

    def __init__(
        self,
        pipeline: Pipeline,
        policy: Policy,
        rewards: Sequence[NamedReward],
        prompts: PromptSet,
        recipe: Recipe,
        settings: Settings,
        sampling: Sampling,
        suspects: Path | None = None,
    ) -> None:
        self.ledger, self.processes = Ledger(), policy.processes
        settings.require_shares(self.processes.processes)
        self.pipeline, self.policy, self.recipe = Metered(pipeline, self.ledger), policy, recipe
        self.rewards = metered_rewards(rewards, self.ledger)
        self.settings, self.sampling = settings, sampling
        self.grid = sampling.grid(pipeline)
        self.sampler = Sampler(
            self.pipeline,
            self.rewards,
            self.grid,
            sampling.guidance,
            settings.group_size,
            settings.batch_size,
            settings.overlap,
        )
        recipe.kernel.check(sampling.guidance, [reward.name for reward in rewards if reward.weight])
        recipe.steps(self.grid, 0, settings.seed)  # refuse an impossible recipe before any compute
        self.prompts = PromptSampler(prompts, settings.prompts_per_round, settings.seed)
        rate, decay = settings.learning_rate, settings.weight_decay
        self.optimizer = adam(settings)(policy.parameters, lr=rate, weight_decay=decay)
        self.trainable = {r.name: r.function for r in rewards if isinstance(r.function, TrainableReward)}
        self.old = WeightSnapshot(policy.parameters) if recipe.lag else None
        self.watch = Watch(settings.failed_share)
        self.skipping = Skipping(settings.skipped_updates, suspects)
        self.micro_batch = settings.batch_size
        self.raised: list[float] = []
        self.rounds_done = 0
        self.images = 0
        self.seconds = 0.0

    def rounds(self) -> Iterator[RoundResult]:
        """All rounds that are left, one by one."""
        for index, prompts in itertools.islice(enumerate(self.prompts.rounds()), self.rounds_done, None):
            progress = self.settings.progress(index, self.ledger.forwards)
            if progress >= 1:
                return
            began, billed = time.perf_counter(), self.ledger.copy()
            for slots in self.optimizer.param_groups:
                slots["lr"] = self.settings.rate(progress)
            parts = self._sample(index, prompts)
            outcome = self._outcome(parts, len(prompts))
            readings = self._update_rewards(parts, prompts)
            learnt = self._learn(index, prompts, parts, outcome)
            if self.old is not None and self.recipe.lag is not None:
                self.old.update(self.policy.parameters, self.recipe.lag.decay(index))
            self.ledger.add(self.processes.told(self.ledger.since(billed).counts), billed)
            self.rounds_done += 1
            self.images += len(outcome.scores)
            self.seconds += time.perf_counter() - began
            yield self._result(index, outcome, learnt, readings)

    def _sample(self, index: int, prompts: Sequence[Prompt]) -> list[Sampled]:
        """A round's batches, sampled by the old policy where there is one, and scored."""
        steps = self.recipe.steps(self.grid, index, self.settings.seed)
        with contextlib.nullcontext() if self.old is None else self.policy.using(self.old):
            return list(self.sampler(self.recipe, steps, prompts, f"{self.settings.seed}/{index}", self.processes))

    def _all(self, parts: Sequence[Tensor]) -> Tensor:
        """The rows (B, ...) of a round from those of this process's batches."""
        return self.processes.interleaved(torch.cat(list(parts)), self.settings.batch_size)

    def _all_of(self, parts: Sequence[Tensor | None]) -> Tensor | None:
        """The same of what is there; None for nothing."""
        found = [part for part in parts if part is not None]
        return self._all(found) if found else None

    def _outcome(self, parts: Sequence[Sampled], prompts: int) -> RoundScores:
        outcome = RoundScores(
            scores=self._all([part.scores for part in parts]),
            weights=tuple(reward.weight for reward in self.rewards),
            group=torch.arange(prompts).repeat_interleave(self.settings.group_size),
            stepwise=self._all_of([part.stepwise for part in parts]),
            features=self._all_of([part.features for part in parts]),
        )
        if self.images == 0:
            self.watch.compare(self.rewards, outcome.scores)
        self.watch.see(outcome.scores, zero_std_share(outcome.combined, outcome.group) == 1.0)
        return outcome

    def _update_rewards(self, parts: Sequence[Sampled], prompts: Sequence[Prompt]) -> dict[str, float]:
        """Let trainable rewards learn from the round's samples, all of them in every process; their readings by reward
        and name."""
        if not self.trainable:
            return {}
        samples = self._all([part.samples for part in parts])
        asked = [prompt for prompt in prompts for _ in range(self.settings.group_size)]
        return {
            f"{name}/{reading}": value
            for name, reward in self.trainable.items()
            for reading, value in reward.update(samples, asked).items()
        }

    def raise_kl(self, least: float) -> None:
        """Double the pull towards the untrained policy, to a weight of ``least`` or more."""
        self.recipe = replace(self.recipe, objective=anchored(self.recipe.objective, least))
        self.raised.append(least)

    def state(self) -> State:
        """Everything that the rounds to come depend on, between two rounds; the rest follows from seed and round."""
        tensors = self.policy.tensors() | with_prefix("optimizer.", optimizer_tensors(self.optimizer))
        if self.old is not None:
            tensors |= with_prefix("old.", self.old.named())
        for place, reward in enumerate(self.trainable.values()):
            tensors |= with_prefix(f"reward.{place}.", reward.tensors())
        numbers = {
            "rounds": self.rounds_done,
            "updates": self.policy.updates,
            "images": self.images,
            "seconds": self.seconds,
            "calls": dict(self.ledger.counts),
            "silent_rounds": self.watch.silent,
            "skipped_updates": self.skipping.in_row,
            "micro_batch": self.micro_batch,
            "raised_kl": list(self.raised),
        }
        return State(tensors, numbers)

    def restore(self, state: State) -> None:
        """Put back what ``state()`` gave, in a trainer with the same settings that has not begun."""
        numbers = state.numbers
        self.policy.load_tensors(state.tensors, numbers["updates"])
        load_optimizer_tensors(self.optimizer, without_prefix("optimizer.", state.tensors))
        if self.old is not None:
            self.old.load(without_prefix("old.", state.tensors))
        for place, reward in enumerate(self.trainable.values()):
            reward.load_tensors(without_prefix(f"reward.{place}.", state.tensors))
        for least in numbers["raised_kl"]:
            self.raise_kl(least)
        self.rounds_done, self.images, self.seconds = numbers["rounds"], numbers["images"], numbers["seconds"]
        self.watch.silent, self.skipping.in_row = numbers["silent_rounds"], numbers["skipped_updates"]
        self.micro_batch = numbers["micro_batch"]
        self.ledger.counts.update(numbers["calls"])

    def _learn(
        self, index: int, prompts: Sequence[Prompt], parts: Sequence[Sampled], outcome: RoundScores
    ) -> MetricSums:
        """``updates_per_round`` optimiser steps, each on its part of the batches, of which this process has a share."""
        readings = MetricSums()
        context = UpdateContext(
            self.pipeline,
            self.policy,
            self.grid,
            self.recipe.kernel,
            self.sampling.guidance,
            self.old,
            readings,
        )
        credits = torch.split(self.recipe.credit(outcome), self.settings.batch_size)
        groups = torch.split(outcome.group, self.settings.batch_size)
        own, size = self.processes.of(len(credits)), len(parts) // self.settings.updates_per_round
        for update in range(self.settings.updates_per_round):
            chosen = own[update * size : (update + 1) * size]
            on_policy = update == 0 and self.old is None
            batches = [UpdateBatch(parts[own.index(k)].rollout, credits[k], groups[k], on_policy) for k in chosen]
            seeds = [derived_seed(self.settings.seed, index, "l", k) for k in chosen]
            before = readings.snapshot()
            terms = self._accumulate(context, batches, seeds)
            self.policy.sum_gradients()
            norm = whole(nn.utils.clip_grad_norm_(self.policy.parameters, self.settings.max_grad_norm))
            loss = sum(self.processes.told(readings.values.get("loss", 0.0)))
            if finite(norm, loss):
                readings.add("grad_norm", norm.reshape(1))
                self._step(terms)
            else:
                readings.rollback(before)
                readings.skipped += 1
                self._skip(BadUpdate(index, update, float(norm), loss, batches, prompts))
        self.micro_batch = min(self.processes.told(self.micro_batch))
        readings = MetricSums.merge(self.processes.told(vars(readings)))
        _warn_of_disagreement(readings.log_ratio_max, self.recipe.objective.clip_range)
        return readings

    def _accumulate(self, context: UpdateContext, batches: Sequence[UpdateBatch], seeds: Sequence[int]) -> int:
        """Add up this process's part of the gradient of an update's mean, and tell of how many terms that is in all;
        where memory runs out, begin anew with fewer samples at a time, if that is asked for."""
        objective, before = self.recipe.objective, context.metrics.snapshot()
        terms: int = sum(self.processes.told(sum(objective.terms(batch) for batch in batches)))
        while True:
            try:
                for batch, seed in zip(batches, seeds, strict=True):
                    for part in batch.split(self.micro_batch):
                        objective.backward(context, part, 1 / terms if terms else 0.0, seed)
                return terms
            except RuntimeError as error:
                smaller = halved(self.micro_batch, objective.unit, self.settings.group_size)
                if self.settings.out_of_memory == "stop" or smaller is None or not is_out_of_memory(error):
                    raise
            self._make_room(smaller)
            context.metrics.rollback(before)

    def _make_room(self, micro_batch: int) -> None:
        """Give back what an attempt held, and learn from fewer samples at a time from now on."""
        logger.warning("out of memory with %d samples at a time: going on with %d", self.micro_batch, micro_batch)
        self.micro_batch = micro_batch
        self.optimizer.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _step(self, terms: int) -> None:
        """One optimiser step; none where there was nothing to learn from, which moments and decay would act on."""
        self.skipping.stepped()
        if terms:
            self.optimizer.step()
            self.policy.update_average()
        self.optimizer.zero_grad()

    def _skip(self, update: BadUpdate) -> None:
        self.optimizer.zero_grad()
        self.skipping.skipped(update)

    def _result(
        self, index: int, outcome: RoundScores, learnt: MetricSums, rewards: Mapping[str, float]
    ) -> RoundResult:
        combined = outcome.combined
        valid = combined[~combined.isnan()]
        standard = ("loss", "kl", "clip_fraction", "grad_norm")
        extra = {name: value for name, value in learnt.means().items() if name not in standard}
        return RoundResult(
            round=index,
            reward=float(valid.mean()),
            reward_std=float(valid.std(correction=0)),
            rewards={reward.name: float(outcome.scores[:, k].nanmean()) for k, reward in enumerate(self.rewards)},
            kl=learnt.mean("kl"),
            clip_fraction=learnt.mean("clip_fraction"),
            zero_std_share=zero_std_share(combined, outcome.group),
            grad_norm=learnt.mean("grad_norm"),
            loss=learnt.mean("loss"),
            log_ratio_max=learnt.log_ratio_max,
            failed_rewards=int(outcome.scores.isnan().sum()),
            skipped_updates=learnt.skipped,
            readings=extra | dict(rewards),
            images=self.images,
            forwards=self.ledger.forwards,
            calls=dict(self.ledger.counts),
            seconds=self.seconds,
        )


def _warn_of_disagreement(log_ratio_max: float, clip_range: float | None) -> None:
    if clip_range is not None and log_ratio_max > 0.02 * clip_range:
        logger.warning(
            "the first update's log-ratio reached %.1e, above 2%% of the clip range %.1e: sampling and training"
            " disagree. Likely causes: another batch size or guidance order, mixed precision, a compiled network,"
            " dropout, a kernel whose arguments changed",
            log_ratio_max,
            clip_range,
        )


def adam(settings: Settings) -> Callable[..., torch.optim.Optimizer]:
    """The class of the optimiser. Raises ValueError where 8 bits are asked for and bitsandbytes is missing."""
    if settings.optimizer == "adamw":
        return torch.optim.AdamW
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise ValueError("training.optimizer 'adamw8bit' needs bitsandbytes: pip install 'genalign[memory]'") from None
    found: type[torch.optim.Optimizer] = AdamW8bit
    return found
