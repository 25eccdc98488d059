"""``genalign train`` and ``genalign demo``."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genalign.algorithms.interfaces import with_stronger_kl
from genalign.cli import config, parsing
from genalign.cli.context import CommandContext, named_rewards, print_table, prompt_set, require_rate
from genalign.cli.evaluate import build_evaluator
from genalign.cli.resume import EncoderCache, InputFingerprint, TrackerRun, checkpoint_in, train_request
from genalign.diffusion.policy import Policy
from genalign.diffusion.rollout import generate
from genalign.diffusion.sampling import Sampling
from genalign.evaluation.evaluate import Evaluation, load_evaluation, plan_samples, suite_hash
from genalign.evaluation.paired import gain, task_gains
from genalign.evaluation.report import write_report
from genalign.metrics.intervals import Estimate
from genalign.runtime.distributed import SINGLE_PROCESS, ProcessGroup, ProcessGroupError, process_group
from genalign.runtime.files import write_json
from genalign.runtime.fsdp import Sharding, sharding_from_environment
from genalign.runtime.state import Generators, PerRankState, Stateful
from genalign.scoring.score import probe
from genalign.scoring.score_log import ScoreLog
from genalign.training.checkpointing import Checkpoints, CheckpointWriter
from genalign.training.nonfinite import is_out_of_memory
from genalign.training.panel import PanelMeasures, PanelSnapshot
from genalign.training.reward_hacking import HackingGuard
from genalign.training.round_log import SampleGridWriter
from genalign.training.run import RoundMonitors, train
from genalign.training.run_folder import RunFolder
from genalign.training.trainer import Trainer
from genalign.types import Prompt, PromptSet, RewardFunction


def train_command(context: CommandContext, arguments: Sequence[str]) -> int:
    """Run ``genalign train``, and say how to resume a run that fails."""
    arguments, resume = train_request(arguments)
    settings, plain = parsing.parse(config.Train, arguments, "train")
    try:
        with process_group(os.environ) as processes:
            return run_training(context, settings, plain, resume, processes)
    except ProcessGroupError as error:
        reason = str(error)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        reason = f"{error}. Free some disk space"
    except RuntimeError as error:
        if isinstance(error, parsing.INPUT_ERRORS) or not is_out_of_memory(error):
            raise
        # Arguments under which the same training needs less memory
        training, memory = settings.training, settings.model.memory
        options = [f"--model.memory.{name} true" for name in ("checkpointing", "offload") if not getattr(memory, name)]
        per_update = training.prompts_per_round * training.group_size // training.updates_per_round
        sizes = range(training.batch_size - training.group_size, 0, -training.group_size)
        options += ["--training.on_out_of_memory halve"]
        options += [f"(in a new run) --training.batch_size {size}" for size in sizes if per_update % size == 0][:1]
        reason = f"{str(error).splitlines()[0].rstrip('.')}. Less memory is needed with {' or '.join(options)}"
    print(f"error: Training stopped: {reason}. Resume with: genalign train --resume {settings.output}", file=sys.stderr)
    return 1


def run_training(
    context: CommandContext,
    settings: config.Train,
    plain: Mapping[str, Any],
    resume: bool = False,
    processes: ProcessGroup = SINGLE_PROCESS,
) -> int:
    """Evaluate, train, evaluate again, and write the report.

    Args:
        context: The pipelines and rewards.
        settings: The configuration.
        plain: The configuration as plain JSON.
        resume: Continue the run in ``settings.output``, if there is one.
        processes: The ranks of the run.

    Returns:
        The exit status: 130 after Ctrl-C, else 0.
    """
    # Refuse what would fail later, before anything is loaded
    settings.training.require_shares(processes.world_size)
    require_trackers(settings.trackers)
    prompts, sharding = prompt_set(settings.prompts), _sharding(settings, processes)
    for source in settings.evaluation_prompts():
        prompt_set(source)
    folder = RunFolder(Path(settings.output), processes)
    checkpoints = Checkpoints(folder.path / "checkpoints", settings.checkpoint.keep, processes)
    checkpoint = checkpoint_in(folder, checkpoints, plain) if resume else None
    if checkpoint is None:
        folder.require_unused()
    processes.barrier()  # no rank writes before every rank has checked

    # Assemble the run, then measure the untrained model or restore the checkpoint
    run = TrainingRun(context, settings, prompts, folder, sharding)
    tracker_run = TrackerRun()
    parts: dict[str, Stateful] = {
        "inputs": InputFingerprint(run.pipeline.fingerprint, suite_hash(prompts)),
        "trainer": run.trainer,
        "texts": EncoderCache(run.pipeline),
        "tracker": tracker_run,
        **({"guard": run.guard} if run.guard else {}),
        "generators": PerRankState(Generators(), processes),
    }
    writer = CheckpointWriter(checkpoints, parts, run.score_log, settings.checkpoint.every)
    if checkpoint is None:
        if run.guard:
            run.guard.begin()
        folder.begin(plain)
        if run.before_after:
            run.before_after(output=folder.path / "before")
        writer.begin()
    else:
        writer.resume(checkpoint)
        folder.resume(plain, checkpoint.rounds)

    # Train; Ctrl-C ends the run after a round
    loggers = trackers(settings.trackers, folder.path, tracker_run.id)
    if not train(run.trainer, folder, run.pipeline, writer, run.monitors(), loggers):
        if processes.is_main:
            print(
                f"Training stopped at round {run.trainer.rounds_done}: interrupted."
                f" Resume with: genalign train --resume {folder.path}"
            )
        return 130

    # Evaluate the trained model, and write the report
    run.evaluate_after()
    if processes.is_main:
        print(f"report: {write_report(folder.path)}")
    return 0


class TrainingRun:
    """The model, rewards and trainer of a run, and the measurements before, during and after training.

    Args:
        context: The pipelines and rewards.
        settings: The configuration.
        prompts: The training prompts.
        folder: The folder of the run.
        sharding: FSDP settings; None for a copy of the network on every rank.

    Raises:
        ValueError: The model, the rewards and the settings do not go together.
    """

    def __init__(
        self,
        context: CommandContext,
        settings: config.Train,
        prompts: PromptSet,
        folder: RunFolder,
        sharding: Sharding | None,
    ) -> None:
        self.context, self.settings, self.prompts = context, settings, prompts
        self.folder, self.processes = folder, folder.processes
        self.sampling = settings.evaluation or settings.sampling  # of everything but the training samples

        # Load the model and the rewards, and try them on two samples
        self.pipeline, rewards = context.load(settings.model), named_rewards(settings.rewards)
        require_rate(settings, self.pipeline.sample_rate)
        first = prompts.prompts[:2]
        probe(rewards, self._generate(first, [0] * len(first), settings.sampling, 2), first)

        # Prepare the trained weights (a new adapter, the adapter init_lora, or the whole network) and the trainer
        if settings.init_lora is not None:
            self.pipeline.load_lora(settings.init_lora)
        seed, has_adapter = settings.training.seed, settings.init_lora is not None
        self.policy = Policy(
            self.pipeline.denoiser, settings.lora, settings.ema_decay, seed, has_adapter, self.processes, sharding
        )
        self.score_log, suspects = ScoreLog(), folder.path / "suspects"
        self.trainer = Trainer(
            self.pipeline,
            self.policy,
            self.score_log.logged(rewards),
            prompts,
            settings.recipe,
            settings.training,
            settings.sampling,
            suspects / f"process-{self.processes.rank}" if self.processes.rank else suspects,
        )

        # Prepare the measurements
        hacking, held_out, before_after = settings.reward_hacking, settings.held_out, settings.before_after
        if hacking.on_red.raise_kl is not None:
            with_stronger_kl(settings.recipe.objective, hacking.on_red.raise_kl)  # refuses an objective without a KL
        self.guard: HackingGuard | None = None
        if hacking.every:
            self.hacking_jobs = plan_samples(prompt_set(hacking.prompts), hacking.samples_per_task, hacking.seeds)
            names = tuple(hacking.rewards)
            self.guard = HackingGuard(self.hacking_snapshot, names, hacking.limits, hacking.on_red, hacking.every)
        self.held_out = self._evaluator(held_out, held_out.scorers) if held_out.every else None
        own = {reward.name: reward for reward in rewards}
        self.before_after = self._evaluator(before_after, own) if before_after else None

    def monitors(self) -> RoundMonitors:
        """Collect what is measured during training."""
        grid, held_out = self.settings.sample_grid, self.settings.held_out
        writer = SampleGridWriter(self.sample_grid, self.pipeline.sample_rate, grid.every) if grid.every else None
        return RoundMonitors(self.evaluate_held_out if self.held_out else None, held_out.every, self.guard, writer)

    def evaluate_held_out(self) -> dict[str, Estimate]:
        """Score the averaged weights on held-out prompts."""
        assert self.held_out is not None, "held_out.every is set"
        with self.policy.averaged():
            return self.held_out().overall

    def evaluate_after(self) -> None:
        """Evaluate the averaged weights, if configured, into the folder after/, and write and print the gains."""
        if self.before_after is None:
            return
        with self.policy.averaged():
            after = self.before_after(output=self.folder.path / "after")
        if self.processes.is_main:
            before = load_evaluation(self.folder.path / "before")
            gains = {name: estimate.as_dict() for name, estimate in gain(before, after).items()}
            write_json(self.folder.path / "gain.json", gains)
            print_gains(before, after)

    def hacking_snapshot(self) -> PanelSnapshot:
        """Measure the averaged weights for the monitor of reward hacking.

        The main rank measures for all, since a reward may return something else on another.
        """
        tensors: dict[str, Tensor] = {}
        if self.processes.is_main or self.policy.sharded:
            hacking, prompts = self.settings.reward_hacking, [job.prompt for job in self.hacking_jobs]
            with self.policy.averaged():
                seeds = [job.seed for job in self.hacking_jobs]
                samples = self._generate(prompts, seeds, self.sampling, hacking.batch_size)
            if self.processes.is_main:
                measures = PanelMeasures(hacking.rewards, hacking.features, hacking.diagnostics)
                tensors = measures(samples, prompts).tensors()
        return PanelSnapshot.from_tensors(self.processes.broadcast(tensors))

    def sample_grid(self) -> Tensor | None:
        """Generate samples of evenly spaced training prompts; None on ranks that do not write them."""
        if not (self.processes.is_main or self.policy.sharded):
            return None
        count = min(self.settings.sample_grid.count, len(self.prompts))
        prompts = [self.prompts.prompts[number * len(self.prompts) // count] for number in range(count)]
        with self.policy.averaged(), self.pipeline.separate_encoding():
            samples = self._generate(prompts, range(count), self.sampling, self.settings.training.batch_size)
        return samples if self.processes.is_main else None

    def _generate(self, prompts: Sequence[Prompt], seeds: Sequence[int], sampling: Sampling, batch_size: int) -> Tensor:
        """Generate one sample per prompt and seed, without noise after the first level."""
        texts, grid = [prompt.text for prompt in prompts], sampling.grid(self.pipeline)
        return torch.cat(list(generate(self.pipeline, texts, seeds, grid, sampling.guidance, batch_size)))

    def _evaluator(
        self, amount: config.HeldOut | config.BeforeAfter, scorers: Mapping[str, RewardFunction]
    ) -> partial[Evaluation]:
        scorers = self.context.scorers_for(amount.prompts, scorers)
        model, processes = self.settings.model, self.processes
        return build_evaluator(self.pipeline, model, self.sampling, amount, amount.prompts, scorers, processes)


def _sharding(settings: config.Train, processes: ProcessGroup) -> Sharding | None:
    """Read the launcher's FSDP settings. Raises ValueError if the training settings do not work with them."""
    sharding = sharding_from_environment(os.environ, processes.world_size)
    conflicts = {
        "lora null: train an adapter": settings.lora is None,
        "training.optimizer adamw8bit: choose adamw": settings.training.optimizer != "adamw",
        "training.on_out_of_memory halve: ranks would diverge": settings.training.on_out_of_memory == "halve",
    }
    if sharding and (names := [name for name, conflict in conflicts.items() if conflict]):
        raise ValueError(f"FSDP cannot train a sharded network with {'; '.join(names)}")
    return sharding


def require_trackers(names: Sequence[str]) -> None:
    """Raise ValueError for a tracker that is not installed: accelerate would ignore it."""
    for name in names:
        if find_spec(name) is None:
            raise ValueError(f"trackers names {name}, which is not installed: pip install {name}")


def trackers(names: Sequence[str], folder: Path, run: str) -> list[Any]:
    """Open experiment trackers through accelerate; a resumed run continues the one with the id ``run`` on a server."""
    if not names:
        return []
    from accelerate import Accelerator

    accelerator = Accelerator(log_with=list(names), project_dir=str(folder))
    by_id, by_name = {"id": run, "resume": "allow"}, {"name": run, "resume": "allow"}
    options = {"wandb": by_id, "swanlab": by_id, "trackio": by_name}
    accelerator.init_trackers("genalign", init_kwargs={name: options[name] for name in names if name in options})
    return list(accelerator.trackers)


def print_gains(before: Evaluation, after: Evaluation) -> None:
    """Print before, after and gain with intervals: the first score by task, and every score overall."""
    first = before.score_names[0]
    estimates = [
        (task, before.tasks[task][first], after.tasks[task][first], gains[first])
        for task, gains in task_gains(before, after).items()
    ]
    estimates += [
        ("overall" if score == first else f"overall: {score}", before.overall[score], after.overall[score], difference)
        for score, difference in gain(before, after).items()
    ]
    rows = [(name, f"{old.mean:.3f}", f"{new.mean:.3f}", gained.text("+.3f")) for name, old, new, gained in estimates]
    print_table(("task", "before", "after", "gain (95% interval)"), rows, f"{before.protocol.suite}: {first}")


_DEMOS = {"shapes": "demo.yaml", "tones": "demo-tones.yaml"}


def demo_command(context: CommandContext, arguments: Sequence[str]) -> int:
    """Run ``genalign demo [shapes | tones]``: training of an embedded model with a shipped configuration."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    world, rest = (arguments[0], arguments[1:]) if arguments and arguments[0] in _DEMOS else ("shapes", arguments)
    if rest and not rest[0].startswith("-"):
        raise ValueError(f"there is no demo of {rest[0]!r}: choose from {', '.join(_DEMOS)}")
    shipped = str(files("genalign.assets").joinpath(_DEMOS[world]))
    return train_command(context, ["--config", shipped, *rest])
