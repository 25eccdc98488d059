"""``genalign train --resume``: which run goes on, whether it may, and what is kept of it beside the loop's own."""

from __future__ import annotations

import argparse
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from genalign.cli.context import Checkpoint as Model
from genalign.runtime.state import State
from genalign.training.checkpointing import Checkpoints, RunCheckpoint
from genalign.training.run import RunFolder

MAY_CHANGE = (
    "output",
    "trackers",
    "checkpoint",
    "training.rounds",
    "training.max_nfe",
    "training.max_failed_fraction",
    "training.max_skipped_updates",
    "training.on_out_of_memory",
    "model.memory.checkpointing",
    "model.memory.offload",
)
"""Settings that a resumed run may have other values of."""


@dataclass(frozen=True)
class Request:
    """The arguments of a training without ``--resume``, and whether that was among them."""

    arguments: list[str]
    resume: bool


def requested(arguments: Sequence[str]) -> Request:
    """``--resume RUN`` stands for that run's configuration and output; ``--resume`` alone goes on with a run in the
    output, if there is one. Raises FileNotFoundError for a RUN that is none."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", nargs="?", const="")
    found, rest = parser.parse_known_args(list(arguments))
    if not found.resume:
        return Request(rest, found.resume is not None)
    run = Path(found.resume)
    if not (run / "config.json").is_file():
        raise FileNotFoundError(f"{run} holds no run to resume: give the output folder of a training")
    return Request(["--config", str(run / "config.json"), *rest, "--output", str(run)], True)


def checkpoint_in(folder: RunFolder, checkpoints: Checkpoints, config: Mapping[str, Any]) -> RunCheckpoint | None:
    """Where the run in ``folder`` goes on; None where none has begun.

    Raises ValueError for a run with other settings, and for one without a checkpoint that is whole.
    """
    checkpoint = checkpoints.latest()
    if checkpoint is not None:
        require_same(folder.config(), config)
    elif (folder.path / "metrics.jsonl").exists():
        raise ValueError(f"the run in {folder.path} has no checkpoint to go on from: choose another output")
    return checkpoint


def require_same(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Raise ValueError, naming them, for settings that differ and are not in ``MAY_CHANGE``."""
    old, new = dict(_flat(stored)), dict(_flat(asked))
    changed = [
        f"{name} was {old.get(name)!r} and is {new.get(name)!r}"
        for name in sorted(old | new)
        if old.get(name) != new.get(name) and not any(f"{name}.".startswith(f"{free}.") for free in MAY_CHANGE)
    ]
    if changed:
        raise ValueError(f"a resumed run keeps its settings, but {'; '.join(changed)}: choose another output")


def _flat(settings: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value


@dataclass(frozen=True)
class InputFingerprint:
    """Hashes of the model's weights and of the prompts that a run is of."""

    model: str
    prompts: str

    def state(self) -> State:
        """Both."""
        return State({}, asdict(self))

    def restore(self, state: State) -> None:
        """Nothing to put back. Raises ValueError for others."""
        for name, value in asdict(self).items():
            if state.numbers[name] != value:
                raise ValueError(f"{name} is not what the run began with: put it back, or choose another output")


@dataclass(frozen=True)
class EncoderCache:
    """The batches that ``model`` encoded texts in."""

    model: Model

    def state(self) -> State:
        """All of them."""
        return State({}, {"batches": self.model.encoded})

    def restore(self, state: State) -> None:
        """Encode them so again, one by one as they are needed."""
        self.model.encode_together(state.numbers["batches"])


@dataclass
class TrackerRun:
    """Under which name experiment trackers know a run; 21 characters, as SwanLab once asked for."""

    id: str = field(default_factory=lambda: uuid.uuid4().hex[:21])

    def state(self) -> State:
        """The name."""
        return State({}, {"id": self.id})

    def restore(self, state: State) -> None:
        """Go by that name again."""
        self.id = state.numbers["id"]
