"""The optimizer steps of a round: credit, losses and gradients on replays of its samples, and companion networks.

B = P prompts x G samples, S trained steps, K rewards.
"""

from __future__ import annotations

import itertools
import logging
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from genalign.algorithms.interfaces import (
    MetricSums,
    PartMetrics,
    RoundScores,
    TermCounts,
    TermScales,
    UpdateBatch,
    UpdateContext,
    half_micro_batch,
    with_stronger_kl,
)
from genalign.algorithms.recipe import Recipe
from genalign.diffusion.noise import derived_seed
from genalign.diffusion.policy import Policy
from genalign.diffusion.sampling import Sampling
from genalign.diffusion.transitions import Kernel
from genalign.runtime.files import with_prefix, without_prefix
from genalign.runtime.fsdp import full_tensor
from genalign.runtime.progress import SILENT, Progress
from genalign.runtime.state import State, Stateful, load_optimizer_tensors, optimizer_tensors
from genalign.scoring.budget import Metered
from genalign.scoring.score import NamedReward
from genalign.training.balanced_gradients import BalancedGradients, credit_by_reward
from genalign.training.elastic_reset import ResetWeights
from genalign.training.epochs import Batches, updates_of_round
from genalign.training.loss_scale import LossScale
from genalign.training.nonfinite import NonFiniteGuard, SkippedUpdate
from genalign.training.out_of_memory import PartSizes, free_memory, is_out_of_memory
from genalign.training.sampler import SampledBatch
from genalign.training.settings import FittedSettings, optimizer_class
from genalign.training.students import rollout_guidance
from genalign.training.trailing_weights import TrailingWeights
from genalign.training.trust_region import RateController, RoundLimit, change_of_predictions
from genalign.types import CompilesBlocks, Prompt

logger = logging.getLogger(__name__)


class Learner:
    """Learns from this rank's part of the samples of a round: ``learn`` makes the optimizer steps.

    Args:
        recipe: The method.
        settings: Size of a round, optimization, limits.
        pipeline: The model, whose network calls are counted.
        policy: Its trainable weights.
        sampling: Steps and guidance of the rollouts, and the kernel of the steps that the recipe does not train.
        rewards: The rewards, whose calls are counted.
        parts: The batch sizes of decoding and scoring, on which the ranks agree after each round.
        skipped_updates: The folder for the tensors of updates with non-finite gradients; None writes none.

    Attributes:
        old: The sampling weights if they lag behind the trained ones, else None.
        micro_batch: The number of samples in a backward pass.
        without_credit: Whether no sample of the latest round had credit, or the loss had no term.
    """

    def __init__(
        self,
        recipe: Recipe,
        settings: FittedSettings,
        pipeline: Metered,
        policy: Policy,
        sampling: Sampling,
        rewards: Sequence[NamedReward],
        parts: PartSizes,
        skipped_updates: Path | None = None,
    ) -> None:
        self.recipe, self.settings, self.pipeline, self.policy = recipe, settings, pipeline, policy
        self.rewards, self.processes, self.parts = rewards, policy.processes, parts
        self.grid = sampling.grid(pipeline.pipeline)
        self.guidance = rollout_guidance(pipeline.pipeline, sampling, recipe.objective)
        self.elsewhere = sampling.kernel_on(self.grid)
        self.batch_sizes = settings.batch_sizes(recipe.objective.unit, self.processes.world_size)
        self.micro_batch = settings.micro_batch or max(self.batch_sizes)
        self.reset = ResetWeights(recipe.reset, policy) if recipe.reset else None
        self.balance = BalancedGradients(recipe.balance, rewards, recipe.objective, policy) if recipe.balance else None
        self.memory = TrailingWeights(recipe.memory, policy) if recipe.memory else None
        seed = derived_seed(settings.seed, "companion")
        self.companion = recipe.companion(pipeline, policy, seed) if recipe.companion else None
        auto = settings.learning_rate == "auto"
        region = settings.trust_region
        self.rates = RateController(region.target, region.initial_rate) if auto else None
        self.optimizer = optimizer_class(settings)(policy.parameters, weight_decay=settings.weight_decay)
        self.old = policy.snapshot() if recipe.lag else None
        self.nonfinite = NonFiniteGuard(settings.max_skipped_updates, skipped_updates)
        self.compile()
        self.loss_scale = LossScale.for_dtype(pipeline.compute_dtype, settings.loss_scale)
        self.kl_floors: list[float] = []
        self.without_credit = False

    def compile(self) -> None:
        """Compile the network for the batch sizes of sampling and of learning, if ``model.compile`` is on."""
        if isinstance(self.pipeline.pipeline, CompilesBlocks):
            self.pipeline.pipeline.compile_blocks((max(self.batch_sizes), self.micro_batch))

    def learn(
        self,
        index: int,
        prompts: Sequence[Prompt],
        sampled: Sequence[SampledBatch],
        scores: RoundScores,
        kernel: Kernel,
        progress: Progress = SILENT,
        rate_factor: float = 1.0,
    ) -> MetricSums:
        """Make the optimizer steps of a round: in each epoch, one on each part of the round's samples.

        Args:
            index: The round.
            prompts: The round's prompts.
            sampled: This rank's batches.
            scores: The scores of all ranks.
            kernel: The stochastic sampler that made them.
            progress: Shows the updates.
            rate_factor: The learning rate as a fraction of its maximum.
        """
        sums, epochs, updates = MetricSums(), self.settings.epochs, self.settings.updates_per_round
        model = self.pipeline, self.policy, self.grid, kernel, self.guidance
        memory = self.memory.weights if self.memory else None
        beside = memory, self.companion, self.elsewhere
        context = UpdateContext(*model, self.old, sums, prompts, self.rewards, *beside)
        own = self._own_batches(sampled, scores)
        self.without_credit = self._is_without_credit(own.values())
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
        """Compute the credit of a round, and return this rank's batches; a balance reweighs rewards in each update."""
        sizes, alone = list(self.batch_sizes), None
        if self.balance:
            by_reward = credit_by_reward(self.recipe.credit, scores)
            credit, alone = by_reward.sum(-1), torch.split(by_reward, sizes)
        else:
            credit = self.recipe.credit(scores)
        credits, groups = torch.split(credit, sizes), torch.split(scores.group, sizes)
        numbers = [number for number in self.processes.indices(len(sizes)) if sizes[number]]
        return {
            n: UpdateBatch(batch.rollout, credits[n], groups[n], on_policy=False, by_reward=alone[n] if alone else None)
            for n, batch in zip(numbers, sampled, strict=True)
        }

    def _is_without_credit(self, batches: Iterable[UpdateBatch]) -> bool:
        """Whether no sample of a round, on any rank, has credit, or the loss has no terms."""
        whole = [
            batch if batch.by_reward is None else replace(batch, credit=batch.by_reward.abs().sum(-1))
            for batch in batches
        ]
        credited = any(bool(batch.credit.nan_to_num().any()) for batch in whole)
        return not any(self.processes.all_gather_object(credited)) or not self._counts(whole).losses

    def _warn_of_mismatch(self, index: int, sums: MetricSums) -> None:
        """Warn if the first update of a round did not reproduce the sampled transitions."""
        clip_range = self.recipe.objective.clip_range
        if clip_range is not None and sums.log_ratio_max > 0.02 * clip_range:
            logger.warning(
                "Round %d: the first update's log-ratio reached %.1e, above 2%% of the clip range %.1e: sampling and"
                " training disagree. Likely causes: a different batch size or guidance order, mixed precision, a"
                " compiled network, dropout, a kernel whose arguments changed",
                index + 1,
                sums.log_ratio_max,
                clip_range,
            )

    def _limit(self, context: UpdateContext, batches: Batches, index: int, rate_factor: float) -> RoundLimit | None:
        """Begin the trust region of round ``index``, measured on a few samples of each batch on any rank."""
        if self.rates is None:
            return None
        seed = derived_seed(self.settings.seed, index, "d")
        count = -(-self.settings.trust_region.probe // sum(size > 0 for size in self.batch_sizes))
        changes = list[Callable[[], Tensor]]()
        for batch in batches.values():
            spread = torch.arange(min(count, len(batch))) * len(batch) // min(count, len(batch))
            for part in batch.select(spread).split(self.micro_batch):
                changes.append(change_of_predictions(context, part.to(self.policy.device), seed))

        def distance() -> float:
            values = torch.cat([change() for change in changes]).tolist() if changes else []
            return statistics.fmean(itertools.chain(*self.processes.all_gather_object(values)))

        return RoundLimit(self.rates, distance, rate_factor**2)

    def _set_rate(self, factor: float) -> None:
        """Set the learning rate to its maximum, or that of the trust region, times ``factor``."""
        highest = self.rates.rate if self.rates else float(self.settings.learning_rate)
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = highest * factor

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
            update: The index of the update over all epochs of the round; it is skipped if its gradient or loss is not
                finite.
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
        """Weigh the rewards' credits in the batches of an update, recomputing the weights from gradients if due."""
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
            self.compile()
            self.optimizer.zero_grad()
            free_memory()
            context.metrics.rollback(before)

    def raise_kl(self, least: float) -> None:
        """Double the weight of the KL to the untrained policy, and raise it to at least ``least``."""
        self.recipe = replace(self.recipe, objective=with_stronger_kl(self.recipe.objective, least))
        self.kl_floors.append(least)

    def after_round(self, index: int) -> None:
        """Update the sampling weights and the trailing weights after round ``index``, and reset the policy if due."""
        if self.old is not None and self.recipe.lag is not None:
            self.old.update(self.recipe.lag.decay(index))
        if self.memory:
            self.memory.after_round(index)
        if self.reset:
            self.reset.after_round(index, self.old)

    @property
    def stateful(self) -> dict[str, Stateful]:
        """The parts that have a state of their own, by name."""
        parts: dict[str, Stateful | None] = {"reset": self.reset, "balance": self.balance}
        parts |= {"memory": self.memory, "companion": self.companion}
        return {name: part for name, part in parts.items() if part is not None}

    def state(self) -> State:
        """Return the weights, the optimizer's state, and all else that later rounds depend on."""
        tensors = self.policy.tensors() | with_prefix("optimizer.", optimizer_tensors(self.optimizer))
        if self.old is not None:
            tensors |= with_prefix("old.", self.old.state_dict())
        states = {name: part.state() for name, part in self.stateful.items()}
        for name, state in states.items():
            tensors |= with_prefix(f"{name}.", state.tensors)
        numbers = {
            "updates": self.policy.updates,
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
        """Restore what ``state()`` returned."""
        numbers = state.numbers
        self.policy.load_tensors(state.tensors, numbers["updates"])
        load_optimizer_tensors(self.optimizer, without_prefix("optimizer.", state.tensors))
        if self.old is not None:
            self.old.load_state_dict(without_prefix("old.", state.tensors))
        for name, part in self.stateful.items():
            part.restore(State(without_prefix(f"{name}.", state.tensors), numbers["stateful"][name]))
        for least in numbers["raised_kl"]:
            self.raise_kl(least)
        self.nonfinite.in_row = numbers["skipped_updates"]
        self.micro_batch, self.loss_scale = numbers["micro_batch"], LossScale(**numbers["loss_scale"])
        self.parts.agree([PartSizes(**numbers["parts"])])
        if self.rates:
            self.rates.rate = numbers["learning_rate"]
