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
from genalign.cli.context import Checkpoint, Outside, named_rewards, prompt_set, require_rate
from genalign.cli.evaluate import Exam, exam
from genalign.cli.memory import advice
from genalign.cli.resume import EncoderCache, InputFingerprint, TrackerRun, checkpoint_in, requested
from genalign.diffusion.policy import Policy
from genalign.diffusion.rollout import generate
from genalign.evaluation.evaluate import Evaluation, load_evaluation, plan, suite_hash
from genalign.evaluation.paired import gain, task_gains
from genalign.evaluation.report import write_report
from genalign.metrics.intervals import Estimate
from genalign.runtime.distributed import SINGLE_PROCESS, ProcessGroup, ProcessGroupError, process_group
from genalign.runtime.files import write_json
from genalign.runtime.fsdp import Sharding, sharding_from_environment
from genalign.runtime.state import Generators, PerRankState, Stateful
from genalign.scoring.score import NamedReward, probe
from genalign.scoring.score_log import Journal
from genalign.training.checkpointing import Checkpoints, CheckpointWriter, RunCheckpoint
from genalign.training.nonfinite import is_out_of_memory
from genalign.training.reward_hacking import Guard, Measures, PanelSnapshot
from genalign.training.run import RunFolder, train
from genalign.training.trainer import Trainer
from genalign.types import PromptSet

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no room on the disk, or for this user or file


def train_command(outside: Outside, arguments: Sequence[str]) -> int:
    """``genalign train``."""
    asked = requested(arguments)
    settings, plain = config.parse(config.Train, asked.arguments, "train")
    try:
        with process_group(os.environ) as processes:
            return run_training(outside, settings, plain, asked.resume, processes)
    except ProcessGroupError as error:
        print(f"error: {error}. All that was finished can be gone on from by --resume", file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno not in _FULL:
            raise
        told = f"make room, then genalign train --resume {settings.output}"
        print(f"error: {error}. The last checkpoint is whole: {told}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if isinstance(error, config.REFUSED) or not is_out_of_memory(error):
            raise
        found = str(error).splitlines()[0]
    print(f"error: out of memory: {found}\n{advice(outside, settings)}", file=sys.stderr)
    return 1


def run_training(
    outside: Outside,
    settings: config.Train,
    plain: Mapping[str, Any],
    resume: bool = False,
    processes: ProcessGroup = SINGLE_PROCESS,
) -> int:
    """Evaluate, train, evaluate again, and write the report; with ``resume`` from where the run in ``output`` is."""
    prompts, sharding = prompt_set(settings.prompts), _sharding(settings, processes)
    _require(settings, processes)
    folder = RunFolder(Path(settings.output), processes)
    checkpoints = Checkpoints(folder.path / "checkpoints", settings.checkpoint.keep, processes)
    checkpoint = _checkpoint(folder, checkpoints, plain, resume)
    pipeline, rewards = outside.load(settings.model), named_rewards(settings.rewards)
    _probe(settings, pipeline, rewards, prompts)
    journal, tracked = Journal(), TrackerRun()
    policy = _policy(settings, pipeline, processes, sharding)
    trainer = _trainer(settings, pipeline, policy, journal.kept(rewards), prompts)
    guard = _guard(settings, pipeline, policy)
    inputs = InputFingerprint(pipeline.fingerprint, suite_hash(prompts))
    parts = _parts(trainer, guard, inputs, EncoderCache(pipeline), tracked)
    keeper = CheckpointWriter(checkpoints, parts, journal, settings.checkpoint.every)
    tested = _before_after(outside, settings, pipeline, rewards, processes)
    if checkpoint is None:
        before = _begin(folder, plain, pipeline, guard, tested)
        keeper.begin()
    else:
        keeper.resume(checkpoint)
        folder.resume(plain, checkpoint.rounds)
        before = load_evaluation(folder.path / "before") if tested else None
    watch = _watcher(outside, settings, pipeline, policy)
    loggers = trackers(settings.trackers, folder.path, tracked.id)
    if not train(trainer, folder, pipeline, keeper, watch, settings.held_out.every, loggers, guard):
        if processes.is_main:
            told = f"interrupted: everything so far is in {folder.path}"
            print(f"{told}; go on by genalign train --resume {folder.path}")
        return 130
    _conclude(folder, pipeline, policy, tested, before)
    return 0


def _checkpoint(
    folder: RunFolder, checkpoints: Checkpoints, plain: Mapping[str, Any], resume: bool
) -> RunCheckpoint | None:
    """Where to go on; None for a run that begins. Raises FileExistsError for one that has begun and is not resumed."""
    found = checkpoint_in(folder, checkpoints, plain) if resume else None
    if found is None:
        folder.require_unused()
    folder.processes.barrier()  # until all have looked, before one writes
    return found


def _require(settings: config.Train, processes: ProcessGroup) -> None:
    """Raise ValueError, or FileNotFoundError, for what would fail later."""
    settings.training.require_shares(processes.world_size)
    require_trackers(settings.trackers)
    for watched in settings.watched():
        prompt_set(watched.prompts)


def _sharding(settings: config.Train, processes: ProcessGroup) -> Sharding | None:
    """What the launcher asked for. Raises ValueError where it cannot be had with these settings."""
    sharding = sharding_from_environment(os.environ, processes.world_size)
    refused = {
        "lora null: train an adapter": settings.lora is None,
        "training.optimizer adamw8bit: choose adamw": settings.training.optimizer != "adamw",
        "training.on_out_of_memory halve: processes would part ways": settings.training.on_out_of_memory == "halve",
    }
    if sharding and any(refused.values()):
        found = "; ".join(name for name, wrong in refused.items() if wrong)
        raise ValueError(f"a network that FSDP divides cannot be trained with {found}")
    return sharding


def _conclude(
    folder: RunFolder, pipeline: Checkpoint, policy: Policy, tested: Exam | None, before: Evaluation | None
) -> None:
    """Evaluate what was trained, and write the report."""
    if tested and before:
        with policy.averaged():
            after = tested.take(pipeline, folder.path / "after")
        if folder.processes.is_main:
            _write_gain(before, after, folder.path)
    if folder.processes.is_main:
        print(f"report: {write_report(folder.path)}")


def _begin(
    folder: RunFolder, plain: Mapping[str, Any], pipeline: Checkpoint, guard: Guard | None, tested: Exam | None
) -> Evaluation | None:
    """Everything that is read of the untrained model."""
    if guard:
        guard.begin()
    folder.begin(plain)
    return tested.take(pipeline, folder.path / "before") if tested else None


def _parts(
    trainer: Trainer, guard: Guard | None, inputs: InputFingerprint, texts: EncoderCache, tracked: TrackerRun
) -> dict[str, Stateful]:
    """All that a run goes on from, by name."""
    parts: dict[str, Stateful] = {"inputs": inputs, "trainer": trainer, "texts": texts, "tracker": tracked}
    return parts | ({"guard": guard} if guard else {}) | {"generators": PerRankState(Generators(), trainer.processes)}


def _trainer(
    settings: config.Train, pipeline: Checkpoint, policy: Policy, rewards: Sequence[NamedReward], prompts: PromptSet
) -> Trainer:
    """The loop. Raises ValueError where the guard could not do with it what it is told to."""
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


def _policy(settings: config.Train, pipeline: Checkpoint, processes: ProcessGroup, sharding: Sharding | None) -> Policy:
    """What is trained, starting from a published adapter where one is named."""
    if settings.init_lora is not None:
        pipeline.load_lora(settings.init_lora)
    has_adapter, seed = settings.init_lora is not None, settings.training.seed
    return Policy(pipeline.denoiser, settings.lora, settings.ema_decay, seed, has_adapter, processes, sharding)


def require_trackers(names: Sequence[str]) -> None:
    """Raise ValueError for one that is not installed: accelerate would leave it out."""
    for name in names:
        if find_spec(name) is None:
            raise ValueError(f"trackers names {name}, which is not installed: pip install {name}")


def trackers(names: Sequence[str], folder: Path, run: str) -> list[Any]:
    """Experiment trackers, through accelerate; those on servers know a resumed run by the id ``run``."""
    if not names:
        return []
    from accelerate import Accelerator

    accelerator = Accelerator(log_with=list(names), project_dir=str(folder))
    known = {"id": run, "resume": "allow"}
    asked = {"wandb": known, "swanlab": known, "trackio": {"name": run, "resume": "allow"}}
    accelerator.init_trackers("genalign", init_kwargs={name: asked[name] for name in names if name in asked})
    return list(accelerator.trackers)


def _probe(settings: config.Train, pipeline: Checkpoint, rewards: Sequence[NamedReward], prompts: PromptSet) -> None:
    """Two samples of the untrained model through every reward, before anything is written."""
    require_rate(settings, pipeline.sample_rate)
    chosen = prompts.prompts[:2]
    texts, sampling = [prompt.text for prompt in chosen], settings.sampling
    images = next(generate(pipeline, texts, [0] * len(texts), sampling.grid(pipeline), sampling.guidance, len(texts)))
    probe(rewards, images, chosen)


def _before_after(
    outside: Outside,
    settings: config.Train,
    pipeline: Checkpoint,
    rewards: Sequence[NamedReward],
    processes: ProcessGroup,
) -> Exam | None:
    chosen = settings.before_after
    if chosen is None:
        return None
    scorers = outside.judges(chosen.prompts, {reward.name: reward for reward in rewards})
    sampling = settings.evaluation or settings.sampling
    return exam(pipeline, settings.model, sampling, chosen, chosen.prompts, scorers, processes)


def _watcher(
    outside: Outside, settings: config.Train, pipeline: Checkpoint, policy: Policy
) -> Callable[[], dict[str, Estimate]] | None:
    chosen = settings.held_out
    if not chosen.every:
        return None
    sampling = settings.evaluation or settings.sampling
    scorers = outside.judges(chosen.prompts, chosen.scorers)
    watched = exam(pipeline, settings.model, sampling, chosen, chosen.prompts, scorers, policy.processes)

    def watch() -> dict[str, Estimate]:
        with policy.averaged():
            return watched.take(pipeline).overall

    return watch


def _guard(settings: config.Train, pipeline: Checkpoint, policy: Policy) -> Guard | None:
    chosen = settings.reward_hacking
    if not chosen.every:
        return None
    sampling = settings.evaluation or settings.sampling
    grid = sampling.grid(pipeline)
    jobs = plan(prompt_set(chosen.prompts), chosen.samples_per_task, chosen.seeds)
    prompts, seeds = [job.prompt for job in jobs], [job.seed for job in jobs]
    texts = [prompt.text for prompt in prompts]
    measures = Measures(chosen.rewards, chosen.features, chosen.shown)

    def look() -> PanelSnapshot:
        """Of the first process: a reward need not say the same in all."""
        found: dict[str, Tensor] = {}
        if policy.processes.is_main or policy.sharded:
            with policy.averaged():
                made = list(generate(pipeline, texts, seeds, grid, sampling.guidance, chosen.batch_size))
            found = measures(torch.cat(made), prompts).tensors() if policy.processes.is_main else {}
        return PanelSnapshot.from_tensors(policy.processes.broadcast(found))

    return Guard(look, tuple(chosen.rewards), chosen.limits, chosen.on_red, chosen.every)


def _write_gain(before: Evaluation, after: Evaluation, folder: Path) -> None:
    gains = gain(before, after)
    write_json(folder / "gain.json", {name: estimate.as_dict() for name, estimate in gains.items()})
    print_table(before, after)


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


def demo_command(outside: Outside, arguments: Sequence[str]) -> int:
    """``genalign demo [shapes | tones]``: training of an embedded model, with the shipped configuration."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    world, rest = (arguments[0], arguments[1:]) if arguments and arguments[0] in _DEMOS else ("shapes", arguments)
    if rest and not rest[0].startswith("-"):
        raise ValueError(f"there is no demo of {rest[0]!r}: choose from {', '.join(_DEMOS)}")
    shipped = str(files("genalign.assets").joinpath(_DEMOS[world]))
    return train_command(outside, ["--config", shipped, *rest])
