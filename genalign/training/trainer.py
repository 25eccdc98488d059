"""The training loop: prompts -> rollouts -> rewards -> credit -> optimizer steps (``genalign.training.learner``).

B = P prompts x G samples, S trained steps, K rewards.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from genalign.algorithms.advantages import zero_std_share
from genalign.algorithms.interfaces import MetricSums, RoundScores
from genalign.algorithms.recipe import Recipe
from genalign.algorithms.redraws import Member
from genalign.diffusion.policy import Policy
from genalign.diffusion.sampling import Sampling
from genalign.diffusion.transitions import Kernel
from genalign.prompts import PromptSampler
from genalign.runtime.determinism import deterministic, require_workspace
from genalign.runtime.files import with_prefix, without_prefix
from genalign.runtime.progress import SILENT, Progress
from genalign.runtime.state import State
from genalign.scoring.budget import Ledger, Metered, metered_rewards
from genalign.scoring.score import NamedReward, RewardMonitor, group_reward, named
from genalign.training.compatibility import require_fit
from genalign.training.credit_trial import try_credit
from genalign.training.learner import Learner
from genalign.training.noise_calibration import MovingNoise
from genalign.training.offline import OfflineSampler, pool_of, require_offline
from genalign.training.out_of_memory import PartSizes
from genalign.training.round_result import RoundResult
from genalign.training.run_folder import RunFolder, WeightStore
from genalign.training.sampler import SampledBatch, Sampler
from genalign.training.settings import TrainerSettings
from genalign.training.students import rollout_guidance
from genalign.types import Pipeline, Prompt, PromptSet, RewardFunction, TrainableReward


class Trainer:
    """The loop that trains a policy: ``rounds()`` yields after every round, so it can be evaluated or saved.

    Args:
        pipeline: The model.
        policy: Its trainable weights.
        rewards: A reward function, functions by name, or rewards with weights; weight 0 only reports.
        prompts: The prompts to train on, as a set or a list of texts.
        recipe: The method.
        settings: Size of a round, optimization, limits.
        sampling: Steps and guidance of the rollouts, and the kernel of the steps that the recipe does not train.
        skipped_updates: The folder for the tensors of updates with non-finite gradients; None writes none.

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
        skipped_updates: Path | None = None,
    ) -> None:
        rewards, prompts = named(rewards), PromptSet.of(prompts)
        pool = pool_of(settings.data, pipeline, settings.group_size, policy.processes) if settings.data else None
        prompts = pool.restricted(prompts) if pool else prompts
        self.ledger, self.processes = Ledger(), policy.processes
        grouped = group_reward({reward.name: reward.function for reward in rewards})
        settings = settings.fit(prompts, recipe.objective.unit, self.processes, notice=True, group_reward=grouped)
        require_fit(recipe, settings, policy, settings.batch_sizes(recipe.objective.unit, self.processes.world_size))
        if recipe.shifts_noise:
            policy.shift_noise()
        self.pipeline, self.policy = Metered(pipeline, self.ledger), policy
        self.rewards = metered_rewards(rewards, self.ledger)
        self.settings = settings
        self.grid = sampling.grid(pipeline)
        self.guidance = rollout_guidance(pipeline, sampling, recipe.objective)
        if settings.deterministic:
            require_workspace(policy.device, os.environ)
        self.trainable = {r.name: r.function for r in rewards if isinstance(r.function, TrainableReward)}
        parts, keep_samples = PartSizes(settings.on_out_of_memory == "halve"), bool(self.trainable)
        own = settings, keep_samples, parts, sampling.kernel_on(self.grid)
        self.sampler: Sampler | OfflineSampler = Sampler(self.pipeline, self.rewards, self.grid, self.guidance, *own)
        steps = recipe.steps(pipeline.path, self.grid, 0, settings.seed)
        if pool:
            require_offline(recipe, steps)
            self.sampler = OfflineSampler(self.pipeline, self.rewards, pool, settings, keep_samples)
        kernel, counted = recipe.kernel_on(pipeline.path), [reward.name for reward in rewards if reward.weight]
        kernel.check(self.guidance, counted)
        moving = recipe.recalibration
        self.noise = MovingNoise(moving, kernel, self.grid, self.guidance, counted) if moving else None
        # Refuse an impossible recipe before any compute
        try_credit(recipe, rewards, settings.prompts_per_round, settings.group_size, len(steps))
        self.prompts = PromptSampler(prompts, settings.prompts_per_round, settings.seed)
        self.monitor = RewardMonitor(settings.max_failed_fraction, settings.max_rounds_without_credit)
        self.learner = Learner(recipe, settings, self.pipeline, policy, sampling, self.rewards, parts, skipped_updates)
        self.rounds_done = 0
        self.samples = 0
        self.seconds = 0.0

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
        start, before = time.perf_counter(), self.ledger.copy()
        factor = self.settings.rate_factor(index, self.ledger.nfe)
        if isinstance(self.sampler, OfflineSampler):
            _, prompts = self.sampler.draw(prompts, self._name(index))
        batches = self.sample(index, prompts, progress)
        drawn = self.gather_scores(batches, prompts)
        prompts, batches, scores, further = self._redrawn(index, prompts, batches, drawn, progress)
        if self.samples == 0:
            self.monitor.compare(self.rewards, drawn.scores)
        self.monitor.see_scores(drawn.scores)
        reward_metrics = self._update_rewards(batches, prompts, scores.group)
        sums = self.learner.learn(index, prompts, batches, scores, self.kernel, progress, factor)
        self.monitor.see_round(self.learner.without_credit)
        self.learner.after_round(index)
        noise_metrics = self.noise.after_round(index, self._steps(index), scores) if self.noise else {}
        self.ledger.add(self.processes.all_gather_object(self.ledger.since(before).counts), before)
        self.rounds_done += 1
        self.samples += len(scores.scores) + further
        self.seconds += time.perf_counter() - start
        metrics = reward_metrics | noise_metrics | (self.learner.balance.metrics() if self.learner.balance else {})
        if self.recipe.redraw:
            trained = zero_std_share(scores.combined, scores.group)
            metrics |= {"redrawn_samples": float(further), "trained_zero_std_share": trained}
        return self._result(index, drawn, sums, metrics)

    @property
    def recipe(self) -> Recipe:
        """The method, whose KL may have been raised."""
        return self.learner.recipe

    @property
    def kernel(self) -> Kernel:
        """The stochastic sampler of the next round."""
        return self.noise.kernel if self.noise else self.recipe.kernel_on(self.pipeline.path)

    def sample(
        self,
        index: int,
        prompts: Sequence[Prompt],
        progress: Progress = SILENT,
        members: Sequence[Member | None] | None = None,
    ) -> list[SampledBatch]:
        """Sample and score this rank's batches of round ``index``, with the lagging policy if the recipe has one.

        If ``members`` are given, only those are drawn, see ``Sampler``.
        """
        recipe = replace(self.recipe, kernel=self.kernel)
        arguments = (recipe, self._steps(index), prompts, self._name(index), self.processes, progress)
        old = self.learner.old
        with contextlib.nullcontext() if old is None else self.policy.using(old):
            return list(self.sampler(*arguments) if members is None else self.sampler(*arguments, members))

    def _name(self, index: int) -> str:
        """The seed of round ``index``."""
        return f"{self.settings.seed}/{index}"

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
                gathered[name] = self.processes.interleaved(tensors, self.learner.batch_sizes)
        tasks = list(dict.fromkeys(prompt.task for prompt in prompts))
        task = torch.tensor([tasks.index(prompt.task) for prompt in prompts])[group]
        weights, names = zip(*((reward.weight, reward.name) for reward in self.rewards), strict=True)
        seed = f"{self.settings.seed}/{self.rounds_done}"
        return RoundScores(weights=weights, group=group, task=task, names=names, seed=seed, **gathered)

    def _redrawn(
        self,
        index: int,
        prompts: Sequence[Prompt],
        batches: list[SampledBatch],
        scores: RoundScores,
        progress: Progress,
    ) -> tuple[Sequence[Prompt], list[SampledBatch], RoundScores, int]:
        """Draw other samples in place of zero-variance groups, if the recipe says so.

        Every rank draws those of its own batches. Returns the prompts, batches and scores to train, and the number of
        additional samples that were drawn.
        """
        rule, drawn = self.recipe.redraw, 0
        if rule is None:
            return prompts, batches, scores, drawn
        first, limit, other = len(prompts), int(rule.extra * len(scores.scores)), self.prompts.further(index, prompts)
        while redraw := rule(prompts, scores, other[len(prompts) - first :], limit - drawn):
            prompts, rows = redraw.prompts, torch.split(redraw.rows, list(self.learner.batch_sizes))
            sampled = iter(self.sample(index, prompts, progress, redraw.members))
            own = [rows[n].nonzero()[:, 0] for n in self.processes.indices(len(rows)) if self.learner.batch_sizes[n]]
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
        batched = torch.split(
            torch.arange(sum(self.learner.batch_sizes)), list(self.learner.batch_sizes)
        )  # the round's rows
        rows = torch.cat([batched[number] for number in self.processes.indices(len(batched))]).tolist()
        repeated = [prompts[place] for place in group.tolist()]
        return {
            f"{name}/{metric}": value
            for name, reward in self.trainable.items()
            for metric, value in reward.update(samples, repeated, rows).items()
        }

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
            learning_rate=self.learner.optimizer.param_groups[0]["lr"],
            metrics={name: mean for name, mean in sums.means().items() if name not in named} | dict(reward_metrics),
            samples=self.samples,
            nfe=self.ledger.nfe,
            calls=dict(self.ledger.counts),
            seconds=self.seconds,
        )

    def save(self, directory: str | Path) -> None:
        """Write the averaged weights: lora/ (diffusers) and peft/, or, if the whole network was trained, denoiser/.

        In a distributed run every rank must call this. Raises TypeError for a pipeline that cannot write weights.
        """
        pipeline = self.pipeline.pipeline
        if not isinstance(pipeline, WeightStore):
            raise TypeError(
                f"{type(pipeline).__name__} has no save_lora and save_denoiser: train a pipeline that defines them"
            )
        RunFolder(Path(directory), self.processes).save(self.policy, pipeline)

    def state(self) -> State:
        """Return the state that later rounds depend on, except what is derived from the seed and the round."""
        learned = self.learner.state()
        tensors, numbers = dict(learned.tensors), dict(learned.numbers)
        for place, reward in enumerate(self.trainable.values()):
            tensors |= with_prefix(f"reward.{place}.", reward.tensors())
        if self.noise:
            noise = self.noise.state()
            tensors |= with_prefix("noise.", noise.tensors)
            numbers["noise"] = noise.numbers
        numbers |= {
            "rounds": self.rounds_done,
            "samples": self.samples,
            "seconds": self.seconds,
            "calls": dict(self.ledger.counts),
            "rounds_without_credit": self.monitor.rounds_without_credit,
        }
        return State(tensors, numbers)

    def restore(self, state: State) -> None:
        """Restore a ``state()`` in a new trainer with the same settings."""
        self.learner.restore(state)
        numbers = state.numbers
        for place, reward in enumerate(self.trainable.values()):
            reward.load_tensors(without_prefix(f"reward.{place}.", state.tensors))
        if self.noise:
            self.noise.restore(State(without_prefix("noise.", state.tensors), numbers["noise"]))
        self.rounds_done, self.samples, self.seconds = numbers["rounds"], numbers["samples"], numbers["seconds"]
        self.monitor.rounds_without_credit = numbers["rounds_without_credit"]
        self.ledger.counts.update(numbers["calls"])
