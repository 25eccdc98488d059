"""A run folder as the report sees it: whatever is there, and notes on what is not."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from genalign.evaluation.evaluate import Evaluation, load_evaluation
from genalign.evaluation.paired import Pair, gain, ranked, task_gains
from genalign.metrics.intervals import Estimate

Row = Mapping[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Comparison:
    """After minus before: by score, by task and score, and pair by pair with the worst regression first."""

    gain: Mapping[str, Estimate]
    tasks: Mapping[str, Mapping[str, Estimate]]
    pairs: tuple[Pair, ...]


@dataclass(frozen=True)
class Run:
    """The parts of a run folder; a part that is absent is empty or None, and ``notes`` says so."""

    folder: Path
    rows: tuple[Row, ...]
    config: Any
    environment: Any
    before: Evaluation | None
    after: Evaluation | None
    comparison: Comparison | None
    notes: tuple[str, ...]


def read_run(folder: Path) -> Run:
    """Read a run folder, finished or interrupted.

    Args:
        folder: may hold metrics.jsonl, config.json, environment.json, the evaluations before/ and after/, and
            gain.json, ``{score: {mean, low, high, n}}``, which replaces the overall gain computed from the evaluations.

    Raises:
        FileNotFoundError: the folder does not exist.
        json.JSONDecodeError: a file is damaged, other than in the last line of metrics.jsonl.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a run folder: give the output directory of a training")
    notes: list[str] = []
    before = _part(folder / "before" / "summary.json", _read_evaluation, notes, "No evaluation before training.")
    after = _part(
        folder / "after" / "summary.json",
        _read_evaluation,
        notes,
        "No evaluation after training: the run was interrupted or is still under way.",
    )
    rows = _part(folder / "metrics.jsonl", _read_rows, notes, "No training metrics (metrics.jsonl).") or ()
    config = _part(folder / "config.json", _read_json, notes, "No configuration (config.json).")
    environment = _part(folder / "environment.json", _read_json, notes, "No environment (environment.json).")
    comparison = _compare(folder, before, after, notes) if before and after else None
    return Run(folder, rows, config, environment, before, after, comparison, tuple(notes))


def _part(path: Path, read: Callable[[Path], T], notes: list[str], missing: str) -> T | None:
    if path.exists():
        return read(path)
    notes.append(missing)
    return None


def _read_evaluation(summary: Path) -> Evaluation:
    return load_evaluation(summary.parent)


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _read_rows(path: Path) -> tuple[Row, ...]:
    """The rounds; a last line without its end, cut off by an interruption, is dropped."""
    *lines, _cut_off = path.read_text(encoding="utf-8").split("\n")
    return tuple(json.loads(line) for line in lines if line.strip())


def _compare(folder: Path, before: Evaluation, after: Evaluation, notes: list[str]) -> Comparison | None:
    """None, with the reason in ``notes``, where the two cannot be compared."""
    try:
        gains = gain(before, after)
    except ValueError as error:
        notes.append(f"Before and after are shown without a gain: {error}.")
        return None
    stored = _part(folder / "gain.json", _read_json, [], "") or {}
    gains |= {name: Estimate(**estimate) for name, estimate in stored.items()}
    return Comparison(gains, task_gains(before, after), ranked(before, after))
