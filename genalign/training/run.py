"""A run folder: metrics, progress, adapters, evaluations before and after, and a clean end on Ctrl-C."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import platform
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import LoraConfig
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from genalign.diffusion.lora import save_peft
from genalign.diffusion.policy import Policy
from genalign.metrics.intervals import Estimate
from genalign.runtime.distributed import ALONE, Processes
from genalign.runtime.files import disk_errors, write_json, write_text
from genalign.training.checkpointing import Keeper
from genalign.training.reward_hacking import Guard, Panel, due
from genalign.training.trainer import RoundResult, Trainer

logger = logging.getLogger(__name__)
Watcher = Callable[[], Mapping[str, Estimate]]
_LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate", "genalign")


class WeightStore(Protocol):
    """A pipeline that can write what was trained, an adapter or the whole network, in its family's own format."""

    def save_lora(self, directory: Path, state: Mapping[str, Tensor], config: LoraConfig) -> None: ...

    def save_denoiser(self, directory: Path) -> None: ...


class Tracker(Protocol):
    """What accelerate's trackers have in common."""

    def log(self, values: Mapping[str, Any], step: int | None = None) -> None: ...


@dataclass(frozen=True)
class RunFolder:
    """Where everything that a run leaves behind goes. The first of the ``processes`` writes it."""

    path: Path
    processes: Processes = ALONE

    def require_unused(self) -> None:
        """Raise FileExistsError where it holds a run, or is a file."""
        if (self.path / "metrics.jsonl").exists():
            raise FileExistsError(f"{self.path} holds a run already: choose another output, or remove it")
        if self.path.is_file():
            raise FileExistsError(f"{self.path} is a file: output is a folder to make")

    def begin(self, config: Mapping[str, Any]) -> None:
        """Make the folder and write config.json and environment.json. Raises FileExistsError for a used folder."""
        self.require_unused()
        if not self.processes.first:
            return
        write_json(self.path / "config.json", config)
        write_json(self.path / "environment.json", self._environment())

    def config(self) -> dict[str, Any]:
        """What ``begin`` was given."""
        found: dict[str, Any] = json.loads((self.path / "config.json").read_text(encoding="utf-8"))
        return found

    def resume(self, config: Mapping[str, Any], rounds: int) -> None:
        """Go back to where the run had had so many rounds, with ``config`` from there on; what was different about the
        machine is told in a warning. Raises ValueError where metrics.jsonl has fewer."""
        if not self.processes.first:
            return
        before, now = json.loads((self.path / "environment.json").read_text(encoding="utf-8")), self._environment()
        if changed := [name for name, value in now.items() if before.get(name) != value]:
            told = ", ".join(f"{name} was {before.get(name)} and is {now[name]}" for name in changed)
            logger.warning("the rounds to come may differ from those of an unbroken run: %s", told)
        self.cut_back(rounds)
        write_json(self.path / "config.json", config)

    def _environment(self) -> dict[str, Any]:
        return environment() | {"processes": self.processes.processes}

    def append(self, row: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl, on the disk itself."""
        if not self.processes.first:
            return
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def cut_back(self, rounds: int) -> None:
        """Leave the first ``rounds`` lines of metrics.jsonl. Raises ValueError where there are fewer."""
        path = self.path / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        if len(lines) < rounds:
            raise ValueError(f"{path} has {len(lines)} rounds, but the run has had {rounds}: put the others back")
        write_text(path, "".join(lines[:rounds]))

    def save(self, policy: Policy, pipeline: WeightStore) -> None:
        """Write the averaged weights, as lora/ (diffusers) and peft/ or, trained whole, as denoiser/. Where the network
        is divided, all processes take part."""
        with disk_errors(), policy.averaged():
            if policy.config is None:
                if self.processes.first:
                    pipeline.save_denoiser(self.path / "denoiser")
                return
            state = policy.adapter_state()
            if self.processes.first:
                pipeline.save_lora(self.path / "lora", state, policy.config)
                save_peft(self.path / "peft", state, policy.config)


def environment() -> dict[str, Any]:
    """Versions and sizes that a number may depend on; nothing that names the machine."""
    return {
        "python": platform.python_version(),
        "system": platform.system(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    } | {name: version(name) for name in _LIBRARIES}


@contextlib.contextmanager
def stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """A question whether Ctrl-C was pressed; pressed twice, it interrupts at once."""
    pressed: list[int] = []

    def note(number: int, frame: object) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)
        logger.warning("ending after this round and saving; press Ctrl-C again to stop at once")

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, previous)


@dataclass(frozen=True)
class Look:
    """What was seen of the model after a round, if it was looked at."""

    estimates: Mapping[str, Estimate] | None
    panel: Panel | None

    @property
    def held_out(self) -> str:
        """The mean of the first score."""
        return f"{next(iter(self.estimates.values())).mean:.3f}" if self.estimates else ""

    def as_dict(self) -> dict[str, Any]:
        """What metrics.jsonl holds of it."""
        estimates = {name: estimate.as_dict() for name, estimate in (self.estimates or {}).items()}
        return {"held_out": estimates or None, "hacking": self.panel.as_list() if self.panel else None}


def train(
    trainer: Trainer,
    folder: RunFolder,
    pipeline: WeightStore,
    keeper: Keeper,
    watch: Watcher | None,
    every: int,
    trackers: Sequence[Tracker] = (),
    guard: Guard | None = None,
) -> bool:
    """Run the rounds that are left with a progress bar; False where the run was interrupted. The weights are written in
    any case, but for divided ones after an error."""
    held_out = "-"
    total, begun = trainer.settings.rounds, trainer.rounds_done
    with stop_on_interrupt() as stopping, _progress(shown=folder.processes.first) as progress:
        bar = progress.add_task("training", total=total, completed=begun, reward=math.nan, held_out="-", speed=0.0)
        with _saving(trainer, folder, pipeline):
            for result in () if guard and guard.stopped else trainer.rounds():
                done = trainer.rounds_done
                last = trainer.settings.progress(done, result.forwards) >= 1
                panel = guard.panel(done, last, result.kl) if guard else None
                look = Look(_estimates(watch, every, done, last), panel)
                folder.append(result.metrics() | look.as_dict())
                _track(trackers, result, look)
                held_out = look.held_out or held_out
                speed = result.images / result.seconds
                progress.update(bar, advance=1, reward=result.reward, held_out=held_out, speed=speed)
                stopped = _acted(guard, panel, trainer, folder, pipeline)
                ending = trainer.processes.any(stopping()) or stopped
                keeper.after(done, last or ending)
                if ending:
                    return stopped
            return True


def _estimates(watch: Watcher | None, every: int, done: int, last: bool) -> Mapping[str, Estimate] | None:
    return watch() if watch and due(done, every, last) else None


@contextlib.contextmanager
def _saving(trainer: Trainer, folder: RunFolder, pipeline: WeightStore) -> Iterator[None]:
    """Write the weights at the end, and where it comes early; divided ones not then, since that takes all processes."""
    try:
        yield
    except BaseException:
        if not trainer.policy.sharded:
            folder.save(trainer.policy, pipeline)
        raise
    folder.save(trainer.policy, pipeline)


def _acted(
    guard: Guard | None, panel: Panel | None, trainer: Trainer, folder: RunFolder, pipeline: WeightStore
) -> bool:
    """Do what the guard asks for; whether the run is to stop."""
    if guard is None or panel is None:
        return False
    if guard.is_best(panel):
        replace(folder, path=folder.path / "best").save(trainer.policy, pipeline)
    if panel.light != "red":
        return False
    if guard.actions.raise_kl is not None:
        trainer.raise_kl(guard.actions.raise_kl)
    if guard.actions.stop:
        logger.warning("stopping after round %d, as hacking.on_red.stop asks for", trainer.rounds_done)
        guard.stopped = True
    return guard.stopped


def _track(trackers: Sequence[Tracker], result: RoundResult, look: Look) -> None:
    numbers = {name: value for name, value in result.metrics().items() if isinstance(value, int | float)}
    held_out = {f"held_out/{name}": estimate.mean for name, estimate in (look.estimates or {}).items()}
    shifts = {f"hacking/{signal.name}": signal.shift.mean for signal in look.panel.signals} if look.panel else {}
    for tracker in trackers:
        tracker.log(numbers | held_out | shifts, step=result.round)


def _progress(shown: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("reward {task.fields[reward]:.3f}  held-out {task.fields[held_out]}"),
        TextColumn("{task.fields[speed]:.0f} images/s"),
        TimeRemainingColumn(),
        disable=not shown,
    )
