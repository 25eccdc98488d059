"""A run on disk: its folder, its rounds with everything that is logged between them, and a clean end on Ctrl-C."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import platform
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
import torch
from peft import LoraConfig
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from genalign.diffusion.lora import save_peft
from genalign.diffusion.policy import Policy
from genalign.metrics.intervals import Estimate
from genalign.runtime.distributed import SINGLE_PROCESS, ProcessGroup
from genalign.runtime.files import disk_errors, write_json, write_text
from genalign.scoring.budget import peak_memory
from genalign.scoring.score import RewardError
from genalign.training.checkpointing import CheckpointWriter
from genalign.training.nonfinite import DivergedError
from genalign.training.reward_hacking import HackingGuard, HackingReport, due
from genalign.training.sample_grid import SampleGridWriter
from genalign.training.trainer import RoundResult, Trainer

logger = logging.getLogger(__name__)
RUN_FORMAT = 2
"""Of a run's folder: 2 since genalign 0.2.0; folders of genalign 0.1.0 have none in environment.json."""

_LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate", "genalign")


class WeightStore(Protocol):
    """A pipeline that can write the trained adapter, or the whole network, in its family's own format."""

    def save_lora(self, directory: Path, state: Mapping[str, Tensor], config: LoraConfig) -> None: ...

    def save_denoiser(self, directory: Path) -> None: ...


class Tracker(Protocol):
    """An experiment tracker of accelerate."""

    name: str

    def log(self, values: Mapping[str, Any], step: int | None = None) -> None: ...


@runtime_checkable
class ImageTracker(Tracker, Protocol):
    """An experiment tracker that takes images (N, H, W, 3) in 8 bits."""

    def log_images(self, values: Mapping[str, Any], step: int | None = None, **options: Any) -> None: ...


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run: its configuration, environment, metrics and weights. The main rank writes it."""

    path: Path
    processes: ProcessGroup = SINGLE_PROCESS

    def require_unused(self) -> None:
        """Raise FileExistsError if the path holds a run, or is a file."""
        if (self.path / "metrics.jsonl").exists():
            raise FileExistsError(
                f"{self.path} holds a run already: resume it (genalign train --resume {self.path}), choose another"
                " output, or remove it"
            )
        if self.path.is_file():
            raise FileExistsError(f"{self.path} is a file: output must be a folder")

    def require_format(self) -> None:
        """Raise ValueError for a run of genalign 0.1.0, whose settings, records and import paths have other names."""
        path = self.path / "environment.json"
        environment = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if "genalign" in environment and "run_format" not in environment:
            raise ValueError(
                f"{self.path} was made by genalign {environment['genalign']}, whose runs this version cannot read: use"
                " the version that made it, or start a new run"
            )

    def begin(self, config: Mapping[str, Any]) -> None:
        """Write config.json and environment.json. Raises FileExistsError for a used folder."""
        self.require_unused()
        if self.processes.is_main:
            write_json(self.path / "config.json", config)
            write_json(self.path / "environment.json", environment(self.processes.world_size))

    def config(self) -> dict[str, Any]:
        """Read config.json."""
        config: dict[str, Any] = json.loads((self.path / "config.json").read_text(encoding="utf-8"))
        return config

    def resume(self, config: Mapping[str, Any], rounds: int) -> None:
        """Return to the state after ``rounds`` rounds, with ``config`` from there on, and warn if the machine differs.

        Raises ValueError if metrics.jsonl has fewer rounds.
        """
        if not self.processes.is_main:
            return
        before = json.loads((self.path / "environment.json").read_text(encoding="utf-8"))
        now = environment(self.processes.world_size)
        changes = [f"{name} was {before.get(name)} and is {now[name]}" for name in now if before.get(name) != now[name]]
        if changes:
            logger.warning("The results may differ from those of an uninterrupted run: %s", ", ".join(changes))
        self.cut_back(rounds)
        write_json(self.path / "config.json", config)

    def append(self, row: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl and flush it to the disk."""
        if not self.processes.is_main:
            return
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def cut_back(self, rounds: int) -> None:
        """Truncate metrics.jsonl to its first ``rounds`` lines. Raises ValueError if it has fewer."""
        path = self.path / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        if len(lines) < rounds:
            raise ValueError(
                f"{path} has {len(lines)} rounds, but the checkpoint was written after {rounds}: restore the file"
            )
        write_text(path, "".join(lines[:rounds]))

    def save(self, policy: Policy, pipeline: WeightStore) -> None:
        """Write the averaged weights: lora/ (diffusers) and peft/, or, if the whole network was trained, denoiser/.

        Under FSDP every rank must call this.
        """
        with disk_errors(), policy.averaged():
            if policy.config is None:
                if self.processes.is_main:
                    pipeline.save_denoiser(self.path / "denoiser")
                return
            state = policy.adapter_state()
            if self.processes.is_main:
                pipeline.save_lora(self.path / "lora", state, policy.config)
                save_peft(self.path / "peft", state, policy.config)


def environment(world_size: int) -> dict[str, Any]:
    """Versions and sizes that a result may depend on; nothing that names the machine."""
    return {
        "run_format": RUN_FORMAT,
        "processes": world_size,
        "python": platform.python_version(),
        "system": platform.system(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    } | {name: version(name) for name in _LIBRARIES}


@contextlib.contextmanager
def stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Yield a function that tells whether Ctrl-C was pressed; a second Ctrl-C interrupts at once."""
    presses: list[int] = []

    def handle(number: int, frame: object) -> None:
        if presses:
            raise KeyboardInterrupt
        presses.append(number)
        logger.warning("Ctrl-C: the run ends after this round and is saved; press Ctrl-C again to stop at once")

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: bool(presses)
    finally:
        signal.signal(signal.SIGINT, previous)


@dataclass(frozen=True)
class RoundMonitors:
    """Observers of the model between rounds; none of them changes the training's randomness or its NFE.

    Args:
        evaluate_held_out: Evaluate the held-out prompts: each score's estimate by name.
        held_out_every: Rounds between two of these evaluations.
        guard: The monitor of reward hacking.
        sample_grid: The writer of sample grids.
    """

    evaluate_held_out: Callable[[], Mapping[str, Estimate]] | None = None
    held_out_every: int = 0
    guard: HackingGuard | None = None
    sample_grid: SampleGridWriter | None = None

    def observe(self, result: RoundResult, rounds: int, last: bool, run: Path) -> RoundObservation:
        """Everything that is due after ``rounds`` rounds of the run in the folder ``run``."""
        held_out = None
        if self.evaluate_held_out is not None and due(rounds, self.held_out_every, last):
            held_out = self.evaluate_held_out()
        report = self.guard.report(rounds, last, result.kl) if self.guard else None
        samples = self.sample_grid.after(rounds, last, run) if self.sample_grid else []
        return RoundObservation(held_out, report, samples)


@dataclass(frozen=True)
class RoundObservation:
    """Held-out estimates, the reward-hacking report and the files of the sample grid after a round, if due."""

    held_out: Mapping[str, Estimate] | None
    report: HackingReport | None
    samples: Sequence[str]

    def as_dict(self) -> dict[str, Any]:
        """The observation's part of the row in metrics.jsonl."""
        return {
            "held_out": {name: estimate.as_dict() for name, estimate in self.held_out.items()}
            if self.held_out
            else None,
            "reward_hacking": self.report.as_list() if self.report else None,
            "sample_grid": list(self.samples) or None,
        }


def train(
    trainer: Trainer,
    folder: RunFolder,
    pipeline: WeightStore,
    checkpoints: CheckpointWriter,
    monitors: RoundMonitors,
    trackers: Sequence[Tracker] = (),
) -> bool:
    """Run the rounds that are left, and write the weights at the end.

    After an error the weights are written too, unless FSDP shards them, which would need every rank.

    Args:
        trainer: The loop.
        folder: The run's folder.
        pipeline: The pipeline whose weights are written.
        checkpoints: The writer of checkpoints to resume from.
        monitors: Observers between rounds.
        trackers: Experiment trackers, from accelerate.

    Returns:
        False if Ctrl-C ended the run early.

    Raises:
        RewardError: A reward failed too often.
        DivergedError: Too many updates in a row were not finite.
    """
    guard, finished = monitors.guard, True
    try:
        with stop_on_interrupt() as interrupted, RoundDisplay(trainer, folder.processes.is_main) as display:
            for result in () if guard and guard.stopped else trainer.rounds():
                rounds = trainer.rounds_done
                last = trainer.settings.progress(rounds, result.nfe) >= 1

                # Observe and log
                seen = monitors.observe(result, rounds, last, folder.path)
                row = result.as_dict() | seen.as_dict()
                folder.append(row)
                for tracker in trackers:
                    tracker.log(flat_numbers(row), step=result.round)
                    log_images(tracker, folder.path, seen.samples, result.round)
                display.show(result, seen)

                # React to reward hacking
                if guard and seen.report:
                    if guard.is_best(seen.report):
                        replace(folder, path=folder.path / "best").save(trainer.policy, pipeline)
                    if seen.report.status == "red":
                        guard.react(trainer)

                # Save, and end early where the guard or Ctrl-C asks for it
                stopped = guard is not None and guard.stopped
                stopping = trainer.processes.any_rank(interrupted()) or stopped
                checkpoints.after(rounds, last or stopping)
                if stopping:
                    finished = stopped
                    break
    except BaseException as error:
        if not trainer.policy.sharded:
            folder.save(trainer.policy, pipeline)
        if isinstance(error, RewardError | DivergedError):
            stop = f"Training stopped at round {trainer.rounds_done + 1}: {error}"
            raise type(error)(f"{stop}. Resume with: genalign train --resume {folder.path}") from error
        raise
    folder.save(trainer.policy, pipeline)
    return finished


def flat_numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """Every number of a row of metrics.jsonl under one name, as in ``rewards/ocr``.

    An estimate is ``held_out/NAME``, its interval ``held_out/NAME/low`` and ``/high``; a signal of the reward-hacking
    report is the shift ``reward_hacking/NAME``.
    """
    shifts = {signal["name"]: signal["shift"] for signal in row.get("reward_hacking") or ()}
    numbers: dict[str, float] = {}

    def add(name: str, value: object) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                is_estimate = {"mean", "low", "high"} <= value.keys()
                add(name if is_estimate and key == "mean" else f"{name}/{key}", inner)
        elif isinstance(value, int | float) and math.isfinite(value):
            numbers[name] = value

    for name, value in (dict(row) | {"reward_hacking": shifts}).items():
        add(name, value)
    return numbers


def log_images(tracker: Tracker, run: Path, names: Sequence[str], step: int) -> None:
    """Send the images among the files ``names`` of the folder ``run`` to a tracker that takes images."""
    paths = [run / name for name in names if name.endswith(".png")]
    if not paths or not isinstance(tracker, ImageTracker):
        return
    images = np.stack([np.asarray(Image.open(path, formats=["PNG"])) for path in paths])  # (N, H, W, 3)
    layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
    tracker.log_images({"samples": images}, step=step, **layout)


class RoundDisplay:
    """A progress bar in a terminal; elsewhere (nohup, SLURM, CI) one log line a round."""

    def __init__(self, trainer: Trainer, is_main: bool) -> None:
        self._settings, self._is_main = trainer.settings, is_main
        self._held_out, self._start = "-", time.monotonic()
        self._start_progress = trainer.settings.progress(trainer.rounds_done, trainer.ledger.nfe)
        console = Console()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("reward {task.fields[reward]:.3f}  held-out {task.fields[held_out]}"),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not (is_main and console.is_terminal),
        )
        self._task = self._bar.add_task(
            "training",
            total=trainer.settings.rounds,
            completed=trainer.rounds_done,
            reward=math.nan,
            held_out="-",
            rate="",
        )

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def show(self, result: RoundResult, seen: RoundObservation) -> None:
        """Show a round."""
        if seen.held_out:
            self._held_out = f"{next(iter(seen.held_out.values())).mean:.3f}"
        rate = format_rate(result.samples / result.seconds)
        self._bar.update(self._task, advance=1, reward=result.reward, held_out=self._held_out, rate=rate)
        if not self._is_main or not self._bar.disable:
            return
        progress = self._settings.progress(result.round + 1, result.nfe)
        elapsed = time.monotonic() - self._start
        left = elapsed * max(0.0, 1 - progress) / (progress - self._start_progress)
        scores = ", ".join(f"{name} {score:.3f}" for name, score in result.rewards.items())
        logger.info(
            "round %d/%d: reward %.3f (%s), held-out %s, KL %.3g, clip fraction %.3f, NFE %d, %s, ETA %s,"
            " memory %.1f GiB",
            result.round + 1,
            self._settings.rounds,
            result.reward,
            scores,
            self._held_out,
            result.kl,
            result.clip_fraction,
            result.nfe,
            rate,
            timedelta(seconds=round(left)),
            peak_memory() / 2**30,
        )


def format_rate(samples_per_second: float) -> str:
    """A rate in samples per second, or, below 1, in seconds per sample."""
    if samples_per_second >= 1:
        return f"{samples_per_second:.1f} samples/s"
    return f"{1 / samples_per_second:.1f} s/sample"
