"""The model, rewards and trainer of a training run, and the measurements before, during and after training."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from genalign.algorithms.interfaces import traits_of, with_stronger_kl
from genalign.algorithms.reward_gradient import require_gradients
from genalign.cli.base_samples import require_base, warn_of_other_base
from genalign.cli.context import CommandContext, named_rewards, print_table, require_rate
from genalign.cli.evaluate import build_evaluator
from genalign.cli.evaluate_settings import EvaluationSize
from genalign.cli.resume import (
    EncoderCache,
    InputFingerprint,
)
from genalign.cli.run_prompts import RunPrompts
from genalign.cli.train_settings import BeforeAfter, HeldOut, Train
from genalign.diffusion.policy import Policy
from genalign.diffusion.rollout import SeededSamples
from genalign.diffusion.sampling import Sampling
from genalign.evaluation.evaluate import Evaluation, load_evaluation, plan_samples, suite_hash
from genalign.evaluation.folder import EvaluationFolder
from genalign.evaluation.paired import effect_sizes, gain, gain_record, newly_correct, pairs_by_gain, task_gains
from genalign.evaluation.report.words import gain_verdict, gained_tasks, newly_correct_words
from genalign.evaluation.scorers import Scorer
from genalign.runtime.distributed import (
    SINGLE_PROCESS,
)
from genalign.runtime.files import write_json
from genalign.runtime.fsdp import Sharding
from genalign.runtime.progress import SILENT, Progress
from genalign.runtime.state import Generators, PerRankState, Stateful
from genalign.scoring.score import probe
from genalign.scoring.score_log import ScoreLog
from genalign.training.best_weights import BestWeights, HeldOutScores, deciding_weights, sum_name
from genalign.training.offline import stored_score
from genalign.training.panel import PanelMeasures, PanelSnapshot
from genalign.training.reward_hacking import HackingGuard
from genalign.training.round_log import SampleGridWriter
from genalign.training.run import RoundMonitors
from genalign.training.run_folder import RunFolder
from genalign.training.time_budget import RoundFitter
from genalign.training.trainer import Trainer
from genalign.types import Prompt
from genalign.worlds.registry import world_of


class TrainingRun:
    """The model, rewards and trainer of a run, and the measurements before, during and after training.

    Args:
        context: The pipelines and rewards.
        settings: The configuration.
        prompts: The prompts of the run.
        folder: The folder of the run.
        sharding: FSDP settings; None for a copy of the network on every rank.
        progress: Shows what is generated.

    Raises:
        ValueError: The model, the rewards and the settings do not fit together.
    """

    def __init__(
        self,
        context: CommandContext,
        settings: Train,
        prompts: RunPrompts,
        folder: RunFolder,
        sharding: Sharding | None,
        progress: Progress = SILENT,
    ) -> None:
        self.context, self.settings, self.prompts = context, settings, prompts
        self.folder, self.processes, self.progress = folder, folder.processes, progress
        self.sampling = settings.evaluation or settings.sampling  # of everything but the training samples

        # Load the model and the rewards, and try them on two samples of one prompt, which some compare
        self.pipeline, self.rewards = context.load(settings.model), named_rewards(settings.rewards)
        rewards = self.rewards
        require_rate(settings, self.pipeline.sample_rate)
        require_base(self.pipeline, settings)
        warn_of_other_base(self.pipeline, settings, self.processes)
        self.pipeline.encode_ahead(prompts.texts(), self.processes, self.processes.barrier, progress)
        first = [prompts.training.prompts[0]] * 2
        called = [reward for reward in rewards if reward.function is not stored_score]  # those are columns of a pool
        differentiated = traits_of(settings.recipe.objective).reward_gradients
        if called or differentiated:
            samples = self._generate(first, [0, 1], settings.sampling, 2)
            probe(called, samples, first)
            if differentiated:
                require_gradients(rewards, samples, first)

        # Prepare the trained weights (a new adapter, the adapter init_lora, or the whole network) and the trainer
        if settings.init_lora is not None:
            self.pipeline.load_lora(settings.init_lora)
        seed, has_adapter = settings.training.seed, settings.init_lora is not None
        self.policy = Policy(
            self.pipeline.denoiser, settings.lora, settings.ema_decay, seed, has_adapter, self.processes, sharding
        )
        self.best = BestWeights(self.policy)
        self.score_log, skipped_updates = ScoreLog(), folder.path / "skipped_updates"
        self.trainer = Trainer(
            self.pipeline,
            self.policy,
            self.score_log.logged(rewards),
            prompts.training,
            settings.recipe,
            settings.training,
            settings.sampling,
            skipped_updates / f"process-{self.processes.rank}" if self.processes.rank else skipped_updates,
        )

        # Prepare the measurements
        hacking, held_out, before_after = settings.reward_hacking, settings.held_out, settings.before_after
        if hacking.on_red.raise_kl is not None:
            with_stronger_kl(settings.recipe.objective, hacking.on_red.raise_kl)  # refuses an objective without a KL
        self.guard: HackingGuard | None = None
        if hacking.every:
            monitored = prompts.evaluations["reward_hacking"]
            self.hacking_jobs = plan_samples(monitored, hacking.samples_per_task, hacking.seeds)
            self.hacking_rewards = hacking.rewards or {reward.name: reward for reward in rewards if not reward.weight}
            names = tuple(self.hacking_rewards)
            self.guard = HackingGuard(self.hacking_snapshot, names, hacking.limits, hacking.on_red, hacking.every)
        own = {reward.name: reward for reward in called}
        self.held_out = self._evaluator("held_out", held_out, held_out.scorers, own) if held_out.is_on else None
        self.before_after = self._evaluator("before_after", before_after, own) if before_after else None

    def stateful_parts(self, prompts: RunPrompts) -> dict[str, Stateful]:
        """Collect the named parts of a checkpoint."""
        return {
            "inputs": InputFingerprint(self.pipeline.fingerprint, suite_hash(prompts.training)),
            "trainer": self.trainer,
            "best": self.best,
            "texts": EncoderCache(self.pipeline),
            **({"guard": self.guard} if self.guard else {}),
            "generators": PerRankState(Generators(), self.processes),
        }

    def monitors(self) -> RoundMonitors:
        """Collect the measurements during training."""
        grid, held_out = self.settings.sample_grid, self.settings.held_out
        writer = SampleGridWriter(self.sample_grid, self.pipeline.sample_rate, grid.every) if grid.every else None
        evaluate = self.evaluate_held_out if self.held_out else None
        return RoundMonitors(evaluate, held_out.every, held_out.every_seconds, self.guard, writer)

    def round_fitter(self) -> RoundFitter:
        """Build the fitter of the number of rounds to the time budget of the command."""
        settings, started = self.settings, self.context.started
        sections = settings.held_out, settings.reward_hacking, settings.sample_grid
        every = [section.every for section in sections if section.every]
        afterwards = EvaluationFolder(self.folder.path / "before").cost().get("seconds", 0.0)
        record, by_time = self.folder.record_rounds, settings.held_out.every_seconds
        return RoundFitter(settings.time_budget, started, afterwards, every, record, by_time)

    def evaluate_held_out(self) -> HeldOutScores:
        """Score the averaged weights on held-out prompts."""
        assert self.held_out is not None, "held_out.every or held_out.every_seconds is set"
        with self.policy.averaged(), self.progress.phase("held-out"):
            evaluation = self.held_out(progress=self.progress)
        weights = deciding_weights(evaluation.score_names, self.rewards)
        decision = evaluation.weighted_sum(weights) if weights else None
        return HeldOutScores(evaluation.overall, evaluation.protocol.suite, sum_name(weights), decision)

    def evaluate_before(self) -> None:
        """Evaluate the untrained model, if configured, into the folder before/."""
        if self.before_after is not None:
            start = time.monotonic()
            with self.progress.phase("before"):
                self.before_after(self.folder.path / "before", self.progress)
            if self.processes.is_main:
                write_json(self.folder.path / "before" / "cost.json", {"seconds": time.monotonic() - start})

    def evaluate_after(self) -> None:
        """Evaluate the best weights, if configured, into the folder after/, and write and print the gains."""
        if self.before_after is None:
            return
        with self.best.weights(), self.progress.phase("after"):
            after = self.before_after(self.folder.path / "after", self.progress)
        if self.processes.is_main:
            if self.best.round:
                self.best.round.write(self.folder.path / "after")
            before = load_evaluation(self.folder.path / "before")
            write_json(self.folder.path / "gain.json", gain_record(before, after))
            print_gains(before, after)

    def hacking_snapshot(self) -> PanelSnapshot:
        """Measure the averaged weights for the monitor of reward hacking.

        All ranks share the samples, and the main rank measures them for all, as a reward may return something different
        on another.
        """
        tensors: dict[str, Tensor] = {}
        hacking, prompts = self.settings.reward_hacking, [job.prompt for job in self.hacking_jobs]
        with self.policy.averaged(), self.progress.phase("reward hacking"):
            seeds = [job.seed for job in self.hacking_jobs]
            samples = self._generate(prompts, seeds, self.sampling, self._batch_size(hacking), shared=True)
        if self.processes.is_main:
            measures = PanelMeasures(self.hacking_rewards, hacking.features, hacking.diagnostics)
            tensors = measures(samples, prompts).tensors()
        return PanelSnapshot.from_tensors(self.processes.broadcast(tensors))

    def sample_grid(self) -> Tensor | None:
        """Generate samples of evenly spaced training prompts; None on ranks that do not write them."""
        if not (self.processes.is_main or self.policy.sharded):
            return None
        training = self.prompts.training.prompts
        count = min(self.settings.sample_grid.count, len(training))
        prompts = [training[number * len(training) // count] for number in range(count)]
        with self.policy.averaged(), self.pipeline.separate_encoding(), self.progress.phase("sample grid"):
            samples = self._generate(prompts, range(count), self.sampling, self.trainer.settings.batch_size)
        return samples if self.processes.is_main else None

    def _generate(
        self,
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        sampling: Sampling,
        batch_size: int,
        shared: bool = False,
    ) -> Tensor:
        """Generate one sample per prompt and seed.

        Args:
            prompts: The prompts.
            seeds: The seeds of all noise.
            sampling: Steps, guidance and kernel.
            batch_size: Samples per batch.
            shared: Whether the ranks take turns with the batches, so all must call this; else each makes all.
        """
        processes = replace(self.processes, in_step=self.policy.sharded) if shared else SINGLE_PROCESS
        grid, guidance = sampling.grid(self.pipeline), sampling.guidance_scale(self.pipeline)
        source = SeededSamples(self.pipeline, prompts, seeds, grid, guidance, batch_size, sampling.kernel_on(grid))
        sizes, own = [len(part) for part in source.parts], list[Tensor]()
        with self.progress.phase("sampling", len(prompts)) as advance:
            for number in processes.batch_numbers(len(source)):
                batch = source.batch(number % len(source))
                if number < len(source):
                    own.append(batch)
                    advance(len(batch) * processes.world_size)
        shape = processes.all_gather_object(list(own[0].shape[1:]) if own else None)[0]
        return processes.interleaved(own or [torch.empty(0, *shape)], sizes)  # there may be fewer batches than ranks

    def _batch_size(self, size: EvaluationSize) -> int:
        """Return the batch size of an evaluation, by default that of the training samples."""
        return size.batch_size or self.trainer.settings.batch_size

    def _evaluator(
        self,
        name: str,
        amount: HeldOut | BeforeAfter,
        scorers: Mapping[str, Scorer],
        otherwise: Mapping[str, Scorer] | None = None,
    ) -> Callable[..., Evaluation]:
        """Bind an evaluation of the section ``name`` to the model.

        Args:
            name: The section, whose prompts are in ``self.prompts``.
            amount: The size of the evaluation, and the source of its prompts.
            scorers: Rewards in addition to the verifier of the prompts' world.
            otherwise: Rewards if there are neither.
        """
        source, prompts = amount.prompts or self.settings.prompts, self.prompts.evaluations[name]
        world, batch_size = world_of(source), self._batch_size(amount)
        size = EvaluationSize(amount.samples_per_task, amount.seeds, batch_size)
        if world is None:  # of a user's prompts, each has ``seeds`` noises, however few they are
            most = max(len({prompt.text for prompt in task}) for task in prompts.by_task().values())
            size = replace(size, samples_per_task=min(size.samples_per_task, most * size.seeds))
        scorers = self.context.scorers_for(source, scorers) or otherwise or {}
        model, processes = self.settings.model, replace(self.processes, in_step=self.policy.sharded)
        return build_evaluator(self.pipeline, model, self.sampling, size, prompts, scorers, world, processes)


def print_gains(before: Evaluation, after: Evaluation) -> None:
    """Print before, after and gain with intervals: the first score by task if there are several, and all overall.

    Then a line on each score, one on the tasks that gained, and one on the samples that became correct.
    """
    first, overall, by_task = before.score_names[0], gain(before, after), task_gains(before, after)
    estimates = [
        (task, before.tasks[task][first], after.tasks[task][first], gains[first])
        for task, gains in by_task.items()
        if len(by_task) > 1
    ]
    estimates += [
        ("overall" if score == first else f"overall: {score}", before.overall[score], after.overall[score], difference)
        for score, difference in overall.items()
    ]
    rows = [
        (name, f"{old.mean:.3f}", f"{new.mean:.3f}", gained.text("+.3f"), str(gained.n))
        for name, old, new, gained in estimates
    ]
    heading = ("task", "before", "after", "gain (95% interval)", "prompts")
    print_table(heading, rows, f"{before.protocol.suite}: {first}")
    for score, effect in effect_sizes(before, after).items():
        print(f"{score}: {gain_verdict(overall[score], effect).text}")
    if len(by_task) > 1:
        print(gained_tasks(first, by_task))
    if right := newly_correct(pairs_by_gain(before, after)):
        print(newly_correct_words(right))
