"""Checkpoints for resuming a run: numbered, checksummed and written atomically; the last few are retained.

``checkpoints/round-000012/`` holds state.safetensors, state.json, and manifest.json with the size and SHA-256 of both,
and lora/, the averaged adapter for use elsewhere, which resuming does not read.
The newest also has scores.jsonl, the score log of the rounds after it (``genalign.scoring.score_log``); further ranks
write scores-1.jsonl and so on. ``checkpoints/latest`` is a link to the newest.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from genalign.runtime.distributed import SINGLE_PROCESS, ProcessGroup
from genalign.runtime.files import load_state, save_state, sync, with_prefix, without_prefix, write_json
from genalign.runtime.state import State, Stateful
from genalign.scoring.score_log import ScoreLog

logger = logging.getLogger(__name__)
AdapterWriter = Callable[[Path], None]
FORMAT = 1
_TENSORS, _NUMBERS, _MANIFEST = "state.safetensors", "state.json", "manifest.json"
_PART = ".part"  # the suffix of folders that are unfinished, or being removed


@dataclass(frozen=True)
class Checkpointing:
    """Checkpoints of a run, from which it is resumed.

    Args:
        every: Number of rounds between two checkpoints, which is also the most that a crash can lose.
        keep: Number of newest checkpoints that are retained, each with the adapter of its round in lora/.
    """

    every: int = 1
    keep: int = 2

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"checkpoint.{name} must be at least 1, not {value}")


class DamagedCheckpointError(ValueError):
    """A checkpoint with files that are missing or do not match their checksums."""


@dataclass(frozen=True)
class RunCheckpoint:
    """An intact checkpoint of a run after ``rounds`` rounds."""

    path: Path
    rounds: int

    def restore(self, parts: Mapping[str, Stateful]) -> None:
        """Restore the states of the named ``parts``."""
        tensors, _ = load_state(self.path / _TENSORS)
        numbers = json.loads((self.path / _NUMBERS).read_text(encoding="utf-8"))
        ordered = {name: tensors[name] for name in numbers["tensors"]}
        for name, part in parts.items():
            part.restore(State(without_prefix(f"{name}.", ordered), numbers["parts"][name]))


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints in ``folder``, of which saving retains the last ``keep``. The main rank writes them."""

    folder: Path
    keep: int = 2
    processes: ProcessGroup = SINGLE_PROCESS

    def save(self, rounds: int, parts: Mapping[str, Stateful], write_adapter: AdapterWriter | None = None) -> Path:
        """Write the state of ``parts`` after ``rounds`` rounds and lora/, and return the path of the checkpoint.

        Raises OSError on every rank if writing fails; earlier checkpoints stay intact.
        """
        path = self.folder / f"round-{rounds:06d}"
        states = {name: part.state() for name, part in parts.items()}
        failed: list[Any] | None = None
        if self.processes.is_main:
            try:
                self._save(path, rounds, states, write_adapter)
            except OSError as error:
                failed = [error.errno, str(error)]
        if failed := self.processes.all_gather_object(failed)[0]:
            raise OSError(*failed)
        return path

    def _save(self, path: Path, rounds: int, states: Mapping[str, State], write_adapter: AdapterWriter | None) -> None:
        """Write a checkpoint under a temporary name, flush it to the disk and rename it: it is complete or absent."""
        for unfinished in self.folder.glob(f"round-*{_PART}"):  # left by a killed process
            shutil.rmtree(unfinished, ignore_errors=True)
        beside = path.with_name(path.name + _PART)
        tensors: dict[str, Tensor] = {}
        for name, state in states.items():
            tensors |= with_prefix(f"{name}.", state.tensors)
        parts = {name: state.numbers for name, state in states.items()}
        try:
            save_state(beside / _TENSORS, tensors, {})
            write_json(beside / _NUMBERS, {"parts": parts, "tensors": list(tensors)})  # safetensors loses their order
            files = {name: _fingerprint(beside / name) for name in (_TENSORS, _NUMBERS)}
            write_json(beside / _MANIFEST, {"format": FORMAT, "rounds": rounds, "files": files})
            if write_adapter:
                write_adapter(beside / "lora")
            for written in (*beside.rglob("*"), beside):
                sync(written)
            _discard(path)  # a damaged checkpoint of the same round
            os.rename(beside, path)
        except OSError:
            shutil.rmtree(beside, ignore_errors=True)
            raise
        sync(self.folder)
        self._point(path)

        # Remove checkpoints before the last ``keep``, and damaged ones of later rounds
        paths = self._all()
        end = paths.index(path) + 1
        for old in [*paths[: max(0, end - self.keep)], *paths[end:]]:
            _discard(old)

    def latest(self) -> RunCheckpoint | None:
        """Return the newest intact checkpoint, with a warning for each damaged newer one; None if there are none.

        Raises DamagedCheckpointError if all are damaged.
        """
        damage: list[str] = []
        for path in reversed(self._all()):
            try:
                checkpoint = _verify(path)
            except DamagedCheckpointError as error:
                damage.append(str(error))
                continue
            for problem in damage:
                logger.warning("%s: resuming from %s", problem, path.name)
            if self.processes.is_main:
                self._point(path)
            return checkpoint
        if damage:
            raise DamagedCheckpointError(f"no checkpoint to resume from: {'; '.join(damage)}")
        return None

    def scores(self, since: RunCheckpoint) -> list[Path]:
        """List the score logs that were written since a checkpoint."""
        paths = [path for path in self._all() if path.name >= since.path.name]
        return [scores for path in paths for scores in sorted(path.glob("scores*.jsonl"))]

    def own_scores(self, path: Path) -> Path:
        """Return the path of this rank's score log of the rounds after the checkpoint at ``path``."""
        return path / (f"scores-{self.processes.rank}.jsonl" if self.processes.rank else "scores.jsonl")

    def _all(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("round-*") if path.suffix != _PART)

    def _point(self, path: Path) -> None:
        link = self.folder / f"latest{_PART}"
        with contextlib.suppress(OSError):  # some file systems have no links, and nothing depends on this one
            link.unlink(missing_ok=True)
            link.symlink_to(path.name)
            os.replace(link, self.folder / "latest")


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _verify(path: Path) -> RunCheckpoint:
    """Compare a checkpoint with its manifest. Raises DamagedCheckpointError if they differ."""
    try:
        manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        rounds, files, file_format = int(manifest["rounds"]), dict(manifest["files"]), int(manifest["format"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpointError(f"{path} is damaged: {_MANIFEST} cannot be read ({error})") from None
    if file_format > FORMAT:
        raise DamagedCheckpointError(f"{path} was written by a later genalign (format {file_format}): update this one")
    for name in (_TENSORS, _NUMBERS):
        if not (path / name).is_file():
            raise DamagedCheckpointError(f"{path} is damaged: {name} is missing")
        if _fingerprint(path / name) != files.get(name):
            raise DamagedCheckpointError(f"{path} is damaged: {name} does not match its checksum")
    return RunCheckpoint(path, rounds)


def _discard(path: Path) -> None:
    """Rename a folder, if it exists, and then remove it, so a half-deleted one is never taken for a checkpoint."""
    if not path.exists():
        return
    doomed = path.with_name(f"{path.name}.old{_PART}")
    os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


@dataclass(frozen=True)
class CheckpointWriter:
    """Saves the state of ``parts`` during a run, and starts a new score log with each checkpoint.

    Args:
        checkpoints: The checkpoints of the run.
        parts: The parts to save, by name.
        score_log: The log of reward calls since the last checkpoint.
        every: The number of rounds between two checkpoints.
        adapter: Gather the averaged adapter, and return a function that writes it into a folder; None for no adapter.
    """

    checkpoints: Checkpoints
    parts: Mapping[str, Stateful]
    score_log: ScoreLog
    every: int = 1
    adapter: Callable[[], AdapterWriter | None] = lambda: None

    def begin(self) -> None:
        """Save a checkpoint before the first round. Raises OSError if that fails."""
        self._save(0)

    def resume(self, checkpoint: RunCheckpoint) -> None:
        """Restore ``checkpoint``, and load the scores that were logged since."""
        checkpoint.restore(self.parts)
        self.score_log.load(self.checkpoints.scores(checkpoint))
        self.score_log.record_to(self.checkpoints.own_scores(checkpoint.path))

    def after(self, rounds: int, last: bool) -> None:
        """Save a checkpoint after ``rounds`` rounds if one is due, and log a warning if that fails."""
        if rounds % self.every and not last:
            return
        try:
            self._save(rounds)
        except OSError as error:
            logger.warning("Round %d: no checkpoint could be written, the previous one is intact: %s", rounds, error)

    def _save(self, rounds: int) -> None:
        path = self.checkpoints.save(rounds, self.parts, self.adapter())
        self.score_log.record_to(self.checkpoints.own_scores(path))
