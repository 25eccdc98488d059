"""A run folder: metrics, progress, adapters, evaluations before and after, and a clean end on Ctrl-C."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import LoraConfig
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file
from torch import Tensor

from genalign.checkpoints import optimizer_tensors, save_state, with_prefix, write_json
from genalign.guard import Guard, due
from genalign.hacking import Panel
from genalign.statistics import Estimate
from genalign.training import RoundResult, Trainer

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
    """Where everything that a run leaves behind goes."""

    path: Path

    def require_unused(self) -> None:
        """Raise FileExistsError where it holds a run, or is a file."""
        if (self.path / "metrics.jsonl").exists():
            raise FileExistsError(f"{self.path} holds a run already: choose another output, or remove it")
        if self.path.is_file():
            raise FileExistsError(f"{self.path} is a file: output is a folder to make")

    def begin(self, config: Mapping[str, Any]) -> None:
        """Make the folder and write config.json and environment.json. Raises FileExistsError for a used folder."""
        self.require_unused()
        write_json(self.path / "config.json", config)
        write_json(self.path / "environment.json", environment())

    def append(self, row: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")

    def save(self, trainer: Trainer, pipeline: WeightStore, rounds_done: int) -> None:
        """Write the averaged weights, as lora/ (diffusers) and peft/ or, trained whole, as denoiser/; and everything
        that is needed to go on as checkpoint/."""
        policy = trainer.policy
        with policy.averaged():
            if policy.config is None:
                pipeline.save_denoiser(self.path / "denoiser")
            else:
                state = policy.adapter_state()
                pipeline.save_lora(self.path / "lora", state, policy.config)
                save_peft(self.path / "peft", state, policy.config)
        tensors = policy.tensors() | with_prefix("optimizer.", optimizer_tensors(trainer.optimizer))
        meta = {
            "rounds": rounds_done,
            "updates": policy.updates,
            "images": trainer.images,
            "calls": dict(trainer.ledger.counts),
        }
        save_state(self.path / "checkpoint" / "state.safetensors", tensors, meta)


def save_peft(directory: Path, state: Mapping[str, Tensor], config: LoraConfig) -> None:
    """An adapter folder as PEFT reads it."""
    config.save_pretrained(str(directory))
    named = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in state.items()}
    save_file(named, directory / "adapter_model.safetensors", metadata={"format": "pt"})


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


def train(
    trainer: Trainer,
    folder: RunFolder,
    pipeline: WeightStore,
    watch: Watcher | None,
    every: int,
    trackers: Sequence[Tracker] = (),
    guard: Guard | None = None,
) -> bool:
    """Run all rounds with a progress bar; False where the run was interrupted. The folder is saved in any case."""
    done, held_out = 0, "-"
    total = trainer.settings.rounds
    with stop_on_interrupt() as stopping, _progress() as progress:
        bar = progress.add_task("training", total=total, reward=float("nan"), held_out="-", speed=0.0)
        try:
            for result in trainer.rounds():
                done += 1
                last = trainer.settings.progress(done, result.forwards) >= 1
                estimates = watch() if watch and due(done, every, last) else None
                seen = guard.panel(done, last, result.kl) if guard else None
                looked = {"held_out": _plain(estimates), "hacking": seen.as_list() if seen else None}
                folder.append(result.metrics() | looked)
                _track(trackers, result, estimates, seen)
                held_out = f"{next(iter(estimates.values())).mean:.3f}" if estimates else held_out
                speed = result.images / result.seconds
                progress.update(bar, advance=1, reward=result.reward, held_out=held_out, speed=speed)
                if stopping():
                    return False
                if guard and seen and _acted(guard, seen, trainer, folder, pipeline, done):
                    return True
            return True
        finally:
            folder.save(trainer, pipeline, done)


def _acted(
    guard: Guard, seen: Panel, trainer: Trainer, folder: RunFolder, pipeline: WeightStore, rounds_done: int
) -> bool:
    """Do what the guard asks for; whether the run is to stop."""
    if guard.is_best(seen):
        RunFolder(folder.path / "best").save(trainer, pipeline, rounds_done)
    if seen.light != "red":
        return False
    if guard.actions.raise_kl is not None:
        trainer.raise_kl(guard.actions.raise_kl)
    if guard.actions.stop:
        logger.warning("stopping after round %d, as hacking.on_alarm.stop asks for", rounds_done)
    return guard.actions.stop


def _plain(estimates: Mapping[str, Estimate] | None) -> dict[str, Any] | None:
    return {name: estimate.as_dict() for name, estimate in estimates.items()} if estimates else None


def _track(
    trackers: Sequence[Tracker], result: RoundResult, estimates: Mapping[str, Estimate] | None, seen: Panel | None
) -> None:
    numbers = {name: value for name, value in result.metrics().items() if isinstance(value, int | float)}
    held_out = {f"held_out/{name}": estimate.mean for name, estimate in (estimates or {}).items()}
    shifts = {f"hacking/{signal.name}": signal.shift.mean for signal in seen.signals} if seen else {}
    for tracker in trackers:
        tracker.log(numbers | held_out | shifts, step=result.round)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("reward {task.fields[reward]:.3f}  held-out {task.fields[held_out]}"),
        TextColumn("{task.fields[speed]:.0f} images/s"),
        TimeRemainingColumn(),
    )
