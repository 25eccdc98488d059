"""``genalign train`` and ``genalign demo``."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genalign.algorithms.interfaces import with_stronger_kl
from genalign.cli import config
from genalign.cli.context import Checkpoint, CommandContext, named_rewards, prompt_set, require_rate
from genalign.cli.evaluate import Exam, exam
from genalign.cli.memory import advice
from genalign.cli.resume import EncoderCache, InputFingerprint, TrackerRun, checkpoint_in, requested
from genalign.diffusion.policy import Policy
from genalign.diffusion.rollout import generate
from genalign.diffusion.sampling import Sampling
from genalign.evaluation.evaluate import Evaluation, load_evaluation, plan, suite_hash
from genalign.evaluation.paired import gain, task_gains
from genalign.evaluation.report import write_report
from genalign.metrics.intervals import Estimate
from genalign.runtime.distributed import SINGLE_PROCESS, ProcessGroup, ProcessGroupError, process_group
from genalign.runtime.files import write_json
from genalign.runtime.fsdp import Sharding, sharding_from_environment
from genalign.runtime.state import Generators, PerRankState, Stateful
from genalign.scoring.score import NamedReward, probe
from genalign.scoring.score_log import ScoreLog
from genalign.training.checkpointing import Checkpoints, CheckpointWriter
from genalign.training.nonfinite import is_out_of_memory
from genalign.training.reward_hacking import HackingGuard, PanelMeasures, PanelSnapshot
from genalign.training.run import RoundMonitors, RunFolder, train
from genalign.training.sample_grid import SampleGridWriter
from genalign.training.trainer import Trainer
from genalign.types import Prompt, PromptSet

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no room on the disk, or for this user or file


def train_command(context: CommandContext, arguments: Sequence[str]) -> int:
    """``genalign train``."""
    request = requested(arguments)
    settings, plain = config.parse(config.Train, request.arguments, "train")
    resume_hint = f"Resume with: genalign train --resume {settings.output}"
    try:
        with process_group(os.environ) as processes:
            return run_training(context, settings, plain, request.resume, processes)
    except ProcessGroupError as error:
        print(f"error: Training stopped: {error}. {resume_hint}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        print(f"error: Training stopped: {error}. Free some disk space. {resume_hint}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if isinstance(error, config.REFUSED) or not is_out_of_memory(error):
            raise
        message = str(error).splitlines()[0]
    # outside the handler, whose traceback holds the memory
    print(f"error: out of memory: {message}\n{advice(context, settings)}", file=sys.stderr)
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
        plain: The same as plain JSON.
        resume: Continue the run in ``settings.output``, if there is one.
        processes: The ranks of the run.

    Returns:
        The exit status: 130 after Ctrl-C, else 0.
    """
    # Refuse what would fail later, before anything is loaded
    prompts, sharding = prompt_set(settings.prompts), _sharding(settings, processes)
    _require_usable(settings, processes)
    folder = RunFolder(Path(settings.output), processes)
    checkpoints = Checkpoints(folder.path / "checkpoints", settings.checkpoint.keep, processes)
    checkpoint = checkpoint_in(folder, checkpoints, plain) if resume else None
    if checkpoint is None:
        folder.require_unused()
    processes.barrier()  # every rank has looked before one writes

    # Load the model and the rewards, and try them on two samples
    pipeline, rewards = context.load(settings.model), named_rewards(settings.rewards)
    require_rate(settings, pipeline.sample_rate)
    samples = _generate(pipeline, prompts.prompts[:2], [0] * len(prompts.prompts[:2]), settings.sampling, 2)
    probe(rewards, samples, prompts.prompts[:2])

    # Assemble the run
    policy = _policy(settings, pipeline, processes, sharding)
    score_log, tracker_run = ScoreLog(), TrackerRun()
    trainer = _trainer(settings, pipeline, policy, score_log.logged(rewards), prompts)
    guard = _guard(settings, pipeline, policy)
    parts: dict[str, Stateful] = {
        "inputs": InputFingerprint(pipeline.fingerprint, suite_hash(prompts)),
        "trainer": trainer,
        "texts": EncoderCache(pipeline),
        "tracker": tracker_run,
        **({"guard": guard} if guard else {}),
        "generators": PerRankState(Generators(), processes),
    }
    writer = CheckpointWriter(checkpoints, parts, score_log, settings.checkpoint.every)
    before_after = _before_after(context, settings, pipeline, rewards, processes)

    # Begin: measure the untrained model; or resume from the checkpoint
    before: Evaluation | None = None
    if checkpoint is None:
        if guard:
            guard.begin()
        folder.begin(plain)
        before = before_after.take(pipeline, folder.path / "before") if before_after else None
        writer.begin()
    else:
        writer.resume(checkpoint)
        folder.resume(plain, checkpoint.rounds)
        before = load_evaluation(folder.path / "before") if before_after else None

    monitors = RoundMonitors(
        _held_out(context, settings, pipeline, policy),
        settings.held_out.every,
        guard,
        _sample_grid(settings, pipeline, policy, prompts),
    )
    loggers = trackers(settings.trackers, folder.path, tracker_run.id)
    if not train(trainer, folder, pipeline, writer, monitors, loggers):
        if processes.is_main:
            print(
                f"Training stopped at round {trainer.rounds_done}: interrupted."
                f" Resume with: genalign train --resume {folder.path}"
            )
        return 130

    # Evaluate the trained model, and write the report
    if before_after and before:
        with policy.averaged():
            after = before_after.take(pipeline, folder.path / "after")
        if processes.is_main:
            gains = {name: estimate.as_dict() for name, estimate in gain(before, after).items()}
            write_json(folder.path / "gain.json", gains)
            print_table(before, after)
    if processes.is_main:
        print(f"report: {write_report(folder.path)}")
    return 0


def _require_usable(settings: config.Train, processes: ProcessGroup) -> None:
    """Raise ValueError, or FileNotFoundError, for batches, trackers or prompts that would fail only later."""
    settings.training.require_shares(processes.world_size)
    require_trackers(settings.trackers)
    for watched in settings.watched():
        prompt_set(watched.prompts)


def _sharding(settings: config.Train, processes: ProcessGroup) -> Sharding | None:
    """The launcher's FSDP settings. Raises ValueError if the training settings do not work with them."""
    sharding = sharding_from_environment(os.environ, processes.world_size)
    conflicts = {
        "lora null: train an adapter": settings.lora is None,
        "training.optimizer adamw8bit: choose adamw": settings.training.optimizer != "adamw",
        "training.on_out_of_memory halve: ranks would diverge": settings.training.on_out_of_memory == "halve",
    }
    if sharding and any(conflicts.values()):
        names = "; ".join(name for name, conflict in conflicts.items() if conflict)
        raise ValueError(f"a network that FSDP divides cannot be trained with {names}")
    return sharding


def _policy(settings: config.Train, pipeline: Checkpoint, processes: ProcessGroup, sharding: Sharding | None) -> Policy:
    """The trainable weights, with the adapter ``init_lora`` if there is one."""
    if settings.init_lora is not None:
        pipeline.load_lora(settings.init_lora)
    has_adapter, seed = settings.init_lora is not None, settings.training.seed
    return Policy(pipeline.denoiser, settings.lora, settings.ema_decay, seed, has_adapter, processes, sharding)


def _trainer(
    settings: config.Train, pipeline: Checkpoint, policy: Policy, rewards: Sequence[NamedReward], prompts: PromptSet
) -> Trainer:
    """The training loop. Raises ValueError if ``raise_kl`` is set for a recipe without a KL."""
    suspects, rank = Path(settings.output) / "suspects", policy.processes.rank
    trainer = Trainer(
        pipeline,
        policy,
        rewards,
        prompts,
        settings.recipe,
        settings.training,
        settings.sampling,
        suspects / f"process-{rank}" if rank else suspects,
    )
    if settings.reward_hacking.on_red.raise_kl is not None:
        with_stronger_kl(settings.recipe.objective, settings.reward_hacking.on_red.raise_kl)
    return trainer


def _generate(
    pipeline: Checkpoint,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    sampling: Sampling,
    batch_size: int,
) -> Tensor:
    """Generate one sample per prompt and seed, without noise after the first level."""
    texts = [prompt.text for prompt in prompts]
    grid = sampling.grid(pipeline)
    return torch.cat(list(generate(pipeline, texts, seeds, grid, sampling.guidance, batch_size)))


def _before_after(
    context: CommandContext,
    settings: config.Train,
    pipeline: Checkpoint,
    rewards: Sequence[NamedReward],
    processes: ProcessGroup,
) -> Exam | None:
    """The evaluation before and after training, if there is one."""
    amount = settings.before_after
    if amount is None:
        return None
    scorers = context.judges(amount.prompts, {reward.name: reward for reward in rewards})
    sampling = settings.evaluation or settings.sampling
    return exam(pipeline, settings.model, sampling, amount, amount.prompts, scorers, processes)


def _held_out(
    context: CommandContext, settings: config.Train, pipeline: Checkpoint, policy: Policy
) -> Callable[[], dict[str, Estimate]] | None:
    """The evaluation of held-out prompts during training, if there is one."""
    held_out = settings.held_out
    if not held_out.every:
        return None
    sampling = settings.evaluation or settings.sampling
    scorers = context.judges(held_out.prompts, held_out.scorers)
    held_out_exam = exam(pipeline, settings.model, sampling, held_out, held_out.prompts, scorers, policy.processes)

    def evaluate() -> dict[str, Estimate]:
        with policy.averaged():
            return held_out_exam.take(pipeline).overall

    return evaluate


def _guard(settings: config.Train, pipeline: Checkpoint, policy: Policy) -> HackingGuard | None:
    """The monitor of reward hacking, if there is one."""
    hacking = settings.reward_hacking
    if not hacking.every:
        return None
    sampling = settings.evaluation or settings.sampling
    jobs = plan(prompt_set(hacking.prompts), hacking.samples_per_task, hacking.seeds)
    prompts, seeds = [job.prompt for job in jobs], [job.seed for job in jobs]
    measures = PanelMeasures(hacking.rewards, hacking.features, hacking.diagnostics)

    def snapshot() -> PanelSnapshot:
        """Measured on the main rank, since a reward may return something else on others."""
        tensors: dict[str, Tensor] = {}
        if policy.processes.is_main or policy.sharded:
            with policy.averaged():
                samples = _generate(pipeline, prompts, seeds, sampling, hacking.batch_size)
            tensors = measures(samples, prompts).tensors() if policy.processes.is_main else {}
        return PanelSnapshot.from_tensors(policy.processes.broadcast(tensors))

    return HackingGuard(snapshot, tuple(hacking.rewards), hacking.limits, hacking.on_red, hacking.every)


def _sample_grid(
    settings: config.Train, pipeline: Checkpoint, policy: Policy, prompts: PromptSet
) -> SampleGridWriter | None:
    """The writer of samples of evenly spaced training prompts, if there is one."""
    every, count = settings.sample_grid.every, min(settings.sample_grid.count, len(prompts))
    if not every:
        return None
    selection = [prompts.prompts[number * len(prompts) // count] for number in range(count)]
    sampling = settings.evaluation or settings.sampling

    def sample() -> Tensor | None:
        if not (policy.processes.is_main or policy.sharded):
            return None
        with policy.averaged(), pipeline.separate_encoding():
            samples = _generate(pipeline, selection, range(count), sampling, settings.training.batch_size)
        return samples if policy.processes.is_main else None

    return SampleGridWriter(sample, pipeline.sample_rate, every)


def require_trackers(names: Sequence[str]) -> None:
    """Raise ValueError for a tracker that is not installed: accelerate would ignore it."""
    for name in names:
        if find_spec(name) is None:
            raise ValueError(f"trackers names {name}, which is not installed: pip install {name}")


def trackers(names: Sequence[str], folder: Path, run: str) -> list[Any]:
    """Experiment trackers, through accelerate; on servers, a resumed run continues the one with the id ``run``."""
    if not names:
        return []
    from accelerate import Accelerator

    accelerator = Accelerator(log_with=list(names), project_dir=str(folder))
    by_id, by_name = {"id": run, "resume": "allow"}, {"name": run, "resume": "allow"}
    options = {"wandb": by_id, "swanlab": by_id, "trackio": by_name}
    accelerator.init_trackers("genalign", init_kwargs={name: options[name] for name in names if name in options})
    return list(accelerator.trackers)


def print_table(before: Evaluation, after: Evaluation) -> None:
    """Before, after and gain with intervals: of the first score by task, of every score overall."""
    from rich.console import Console
    from rich.table import Table

    first = before.score_names[0]
    table = Table("task", "before", "after", "gain (95% interval)", title=f"{before.protocol.suite}: {first}")

    def add(name: str, old: Estimate, new: Estimate, difference: Estimate) -> None:
        interval = f"{difference.mean:+.3f} ({difference.low:+.3f} to {difference.high:+.3f})"
        table.add_row(name, f"{old.mean:.3f}", f"{new.mean:.3f}", interval)

    for task, gains in task_gains(before, after).items():
        add(task, before.tasks[task][first], after.tasks[task][first], gains[first])
    for score, difference in gain(before, after).items():
        label = "overall" if score == first else f"overall: {score}"
        add(label, before.overall[score], after.overall[score], difference)
    Console().print(table)


_DEMOS = {"shapes": "demo.yaml", "tones": "demo-tones.yaml"}


def demo_command(context: CommandContext, arguments: Sequence[str]) -> int:
    """``genalign demo [shapes | tones]``: training of an embedded model, with the shipped configuration."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    world, rest = (arguments[0], arguments[1:]) if arguments and arguments[0] in _DEMOS else ("shapes", arguments)
    if rest and not rest[0].startswith("-"):
        raise ValueError(f"there is no demo of {rest[0]!r}: choose from {', '.join(_DEMOS)}")
    shipped = str(files("genalign.assets").joinpath(_DEMOS[world]))
    return train_command(context, ["--config", shipped, *rest])
