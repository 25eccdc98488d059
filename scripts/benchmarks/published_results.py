"""Published results in docs/results: raw records, and the rows that are computed from them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from genalign.evaluation.records import PromptRecord, ResultRow, gain_row
from genalign.metrics.intervals import median_interval
from genalign.runtime.files import without_infinities, write_json, write_text


@dataclass(frozen=True)
class Measurement:
    """One repeat of a measured quantity, such as seconds or bytes."""

    name: str
    metric: str
    value: float


def median_row(measurements: Sequence[Measurement]) -> ResultRow:
    """Return the median of one quantity. Raises ValueError for measurements of several names or metrics."""
    if len({(measurement.name, measurement.metric) for measurement in measurements}) != 1:
        raise ValueError("a median is computed for one name and one metric")
    median = median_interval([measurement.value for measurement in measurements])
    first = measurements[0]
    return ResultRow(first.name, first.metric, median.mean, median.low, median.high, median.n)


def ratios(name: str, metric: str, top: Sequence[float], bottom: Sequence[float]) -> list[Measurement]:
    """Divide measurements pairwise, such as the seconds of two programs that ran in turn.

    Args:
        name: The name of the ratios.
        metric: What the ratio compares.
        top: The numerators.
        bottom: As many denominators.
    """
    return [Measurement(name, metric, a / b) for a, b in zip(top, bottom, strict=True)]


R = TypeVar("R", PromptRecord, Measurement)


def write_results(folder: Path, stem: str, head: Mapping[str, Any], records: Sequence[R]) -> list[ResultRow]:
    """Write the rows to ``stem``.json and the records to raw/``stem``.jsonl, and return the rows.

    Args:
        folder: The folder of published results.
        stem: The name of both files.
        head: Claim, command, machine, date and commit, written beside the rows.
        records: At least one record, all of one kind.
    """
    lines = [json.dumps(asdict(record), allow_nan=False) for record in records]
    write_text(folder / "raw" / f"{stem}.jsonl", "".join(f"{line}\n" for line in lines))
    rows = result_rows(records)
    kind = "measurement" if isinstance(records[0], Measurement) else "gain"
    write_json(
        folder / f"{stem}.json", {**head, "kind": kind, "rows": without_infinities([asdict(row) for row in rows])}
    )
    return rows


def result_rows(records: Sequence[R]) -> list[ResultRow]:
    """Compute one row per (name, metric), in order of appearance: a mean gain, or the median of a quantity."""
    groups: dict[tuple[str, str], list[R]] = {}
    for record in records:
        groups.setdefault((record.name, record.metric), []).append(record)
    rows = []
    for group in groups.values():
        gains = [record for record in group if isinstance(record, PromptRecord)]
        measurements = [record for record in group if isinstance(record, Measurement)]
        rows.append(gain_row(gains) if gains else median_row(measurements))
    return rows


def read_records(path: Path) -> Sequence[PromptRecord] | Sequence[Measurement]:
    """Read the records of a raw file that ``write_results`` wrote."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if rows and "value" in rows[0]:
        return [Measurement(**row) for row in rows]
    return [PromptRecord(**row) for row in rows]
