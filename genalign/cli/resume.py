"""``genalign train --resume``: find the run and its checkpoint, and check that settings and inputs are unchanged.

Runs that have ended are checked too, before a comparison takes them for those that it asks for.
"""

from __future__ import annotations

import argparse
import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from genalign.cli.context import Checkpoint
from genalign.cli.family_defaults import with_recorded_defaults
from genalign.cli.run_prompts import RunPrompts
from genalign.cli.train_settings import Train
from genalign.runtime.distributed import ProcessGroup
from genalign.runtime.state import State
from genalign.scoring.score import group_reward
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
    "training.max_rounds_without_credit",
    "training.on_out_of_memory",
    "model.memory.checkpointing",
    "model.memory.offload",
    "model.token",
)
"""Settings that may change when a run is resumed."""

_BUDGET = ("max_seconds", "training.rounds", "training.max_nfe")


def train_request(arguments: Sequence[str]) -> tuple[list[str], bool]:
    """Take ``--resume`` out of the arguments of ``genalign train``, and return whether it was among them.

    ``--resume RUN`` becomes that run's configuration and output; ``--resume`` without RUN resumes the run in the
    output, if there is one. Raises FileNotFoundError if RUN is not a run, and ValueError for a run of genalign 0.1.0.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", nargs="?", const="")
    parsed, rest = parser.parse_known_args(list(arguments))
    if not parsed.resume:
        return rest, parsed.resume is not None
    run = Path(parsed.resume)
    if not (run / "config.json").is_file():
        raise FileNotFoundError(f"{run} has no run to resume: give the output folder of a training run")
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
    """Return the number of rounds of a run; None if it is fitted to the time budget after the first round.

    Args:
        settings: The settings of the command, which take precedence.
        recorded: The configuration of the resumed run, which comes second; None for a new run.
        otherwise: The number of rounds without either or a time budget.
    """
    rounds = settings.training.rounds or (recorded["training"]["rounds"] if recorded else None)
    return rounds or (None if settings.time_budget.is_set else otherwise)


def require_same(stored: Mapping[str, Any], requested: Mapping[str, Any]) -> None:
    """Raise ValueError with every setting that differs and is not in ``MAY_CHANGE``."""
    if changes := changed_settings(stored, requested, MAY_CHANGE):
        raise ValueError(f"a resumed run keeps its settings, but {'; '.join(changes)}: choose another output")


def changed_settings(stored: Mapping[str, Any], requested: Mapping[str, Any], free: Sequence[str]) -> list[str]:
    """Describe every setting that differs, but for those in ``free`` and in the sections that it names."""
    old, new = dict(flat(stored)), dict(flat(requested))
    return [
        f"{name} was {old.get(name)!r} and is {new.get(name)!r}"
        for name in sorted(old | new)
        if old.get(name) != new.get(name) and not f"{name}.".startswith(tuple(f"{own}." for own in free))
    ]


def require_unchanged(run: Path, settings: Train, plain: Mapping[str, Any]) -> None:
    """Raise ValueError where a run that has ended was trained with other settings or prompts than are requested.

    Unlike in a run that is resumed, the budget may not differ either. A number of rounds that was fitted to a time
    budget is no setting.

    Args:
        run: The folder of the run.
        settings: The requested configuration.
        plain: The same as plain JSON.
    """
    folder = RunFolder(run)
    folder.require_format()
    recorded, prompts = folder.config(), RunPrompts.read(settings)
    world_size = json.loads((run / "environment.json").read_text(encoding="utf-8"))["processes"]
    fitted = settings.training.fit(
        prompts.training,
        settings.recipe.objective.unit,
        ProcessGroup(0, world_size),
        group_reward=group_reward(settings.rewards),
    )
    rounds = recorded["training"]["rounds"] if settings.time_budget.is_set else fitted.rounds
    sizes = fitted.sizes | {"rounds": settings.training.rounds or rounds}
    requested = with_recorded_defaults({**plain, "training": plain["training"] | sizes}, recorded)
    changes = changed_settings(recorded, requested, [name for name in MAY_CHANGE if name not in _BUDGET])
    if json.loads((run / "prompts.json").read_text(encoding="utf-8")) != prompts.as_dict():
        changes.append("its prompts are not the present ones")
    if changes:
        raise ValueError(
            f"{run} was trained with other settings: {'; '.join(changes)}. Delete this folder to train it again, or"
            " choose another --output"
        )


def flat(settings: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the settings with their full names, as in training.rounds, each prefixed by ``before``."""
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
                raise ValueError(f"{name} changed since the run began: restore it, or choose another output")


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
