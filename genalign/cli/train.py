"""``genalign train``: runs a configuration to the end, or resumes from a checkpoint."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from genalign.algorithms.interfaces import half_micro_batch
from genalign.cli import parsing
from genalign.cli.checks import training_checks
from genalign.cli.context import CommandContext
from genalign.cli.family_defaults import with_family_defaults
from genalign.cli.resume import (
    TrackerRun,
    checkpoint_in,
    flat,
    rounds_of,
    train_request,
)
from genalign.cli.run_prompts import RunPrompts
from genalign.cli.train_settings import Train
from genalign.cli.training_run import TrainingRun
from genalign.evaluation.report import write_report
from genalign.runtime.distributed import (
    SINGLE_PROCESS,
    ProcessGroup,
    ProcessGroupError,
    RankShare,
    process_group,
    require_shared,
)
from genalign.runtime.files import write_json
from genalign.runtime.fsdp import Sharding, sharding_from_environment
from genalign.runtime.progress import SILENT, Progress
from genalign.scoring.score import group_reward
from genalign.training.checkpointing import Checkpoints, CheckpointWriter
from genalign.training.out_of_memory import is_out_of_memory
from genalign.training.run import Terminated, WeightFiles, terminable, train
from genalign.training.run_folder import RunFolder, adapter_writer


def train_command(context: CommandContext, arguments: Sequence[str]) -> int:
    """Run ``genalign train``, and print how to resume a run that ends early or fails."""
    arguments, resume = train_request(arguments)
    progress, output = Progress(RankShare.from_environment(os.environ).rank == 0), ""
    try:
        with terminable(), progress.phase("reading the configuration and loading rewards"):
            checks = list(training_checks(context, resume))
            settings, plain = parsing.parse(Train, arguments, "train", checks=checks)
            parsing.require(checks, settings)
        output = settings.output
        with process_group(os.environ) as processes, terminable():
            return run_training(context, settings, plain, resume, processes, progress)
    except KeyboardInterrupt as error:
        signaled = signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT
        return ended_by_signal(signaled, output) if RankShare.from_environment(os.environ).rank == 0 else 128 + signaled
    except ProcessGroupError as error:
        reason = str(error)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        reason = f"{error}. Free some disk space"
    except RuntimeError as error:
        if isinstance(error, parsing.INPUT_ERRORS) or not is_out_of_memory(error):
            raise
        reason = f"{str(error).splitlines()[0].rstrip('.')}. Less memory is needed with {_less_memory(settings)}"
    print(f"error: Training stopped: {reason}. Resume with: genalign train --resume {output}", file=sys.stderr)
    return 1


def ended_by_signal(number: int, output: str, rounds: int | None = None) -> int:
    """Print how to resume a run that a signal ended, and return the exit status: 130 for Ctrl-C, 143 for SIGTERM.

    Args:
        number: The signal.
        output: The folder of the run; empty before it is known.
        rounds: The number of rounds so far; None unless a round has just ended.
    """
    reason = "interrupted" if number == signal.SIGINT else "SIGTERM"
    where = "" if rounds is None else f" at round {rounds}"
    resume = f"Resume with: genalign train --resume {output}"
    if not output or not (Path(output) / "config.json").is_file():
        resume = "Nothing was written: run the same command again"
    print(f"Training stopped{where}: {reason}. {resume}")
    return 128 + number


def _less_memory(settings: Train) -> str:
    """Name arguments with which the same training needs less memory."""
    training, memory = settings.training, settings.model.memory
    options = [] if memory.checkpointing else ["--model.memory.checkpointing true"]
    options += [] if memory.offload == "all" else ["--model.memory.offload all"]
    options += ["--training.on_out_of_memory halve"]
    unit, grouped = settings.recipe.objective.unit, group_reward(settings.rewards)
    fitted = training.fit(RunPrompts.read(settings).training, unit, group_reward=grouped)
    whole_groups = grouped is not None and unit == "sample"
    if smaller := half_micro_batch(fitted.batch_size, "group" if whole_groups else unit, fitted.group_size):
        options += [f"(in a new run) --training.batch_size {smaller}"]
    return " or ".join(options)


def run_training(
    context: CommandContext,
    settings: Train,
    plain: Mapping[str, Any],
    resume: bool = False,
    processes: ProcessGroup = SINGLE_PROCESS,
    progress: Progress = SILENT,
) -> int:
    """Evaluate, train, evaluate again, and write the report.

    Args:
        context: The pipelines and rewards.
        settings: The configuration.
        plain: The configuration as plain JSON.
        resume: Continue the run in ``settings.output``, if there is one.
        processes: The ranks of the run.
        progress: Shows the phases of the run.

    Returns:
        The exit status: 130 after Ctrl-C, 143 after SIGTERM, else 0.
    """
    # Find errors before anything is loaded
    prompts, sharding = RunPrompts.read(settings), _sharding(settings, processes)
    if processes.is_main:
        prompts.warn()
    unit, grouped = settings.recipe.objective.unit, group_reward(settings.rewards)
    fitted = settings.training.fit(prompts.training, unit, processes, group_reward=grouped)
    plain = {**plain, "training": plain["training"] | fitted.sizes}
    folder = RunFolder(Path(settings.output), processes)
    checkpoints = Checkpoints(folder.path / "checkpoints", settings.checkpoint.keep, processes)
    checkpoint = checkpoint_in(folder, checkpoints, plain) if resume else None
    if checkpoint is None:
        folder.require_unused()
    rounds = rounds_of(settings, folder.config() if checkpoint else None, fitted.rounds)
    plain["training"]["rounds"] = rounds
    settings = replace(settings, training=replace(settings.training, rounds=rounds))
    processes.barrier()  # no rank writes before every rank has checked
    require_shared(folder.path, processes)

    # Assemble the run, then measure the untrained model or restore the checkpoint
    with progress.phase(f"loading {settings.model.path}"):
        run = TrainingRun(context, settings, prompts, folder, sharding, progress)
    samplings = {"sampling": settings.sampling, "evaluation": settings.evaluation}
    plain = with_family_defaults(plain, run.pipeline, samplings)
    tracker_run, adapter = TrackerRun(), partial(adapter_writer, run.policy, run.pipeline)
    parts = run.stateful_parts(prompts) | {"tracker": tracker_run}
    writer = CheckpointWriter(checkpoints, parts, run.score_log, settings.checkpoint.every, adapter)
    if checkpoint is None:
        if run.guard:
            run.guard.begin()
        folder.begin(plain)
        run.evaluate_before()
        writer.begin()
    else:
        writer.resume(checkpoint)
        folder.resume(plain, checkpoint.rounds)
    if processes.is_main:
        write_json(folder.path / "prompts.json", prompts.as_dict())

    # Train; Ctrl-C and SIGTERM end the run after a round
    loggers = trackers(settings.trackers, folder.path, tracker_run.id, plain)
    weights, limit = WeightFiles(folder, run.pipeline, run.best), settings.max_seconds
    fitter = run.round_fitter() if rounds is None else None
    if number := train(run.trainer, weights, writer, run.monitors(), loggers, progress, limit, fitter):
        return ended_by_signal(number, settings.output, run.trainer.rounds_done) if processes.is_main else 128 + number

    # Evaluate the trained model, and write the report
    run.evaluate_after()
    folder.finish()
    if processes.is_main:
        print(f"report: {write_report(folder.path)}")
        print(weights.describe(run.trainer.rounds_done))
    return 0


def _sharding(settings: Train, processes: ProcessGroup) -> Sharding | None:
    """Read the launcher's FSDP settings. Raises ValueError if the training settings do not work with them."""
    sharding = sharding_from_environment(os.environ, processes.world_size)
    conflicts = {
        "training.optimizer adamw8bit: choose adamw": settings.training.optimizer != "adamw",
        "model.compile: leave it out": settings.model.compile,
        "model.memory.quantization: leave it out": settings.model.memory.quantization is not None,
        "training.on_out_of_memory halve: ranks would diverge": settings.training.on_out_of_memory == "halve",
    }
    if sharding and (names := [name for name, conflict in conflicts.items() if conflict]):
        raise ValueError(f"FSDP cannot train a sharded network with {'; '.join(names)}")
    replicas = processes.all_gather_object(sharding.replicas if sharding else 0)
    if len(set(replicas)) > 1:
        raise ValueError(
            "the nodes have different numbers of processes, so they cannot each shard a copy of the network: start"
            " equally many on every node, or set accelerate's parallelism_config"
        )
    return sharding


def trackers(names: Sequence[str], folder: Path, run: str, plain: Mapping[str, Any]) -> list[Any]:
    """Open experiment trackers through accelerate, with the configuration of the run.

    Args:
        names: The trackers.
        folder: The folder of the run.
        run: Its id on a server, under which a resumed run continues.
        plain: The configuration as plain JSON.
    """
    if not names:
        return []
    from accelerate import Accelerator

    accelerator = Accelerator(log_with=list(names), project_dir=str(folder))
    by_id, by_name = {"id": run, "resume": "allow"}, {"name": run, "resume": "allow"}
    options = {"wandb": by_id, "swanlab": by_id, "trackio": by_name}
    own = {name: options[name] for name in names if name in options}
    scalars = {  # TensorBoard takes no other
        name: value if isinstance(value, str | int | float) else json.dumps(value) for name, value in flat(plain)
    }
    accelerator.init_trackers("genalign", scalars, own)
    return list(accelerator.trackers)
