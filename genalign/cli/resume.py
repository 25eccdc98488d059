"""``genalign train --resume``: find the run and its checkpoint, and check that settings and inputs are unchanged."""

from __future__ import annotations

import argparse
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from genalign.cli.context import Checkpoint
from genalign.cli.family_defaults import with_recorded_defaults
from genalign.cli.train_settings import Train
from genalign.runtime.state import State
from genalign.training.checkpointing import Checkpoints, RunCheckpoint
from genalign.training.run_folder import RunFolder

MAY_CHANGE = (
    "output",
    "trackers",
    "sample_grid",
    "checkpoint",
    "max_seconds",
    "training.rounds",
    "training.max_nfe",
    "training.max_failed_fraction",
    "training.max_skipped_updates",
    "training.max_silent_rounds",
    "training.on_out_of_memory",
    "model.memory.checkpointing",
    "model.memory.offload",
    "model.token",
)
"""Settings that may change when a run is resumed."""


def train_request(arguments: Sequence[str]) -> tuple[list[str], bool]:
    """Take ``--resume`` out of the arguments of ``genalign train``, and return whether it was among them.

    ``--resume RUN`` becomes that run's configuration and output; ``--resume`` alone resumes the run in the output, if
    there is one. Raises FileNotFoundError if RUN holds no run, and ValueError for a run of genalign 0.1.0.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", nargs="?", const="")
    parsed, rest = parser.parse_known_args(list(arguments))
    if not parsed.resume:
        return rest, parsed.resume is not None
    run = Path(parsed.resume)
    if not (run / "config.json").is_file():
        raise FileNotFoundError(f"{run} holds no run to resume: give the output folder of a training")
    RunFolder(run).require_format()
    return ["--config", str(run / "config.json"), *rest, "--output", str(run)], True


def checkpoint_in(folder: RunFolder, checkpoints: Checkpoints, plain: Mapping[str, Any]) -> RunCheckpoint | None:
    """Find the checkpoint from which the run in ``folder`` resumes; None if there is no run.

    Raises ValueError for a run with other settings, of genalign 0.1.0, or without an intact checkpoint.
    """
    folder.require_format()
    checkpoint = checkpoints.latest()
    if checkpoint is not None:
        recorded = folder.config()
        require_same(recorded, with_recorded_defaults(plain, recorded))
    elif (folder.path / "metrics.jsonl").exists():
        raise ValueError(f"the run in {folder.path} has no checkpoint to resume from: choose another output")
    return checkpoint


def rounds_of(settings: Train, recorded: Mapping[str, Any] | None, otherwise: int) -> int | None:
    """Return the number of rounds of a run; None where it is fitted to the time budget after the first round.

    Args:
        settings: The settings of the command, whose number comes first.
        recorded: The configuration of the run that is resumed, whose number comes next; None for a new run.
        otherwise: The number of a run without a time budget.
    """
    rounds = settings.training.rounds or (recorded["training"]["rounds"] if recorded else None)
    return rounds or (None if settings.time_budget.is_set else otherwise)


def require_same(stored: Mapping[str, Any], requested: Mapping[str, Any]) -> None:
    """Raise ValueError that names every setting that differs and is not in ``MAY_CHANGE``."""
    old, new = dict(flat(stored)), dict(flat(requested))
    changes = [
        f"{name} was {old.get(name)!r} and is {new.get(name)!r}"
        for name in sorted(old | new)
        if old.get(name) != new.get(name) and not f"{name}.".startswith(tuple(f"{free}." for free in MAY_CHANGE))
    ]
    if changes:
        raise ValueError(f"a resumed run keeps its settings, but {'; '.join(changes)}: choose another output")


def flat(settings: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the settings by their full names, as in training.rounds, with ``before`` in front of each."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value


@dataclass(frozen=True)
class InputFingerprint:
    """Hashes of the model's weights and of the prompts."""

    model: str
    prompts: str

    def state(self) -> State:
        """Store the hashes in the checkpoint."""
        return State({}, asdict(self))

    def restore(self, state: State) -> None:
        """Raise ValueError if the hashes differ; there is nothing to restore."""
        for name, value in asdict(self).items():
            if state.numbers[name] != value:
                raise ValueError(f"{name} is not what the run began with: restore it, or choose another output")


@dataclass(frozen=True)
class EncoderCache:
    """The batches in which ``model`` encoded texts: the last bits of the embeddings depend on them."""

    model: Checkpoint

    def state(self) -> State:
        """Store the texts of all batches, in order."""
        return State({}, {"batches": self.model.encoded})

    def restore(self, state: State) -> None:
        """Make the model encode the texts in the same batches, when they are needed."""
        self.model.encode_together(state.numbers["batches"])


@dataclass
class TrackerRun:
    """The id of a run on the servers of experiment trackers: 21 characters, SwanLab's limit."""

    id: str = field(default_factory=lambda: uuid.uuid4().hex[:21])

    def state(self) -> State:
        """Store the id in the checkpoint."""
        return State({}, {"id": self.id})

    def restore(self, state: State) -> None:
        """Take the id of the run that is resumed."""
        self.id = state.numbers["id"]
