"""The training loop: prompts -> rollouts -> rewards -> credit -> objective on replays -> optimizer step.

B = P prompts x G samples, S trained steps, K rewards.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from genalign.algorithms.advantages import zero_std_share
from genalign.algorithms.interfaces import (
    Distance,
    MeasuresDistance,
    MetricSums,
    PartMetrics,
    RoundScores,
    TermCounts,
    TermScales,
    UpdateBatch,
    UpdateContext,
    half_micro_batch,
    traits_of,
    with_stronger_kl,
)
from genalign.algorithms.recipe import Recipe
from genalign.algorithms.redraws import Member
from genalign.diffusion.noise import derived_seed
from genalign.diffusion.policy import Policy
from genalign.diffusion.sampling import Sampling
from genalign.diffusion.transitions import Kernel
from genalign.prompts import PromptSampler
from genalign.runtime.determinism import deterministic, require_workspace
from genalign.runtime.files import with_prefix, without_prefix
from genalign.runtime.fsdp import full_tensor
from genalign.runtime.progress import SILENT, Progress
from genalign.runtime.state import State, Stateful, load_optimizer_tensors, optimizer_tensors
from genalign.scoring.budget import Ledger, Metered, metered_rewards
from genalign.scoring.score import NamedReward, RewardMonitor, named
from genalign.training.balanced_gradients import BalancedGradients
from genalign.training.credit_trial import try_credit
from genalign.training.elastic_reset import ResetWeights
from genalign.training.epochs import Batches, updates_of_round
from genalign.training.loss_scale import LossScale
from genalign.training.noise_calibration import MovingNoise
from genalign.training.nonfinite import NonFiniteGuard, SkippedUpdate
from genalign.training.offline import OfflineSampler, pool_of, require_offline
from genalign.training.out_of_memory import PartSizes, free_memory, is_out_of_memory
from genalign.training.round_result import RoundResult
from genalign.training.run_folder import RunFolder, WeightStore
from genalign.training.sampler import SampledBatch, Sampler
from genalign.training.settings import FittedSettings, TrainerSettings, optimizer_class
from genalign.training.students import rollout_guidance
from genalign.training.trailing_weights import TrailingWeights
from genalign.training.trust_region import RateController, RoundLimit
from genalign.types import CompilesBlocks, Pipeline, Prompt, PromptSet, RewardFunction, TrainableReward

logger = logging.getLogger(__name__)


class Trainer:
    """The loop that trains a policy: ``rounds()`` yields after every round, when it may be evaluated or saved.

    Args:
        pipeline: The model.
        policy: Its trainable weights.
        rewards: A reward function, functions by name, or rewards with weights; weight 0 only reports.
        prompts: The prompts to train on, as a set or a list of texts.
        recipe: The method.
        settings: Size of a round, optimization, limits.
        sampling: Steps and guidance of the rollouts, and the kernel of the steps that the recipe does not train.
        suspects: The folder for the tensors of updates with gradients that are not finite; None writes none.

    Raises:
        ValueError: The recipe, the rewards and the settings do not fit together.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        policy: Policy,
        rewards: RewardFunction | NamedReward | Mapping[str, RewardFunction] | Sequence[NamedReward],
        prompts: PromptSet | str | Sequence[str],
        recipe: Recipe,
        settings: TrainerSettings = TrainerSettings(),
        sampling: Sampling = Sampling(),
        suspects: Path | None = None,
    ) -> None:
        rewards, prompts = named(rewards), PromptSet.of(prompts)
        pool = pool_of(settings.data, pipeline, settings.group_size) if settings.data else None
        prompts = pool.restricted(prompts) if pool else prompts
        self.ledger, self.processes = Ledger(), policy.processes
        settings = settings.fit(prompts, recipe.objective.unit, self.processes, notice=True)
        self.batch_sizes = settings.batch_sizes(recipe.objective.unit, self.processes.world_size)
        _require_fit(recipe, settings, policy, self.batch_sizes)
        if recipe.shifts_noise:
            policy.shift_noise()
        self.pipeline, self.policy, self.recipe = Metered(pipeline, self.ledger), policy, recipe
        self.rewards = metered_rewards(rewards, self.ledger)
        self.settings = settings
        self.grid = sampling.grid(pipeline)
        self.guidance = rollout_guidance(pipeline, sampling, recipe.objective)
        self.elsewhere = sampling.kernel_on(self.grid)
        if settings.deterministic:
            require_workspace(policy.device, os.environ)
        self.trainable = {r.name: r.function for r in rewards if isinstance(r.function, TrainableReward)}
        self.parts, keep_samples = PartSizes(settings.on_out_of_memory == "halve"), bool(self.trainable)
        self.sampler: Sampler | OfflineSampler = Sampler(
            self.pipeline, self.rewards, self.grid, self.guidance, settings, keep_samples, self.parts, self.elsewhere
        )
        if pool:
            require_offline(recipe, recipe.steps(pipeline.path, self.grid, 0, settings.seed))
            self.sampler = OfflineSampler(self.pipeline, self.rewards, pool, settings, keep_samples)
        kernel, counted = recipe.kernel_on(pipeline.path), [reward.name for reward in rewards if reward.weight]
        kernel.check(self.guidance, counted)
        moving = recipe.recalibration
        self.noise = MovingNoise(moving, kernel, self.grid, self.guidance, counted) if moving else None
        self.reset = ResetWeights(recipe.reset, policy) if recipe.reset else None
        self.balance = BalancedGradients(recipe.balance, rewards, recipe.objective, policy) if recipe.balance else None
        self.memory = TrailingWeights(recipe.memory, policy) if recipe.memory else None
        companion_seed = derived_seed(settings.seed, "companion")
        self.companion = recipe.companion(self.pipeline, policy, companion_seed) if recipe.companion else None
        parts: dict[str, Stateful | None] = {"noise": self.noise, "reset": self.reset, "balance": self.balance}
        parts |= {"memory": self.memory, "companion": self.companion}
        self.stateful: dict[str, Stateful] = {name: part for name, part in parts.items() if part is not None}
        # Refuse an impossible recipe before any compute
        try_credit(recipe, rewards, settings.prompts_per_round, settings.group_size, len(self._steps(0)))
        self.prompts = PromptSampler(prompts, settings.prompts_per_round, settings.seed)
        auto = settings.learning_rate == "auto"
        self.rates = RateController.of(settings.trust_region, recipe.objective) if auto else None
        self.optimizer = optimizer_class(settings)(policy.parameters, weight_decay=settings.weight_decay)
        self.old = policy.snapshot() if recipe.lag else None
        self.monitor = RewardMonitor(settings.max_failed_fraction)
        self.nonfinite = NonFiniteGuard(settings.max_skipped_updates, suspects)
        self.micro_batch = settings.micro_batch or max(self.batch_sizes)
        self._compile(pipeline)
        self.loss_scale = LossScale.for_dtype(pipeline.compute_dtype, settings.loss_scale)
        self.kl_floors: list[float] = []
        self.rounds_done = 0
        self.samples = 0
        self.seconds = 0.0

    def _compile(self, pipeline: Pipeline) -> None:
        """Compile the network, if it was opened so, for the batches of sampling and of learning."""
        if isinstance(pipeline, CompilesBlocks):
            pipeline.compile_blocks((max(self.batch_sizes), self.micro_batch))

    def rounds(self, progress: Progress = SILENT) -> Iterator[RoundResult]:
        """Train the remaining rounds, and yield the result of each; ``progress`` shows the phases within a round."""
        for index, prompts in itertools.islice(enumerate(self.prompts.rounds()), self.rounds_done, None):
            if self.settings.progress(index, self.ledger.nfe) >= 1:
                return
            with deterministic(self.settings.deterministic):
                result = self._round(index, prompts, progress)
            yield result

    def _round(self, index: int, prompts: Sequence[Prompt], progress: Progress) -> RoundResult:
        """Sample and train round ``index``; its samples are freed before the caller evaluates."""
        start, billed = time.perf_counter(), self.ledger.copy()
        factor = self.settings.rate_factor(index, self.ledger.nfe)
        batches = self.sample(index, prompts, progress)
        drawn = self.gather_scores(batches, prompts)
        prompts, batches, scores, further = self._redrawn(index, prompts, batches, drawn, progress)
        silent_share = zero_std_share(scores.combined, scores.group)
        self._watch(drawn, silent_share == 1.0)
        reward_metrics = self._update_rewards(batches, prompts, scores.group)
        sums = self.learn(index, prompts, batches, scores, progress, factor)
        if self.old is not None and self.recipe.lag is not None:
            self.old.update(self.recipe.lag.decay(index))
        if self.memory:
            self.memory.after_round(index)
        if self.reset:
            self.reset.after_round(index, self.old)
        noise_metrics = self.noise.after_round(index, self._steps(index), scores) if self.noise else {}
        self.ledger.add(self.processes.all_gather_object(self.ledger.since(billed).counts), billed)
        self.rounds_done += 1
        self.samples += len(scores.scores) + further
        self.seconds += time.perf_counter() - start
        metrics = reward_metrics | noise_metrics | (self.balance.metrics() if self.balance else {})
        if self.recipe.redraw:
            metrics |= {"redrawn_samples": float(further), "trained_zero_std_share": silent_share}
        return self._result(index, drawn, sums, metrics)

    @property
    def kernel(self) -> Kernel:
        """The stochastic sampler of the next round."""
        return self.noise.kernel if self.noise else self.recipe.kernel_on(self.pipeline.path)

    def _set_rate(self, factor: float) -> None:
        """Set the learning rate to the highest, or that of the trust region, times ``factor``."""
        highest = self.rates.rate if self.rates else float(self.settings.learning_rate)
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = highest * factor

    def sample(
        self,
        index: int,
        prompts: Sequence[Prompt],
        progress: Progress = SILENT,
        members: Sequence[Member | None] | None = None,
    ) -> list[SampledBatch]:
        """Sample and score this rank's batches of round ``index``, with the old policy if the recipe has one.

        Only some ``members`` are drawn if they are given, see ``Sampler``.
        """
        recipe, name = replace(self.recipe, kernel=self.kernel), f"{self.settings.seed}/{index}"
        arguments = (recipe, self._steps(index), prompts, name, self.processes, progress)
        with contextlib.nullcontext() if self.old is None else self.policy.using(self.old):
            return list(self.sampler(*arguments) if members is None else self.sampler(*arguments, members))

    def _steps(self, index: int) -> tuple[int, ...]:
        """Choose the steps to store and train in round ``index``."""
        return self.recipe.steps(self.pipeline.path, self.grid, index, self.settings.seed)

    def gather_scores(self, batches: Sequence[SampledBatch], prompts: Sequence[Prompt]) -> RoundScores:
        """Gather the scores of all ranks' batches of whole groups in the order of the round."""
        return self._gathered(batches, prompts, torch.arange(len(prompts)).repeat_interleave(self.settings.group_size))

    def _gathered(self, batches: Sequence[SampledBatch], prompts: Sequence[Prompt], group: Tensor) -> RoundScores:
        """Gather the scores of all ranks' batches, whose samples have the prompt indices ``group`` (B,)."""
        gathered: dict[str, Tensor] = {}
        for name in ("scores", "stepwise", "features"):
            tensors = [tensor for batch in batches if (tensor := getattr(batch, name)) is not None]
            if tensors:
                gathered[name] = self.processes.interleaved(tensors, self.batch_sizes)
        tasks = list(dict.fromkeys(prompt.task for prompt in prompts))
        task = torch.tensor([tasks.index(prompt.task) for prompt in prompts])[group]
        weights, names = zip(*((reward.weight, reward.name) for reward in self.rewards), strict=True)
        seed = f"{self.settings.seed}/{self.rounds_done}"
        return RoundScores(weights=weights, group=group, task=task, names=names, seed=seed, **gathered)

    def _watch(self, scores: RoundScores, silent: bool) -> None:
        """Check the scores of a round as it was drawn; ``silent`` if no group that is trained has spread."""
        if self.samples == 0:
            self.monitor.compare(self.rewards, scores.scores)
        self.monitor.see(scores.scores, silent and traits_of(self.recipe.objective).needs_spread)

    def _redrawn(
        self,
        index: int,
        prompts: Sequence[Prompt],
        batches: list[SampledBatch],
        scores: RoundScores,
        progress: Progress,
    ) -> tuple[Sequence[Prompt], list[SampledBatch], RoundScores, int]:
        """Draw other samples in place of groups without spread, if the recipe says so.

        Every rank draws those of its own batches. Returns the prompts, batches and scores to train, and the number of
        samples that were drawn beyond the round's.
        """
        rule, drawn = self.recipe.redraw, 0
        if rule is None:
            return prompts, batches, scores, drawn
        first, limit, other = len(prompts), int(rule.extra * len(scores.scores)), self.prompts.further(index, prompts)
        while redraw := rule(prompts, scores, other[len(prompts) - first :], limit - drawn):
            prompts, rows = redraw.prompts, torch.split(redraw.rows, list(self.batch_sizes))
            sampled = iter(self.sample(index, prompts, progress, redraw.members))
            own = [rows[n].nonzero()[:, 0] for n in self.processes.indices(len(rows)) if self.batch_sizes[n]]
            batches = [
                batch.with_rows(replaced, next(sampled)) if len(replaced) else batch
                for replaced, batch in zip(own, batches, strict=True)
            ]
            scores = self._gathered(batches, prompts, redraw.group(scores.group))
            drawn += int(redraw.rows.sum())
        return prompts, batches, scores, drawn

    def _update_rewards(
        self, batches: Sequence[SampledBatch], prompts: Sequence[Prompt], group: Tensor
    ) -> dict[str, float]:
        """Train the trainable rewards, each rank on its own samples; return their metrics as ``reward/metric``."""
        if not self.trainable:
            return {}
        samples = torch.cat([batch.samples for batch in batches if batch.samples is not None])
        batched = torch.split(torch.arange(sum(self.batch_sizes)), list(self.batch_sizes))  # the round's rows
        rows = torch.cat([batched[number] for number in self.processes.indices(len(batched))]).tolist()
        repeated = [prompts[place] for place in group.tolist()]
        return {
            f"{name}/{metric}": value
            for name, reward in self.trainable.items()
            for metric, value in reward.update(samples, repeated, rows).items()
        }

    def learn(
        self,
        index: int,
        prompts: Sequence[Prompt],
        sampled: Sequence[SampledBatch],
        scores: RoundScores,
        progress: Progress = SILENT,
        rate_factor: float = 1.0,
    ) -> MetricSums:
        """Make the optimizer steps of a round: in each epoch, one on each part of the round's samples.

        Args:
            index: The round.
            prompts: The round's prompts.
            sampled: This rank's batches.
            scores: The scores of all ranks.
            progress: Shows the updates.
            rate_factor: The learning rate as a fraction of the highest.
        """
        sums, epochs, updates = MetricSums(), self.settings.epochs, self.settings.updates_per_round
        model = self.pipeline, self.policy, self.grid, self.kernel, self.guidance
        memory = self.memory.weights if self.memory else None
        beside = memory, self.companion, self.elsewhere
        context = UpdateContext(*model, self.old, sums, prompts, self.rewards, *beside)
        own = self._own_batches(sampled, scores)
        unit = 1 if self.recipe.objective.unit == "sample" else self.settings.group_size
        seed = derived_seed(self.settings.seed, index)
        parts = updates_of_round(own, self.batch_sizes, updates, epochs, unit, seed)
        if self.companion:
            micro_batches = [part for batch in own.values() for part in batch.split(self.micro_batch)]
            apart = replace(context, metrics=PartMetrics(sums, "companion", 0.0, counted=False))
            self.companion.update(apart, micro_batches, len(scores.scores), derived_seed(seed, "companion"))
        limit = self._limit(context, own, index, rate_factor)
        with progress.phase("updates", epochs * updates, "updates") as advance:
            for update, batches in enumerate(parts):
                if update == 0 and self.old is None:
                    batches = {number: replace(batch, on_policy=True) for number, batch in batches.items()}
                if self.balance:
                    batches = self._balanced(context, index, update, batches, self.balance)
                self._set_rate(rate_factor)
                self._update(context, index, update, prompts, batches, limit)
                advance()
        if limit:
            limit.adapt_rate()
            sums.add("policy_distance", torch.tensor([limit.moved], device=self.policy.device))
        self.micro_batch = min(self.processes.all_gather_object(self.micro_batch))
        self.parts.agree([PartSizes(**sizes) for sizes in self.processes.all_gather_object(vars(self.parts))])
        sums = MetricSums.merge(self.processes.all_gather_object(sums.as_dict()))
        self._warn_of_mismatch(index, sums)
        return sums

    def _own_batches(self, sampled: Sequence[SampledBatch], scores: RoundScores) -> Batches:
        """Credit the samples of a round, and return this rank's batches; each update weighs rewards in balance anew."""
        sizes, alone = list(self.batch_sizes), None
        if self.balance:
            by_reward = self.balance.credits(self.recipe.credit, scores)
            credit, alone = by_reward.sum(-1), torch.split(by_reward, sizes)
        else:
            credit = self.recipe.credit(scores)
        credits, groups = torch.split(credit, sizes), torch.split(scores.group, sizes)
        numbers = [number for number in self.processes.indices(len(sizes)) if sizes[number]]
        return {
            n: UpdateBatch(batch.rollout, credits[n], groups[n], on_policy=False, by_reward=alone[n] if alone else None)
            for n, batch in zip(numbers, sampled, strict=True)
        }

    def _warn_of_mismatch(self, index: int, sums: MetricSums) -> None:
        """Warn if the first update of a round replayed other transitions than were sampled."""
        clip_range = self.recipe.objective.clip_range
        if clip_range is not None and sums.log_ratio_max > 0.02 * clip_range:
            logger.warning(
                "Round %d: the first update's log-ratio reached %.1e, above 2%% of the clip range %.1e: sampling and"
                " training disagree. Likely causes: another batch size or guidance order, mixed precision, a compiled"
                " network, dropout, a kernel whose arguments changed",
                index + 1,
                sums.log_ratio_max,
                clip_range,
            )

    def _limit(self, context: UpdateContext, batches: Batches, index: int, rate_factor: float) -> RoundLimit | None:
        """Begin the trust region of round ``index``, measured on a few samples of each batch, whatever rank has it."""
        if self.rates is None:
            return None
        objective, seed = cast(MeasuresDistance, self.recipe.objective), derived_seed(self.settings.seed, index, "d")
        count = -(-self.settings.trust_region.probe // sum(size > 0 for size in self.batch_sizes))
        own = list[Distance]()
        for batch in batches.values():
            spread = torch.arange(min(count, len(batch))) * len(batch) // min(count, len(batch))
            for part in batch.select(spread).split(self.micro_batch):
                own.append(objective.distance_from_now(context, part.to(self.policy.device), seed))

        def distance() -> float:
            values = torch.cat([measure() for measure in own]).tolist() if own else []
            return statistics.fmean(itertools.chain(*self.processes.all_gather_object(values)))

        return RoundLimit(self.rates, distance, rate_factor**2)

    def _update(
        self,
        context: UpdateContext,
        index: int,
        update: int,
        prompts: Sequence[Prompt],
        batches: Batches,
        limit: RoundLimit | None,
    ) -> None:
        """Accumulate the gradient of the mean loss on all ranks, and make the optimizer step.

        Args:
            context: What the objective needs besides the batches.
            index: The round.
            update: The update of the round, over all epochs, which is skipped if its gradient or loss is not finite.
            prompts: The round's prompts.
            batches: This rank's batches of the update, by their number in the round.
            limit: The trust region of the round; None if the learning rate is a number.
        """
        sums = context.metrics
        before = sums.snapshot()
        updates, seeds = self.settings.updates_per_round, self._seeds(index, update, batches)
        counts = self._counts(batches.values())
        self._accumulate(context, list(batches.values()), seeds, TermScales.of_means(counts, self.loss_scale.value))
        self.policy.sum_gradients()
        self.loss_scale.unscale(self.policy.parameters)
        norm = full_tensor(nn.utils.clip_grad_norm_(self.policy.parameters, self.settings.max_grad_norm))
        loss = sum(self.processes.all_gather_object(sums.read().values.get("loss", 0.0)))
        finite = bool(norm.isfinite()) and math.isfinite(loss)
        if self.loss_scale.step(overflow=not finite and math.isfinite(loss)):
            sums.rollback(before)
            logger.info("Round %d: gradients overflowed, the loss scale is %g now", index + 1, self.loss_scale.value)
        elif finite:
            sums.add("grad_norm", norm.reshape(1))
            self.nonfinite.in_row = 0
            if counts.losses:  # without losses there is no gradient, but moments and weight decay would act
                weights = self.policy.snapshot() if limit else None
                self.optimizer.step()
                if limit and weights:
                    limit.shorten(self.policy, weights, (update + 1) / (self.settings.epochs * updates))
                self.policy.update_average()
                if self.reset:
                    self.reset.after_update()
        else:
            sums.rollback(before)
            sums.skipped += 1
            skipped = SkippedUpdate(index, update, float(norm), loss, list(batches.values()), prompts)
            self.nonfinite.skip(skipped)
        self.optimizer.zero_grad()

    def _balanced(
        self, context: UpdateContext, index: int, update: int, batches: Batches, balance: BalancedGradients
    ) -> Batches:
        """Weigh the credits of the rewards in the batches of an update, by their own gradients if that is due."""
        weights = balance.weights
        if balance.settings.times(index * self.settings.epochs * self.settings.updates_per_round + update, 1):
            seeds, gradients = self._seeds(index, update, batches), []
            ones = torch.eye(len(weights), dtype=torch.float64)

            # The losses are scaled by the number of terms with credit by any reward, without the distances
            credited = [replace(batch, by_reward=cast(Tensor, batch.by_reward).abs()) for batch in batches.values()]
            counts = self._counts(batch.weighted(ones.sum(0)) for batch in credited)
            scales = TermScales.of_means(counts, self.loss_scale.value).without_distances()
            for one in ones:
                unlogged = MetricSums(sizes={"kl": 1})  # the distance counts as measured: the update itself does so
                alone = [batch.weighted(one) for batch in batches.values()]
                self._accumulate(replace(context, metrics=unlogged), alone, seeds, scales)
                self.policy.sum_gradients()
                gradients.append(balance.gradients())
            weights = balance.solve(gradients)
        return {number: batch.weighted(weights) for number, batch in batches.items()}

    def _seeds(self, index: int, update: int, batches: Batches) -> list[int]:
        """Derive the seeds of the losses of an update's batches."""
        updates = self.settings.updates_per_round
        epoch = [update // updates] if update >= updates else []  # which the first pass does not name
        return [derived_seed(self.settings.seed, index, "l", number, *epoch) for number in batches]

    def _counts(self, batches: Iterable[UpdateBatch]) -> TermCounts:
        """Count the terms of an update's two means, over all ranks."""
        own = sum((self.recipe.objective.terms(batch) for batch in batches), TermCounts(0, 0))
        return sum(map(TermCounts.from_list, self.processes.all_gather_object(own.as_list())), TermCounts(0, 0))

    def _accumulate(
        self, context: UpdateContext, batches: Sequence[UpdateBatch], seeds: Sequence[int], scales: TermScales
    ) -> None:
        """Accumulate this rank's part of the gradient of an update's means.

        If memory runs out and ``on_out_of_memory`` is "halve", start again with a smaller micro-batch.
        """
        objective, before = self.recipe.objective, context.metrics.snapshot()
        while True:
            try:
                for batch, seed in zip(batches, seeds, strict=True):
                    for part in batch.split(self.micro_batch):
                        objective.backward(context, part.to(self.policy.device), scales, seed)
                return
            except RuntimeError as error:
                smaller = half_micro_batch(self.micro_batch, objective.unit, self.settings.group_size)
                if self.settings.on_out_of_memory == "stop" or smaller is None or not is_out_of_memory(error):
                    raise
            logger.warning("Out of memory with micro-batches of %d: continuing with %d", self.micro_batch, smaller)
            self.micro_batch = smaller
            self._compile(self.pipeline.pipeline)
            self.optimizer.zero_grad()
            free_memory()
            context.metrics.rollback(before)

    def _result(
        self, index: int, scores: RoundScores, sums: MetricSums, reward_metrics: Mapping[str, float]
    ) -> RoundResult:
        combined = scores.combined
        valid = combined[~combined.isnan()]
        named = ("loss", "kl", "clip_fraction", "grad_norm")
        return RoundResult(
            round=index,
            reward=float(valid.mean()),
            reward_std=float(valid.std(correction=0)),
            rewards={reward.name: float(scores.scores[:, k].nanmean()) for k, reward in enumerate(self.rewards)},
            kl=sums.mean("kl"),
            clip_fraction=sums.mean("clip_fraction"),
            zero_std_share=zero_std_share(combined, scores.group),
            grad_norm=sums.mean("grad_norm"),
            loss=sums.mean("loss"),
            log_ratio_max=sums.log_ratio_max,
            failed_rewards=int(scores.scores.isnan().sum()),
            skipped_updates=sums.skipped,
            learning_rate=self.optimizer.param_groups[0]["lr"],
            metrics={name: mean for name, mean in sums.means().items() if name not in named} | dict(reward_metrics),
            samples=self.samples,
            nfe=self.ledger.nfe,
            calls=dict(self.ledger.counts),
            seconds=self.seconds,
        )

    def raise_kl(self, least: float) -> None:
        """Double the weight of the KL to the untrained policy, and raise it to ``least`` if it is below."""
        self.recipe = replace(self.recipe, objective=with_stronger_kl(self.recipe.objective, least))
        self.kl_floors.append(least)

    def save(self, directory: str | Path) -> None:
        """Write the averaged weights: lora/ (diffusers) and peft/, or, if the whole network was trained, denoiser/.

        In a distributed run every rank must call this. Raises TypeError for a pipeline that cannot write weights.
        """
        pipeline = self.pipeline.pipeline
        if not isinstance(pipeline, WeightStore):
            raise TypeError(f"{type(pipeline).__name__} has no save_lora and save_denoiser: train a pipeline that has")
        RunFolder(Path(directory), self.processes).save(self.policy, pipeline)

    def state(self) -> State:
        """Return the state that later rounds depend on, except for what follows from the seed and the round."""
        tensors = self.policy.tensors() | with_prefix("optimizer.", optimizer_tensors(self.optimizer))
        if self.old is not None:
            tensors |= with_prefix("old.", self.old.state_dict())
        for place, reward in enumerate(self.trainable.values()):
            tensors |= with_prefix(f"reward.{place}.", reward.tensors())
        states = {name: part.state() for name, part in self.stateful.items()}
        for name, state in states.items():
            tensors |= with_prefix(f"{name}.", state.tensors)
        numbers = {
            "rounds": self.rounds_done,
            "updates": self.policy.updates,
            "samples": self.samples,
            "seconds": self.seconds,
            "calls": dict(self.ledger.counts),
            "silent_rounds": self.monitor.silent,
            "skipped_updates": self.nonfinite.in_row,
            "micro_batch": self.micro_batch,
            "parts": {**vars(self.parts)},
            "loss_scale": vars(self.loss_scale),
            "learning_rate": self.rates.rate if self.rates else None,
            "raised_kl": list(self.kl_floors),
            "stateful": {name: part.numbers for name, part in states.items()},
        }
        return State(tensors, numbers)

    def restore(self, state: State) -> None:
        """Restore a ``state()`` in a new trainer with the same settings."""
        numbers = state.numbers
        self.policy.load_tensors(state.tensors, numbers["updates"])
        load_optimizer_tensors(self.optimizer, without_prefix("optimizer.", state.tensors))
        if self.old is not None:
            self.old.load_state_dict(without_prefix("old.", state.tensors))
        for place, reward in enumerate(self.trainable.values()):
            reward.load_tensors(without_prefix(f"reward.{place}.", state.tensors))
        for name, part in self.stateful.items():
            part.restore(State(without_prefix(f"{name}.", state.tensors), numbers["stateful"][name]))
        for least in numbers["raised_kl"]:
            self.raise_kl(least)
        self.rounds_done, self.samples, self.seconds = numbers["rounds"], numbers["samples"], numbers["seconds"]
        self.monitor.silent, self.nonfinite.in_row = numbers["silent_rounds"], numbers["skipped_updates"]
        self.micro_batch, self.loss_scale = numbers["micro_batch"], LossScale(**numbers["loss_scale"])
        self.parts.agree([PartSizes(**numbers["parts"])])
        if self.rates:
            self.rates.rate = numbers["learning_rate"]
        self.ledger.counts.update(numbers["calls"])


def _require_current_samples(recipe: Recipe, settings: FittedSettings, policy: Policy) -> None:
    """Raise ValueError for what a pathwise objective cannot do: its gradient is that of the policy that sampled."""
    if settings.epochs > 1:
        raise ValueError(
            "this recipe follows the gradient of the sampler that made the samples, and does not learn from them again:"
            " set training.epochs to 1"
        )
    if recipe.lag or recipe.balance:
        name = "lag" if recipe.lag else "balance of rewards"
        raise ValueError(f"this recipe follows the rewards' gradients through the sampler, and takes no {name}")
    if policy.sharded:
        raise ValueError("gradients through the sampler are not trained with FSDP: train a LoRA without it")


def _require_fit(recipe: Recipe, settings: FittedSettings, policy: Policy, batch_sizes: Sequence[int]) -> None:
    """Raise ValueError where the recipe, the settings and the policy do not fit together."""
    if traits_of(recipe.objective).through_sampler:
        _require_current_samples(recipe, settings, policy)
    if policy.sharded:
        _require_equal_work(recipe, settings, batch_sizes, policy.processes.world_size)
    if recipe.companion is not None and policy.sharded:
        raise ValueError("what this recipe learns beside the policy is not trained with FSDP: train without it")
    if policy.shifts_noise and not recipe.shifts_noise:
        raise ValueError(
            "the adapter on this model is a noise hypernetwork, which is off while samples are made: train it with"
            " noise_hypernetwork, or open the model without it"
        )
    if recipe.shifts_noise and settings.data:
        raise ValueError("noise_hypernetwork learns from the noise of its own samples: leave training.data out")


def _require_equal_work(recipe: Recipe, settings: FittedSettings, batch_sizes: Sequence[int], ranks: int) -> None:
    """Raise ValueError for what gives the ranks of a sharded network unequal work, which FSDP does not allow."""
    if 0 in batch_sizes:
        raise ValueError(
            f"updates of {sum(batch_sizes) // settings.updates_per_round} samples do not give each of {ranks} processes"
            " equally many batches, which FSDP needs: change training.batch_size"
        )
    if settings.epochs > 1:
        raise ValueError(
            "training.epochs above 1 gives ranks unequal parts of an update, which FSDP does not allow: set it to 1"
        )
    if recipe.redraw:
        raise ValueError(
            "drawing other samples in place of groups without spread gives ranks unequal work, which FSDP does not"
            " allow: leave with_further_prompts or with_more_samples out"
        )
