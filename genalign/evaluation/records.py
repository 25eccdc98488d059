"""Measured claims: per-seed, per-prompt records, and the rows that are computed from them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from genalign.evaluation.evaluate import Evaluation
from genalign.evaluation.paired import pairs
from genalign.metrics.intervals import bootstrap_mean, median_interval, t_interval, wider
from genalign.runtime.files import write_json, write_text


@dataclass(frozen=True)
class PromptRecord:
    """One prompt under one training seed: means over its ``n`` noises, before and after."""

    name: str
    metric: str
    seed: int
    task: str
    prompt: str
    before: float
    after: float
    n: int


@dataclass(frozen=True)
class Row:
    """One claim as a gain with its 95% interval; ``n`` pairs of samples."""

    name: str
    metric: str
    mean: float
    low: float
    high: float
    n: int


def prompt_records(name: str, metric: str, seed: int, before: Evaluation, after: Evaluation) -> list[PromptRecord]:
    """The records of one score of a paired evaluation."""
    grouped: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for pair in pairs(before, after):
        values = pair.before.scores[metric], pair.after.scores[metric]
        grouped.setdefault((pair.before.task, pair.before.prompt), []).append(values)
    return [
        PromptRecord(name, metric, seed, task, prompt, _mean(v[0] for v in made), _mean(v[1] for v in made), len(made))
        for (task, prompt), made in grouped.items()
    ]


def claim(records: Sequence[PromptRecord]) -> Row:
    """The gain of one (name, metric): a t-interval over seeds and a bootstrap over prompts, whichever is wider; of one
    seed, the bootstrap.

    Raises ValueError for records of several names or metrics.
    """
    if len({(record.name, record.metric) for record in records}) != 1:
        raise ValueError("a claim is about one name and one metric")
    seeds = sorted({record.seed for record in records})
    by_seed = [_over_tasks([record for record in records if record.seed == seed]) for seed in seeds]
    n = sum(record.n for record in records)
    over_prompts = bootstrap_mean(_gains(records), n)
    interval = wider(t_interval(by_seed), over_prompts) if len(seeds) > 1 else over_prompts
    return Row(records[0].name, records[0].metric, interval.mean, interval.low, interval.high, n)


def _gains(records: Sequence[PromptRecord]) -> dict[str, list[float]]:
    """By task, the mean gain of each prompt."""
    prompts: dict[str, dict[str, list[float]]] = {}
    for record in records:
        prompts.setdefault(record.task, {}).setdefault(record.prompt, []).append(record.after - record.before)
    return {task: [_mean(values) for values in made.values()] for task, made in prompts.items()}


def _over_tasks(records: Sequence[PromptRecord]) -> float:
    tasks: dict[str, list[float]] = {}
    for record in records:
        tasks.setdefault(record.task, []).append(record.after - record.before)
    return _mean(_mean(values) for values in tasks.values())


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


@dataclass(frozen=True)
class Measurement:
    """One repeat of a measured figure."""

    name: str
    metric: str
    value: float


def median_row(measurements: Sequence[Measurement]) -> Row:
    """The median of one figure with its 95% interval. Raises ValueError for measurements of several figures."""
    if len({(measured.name, measured.metric) for measured in measurements}) != 1:
        raise ValueError("a row is about one name and one metric")
    made = median_interval([measured.value for measured in measurements])
    return Row(measurements[0].name, measurements[0].metric, made.mean, made.low, made.high, made.n)


def ratios(name: str, metric: str, top: Sequence[float], bottom: Sequence[float]) -> list[Measurement]:
    """The ratios top / bottom of figures that were measured in turn, such as seconds."""
    return [Measurement(name, metric, a / b) for a, b in zip(top, bottom, strict=True)]


R = TypeVar("R", PromptRecord, Measurement)


def write_results(folder: Path, stem: str, head: Mapping[str, Any], records: Sequence[R]) -> list[Row]:
    """Write ``stem``.json and raw/``stem``.jsonl; the head holds claim, command, machine, date and commit."""
    lines = [json.dumps(asdict(record), allow_nan=False) for record in records]
    write_text(folder / "raw" / f"{stem}.jsonl", "".join(f"{line}\n" for line in lines))
    rows = rows_of(records)
    kind = "measurement" if isinstance(records[0], Measurement) else "gain"
    write_json(folder / f"{stem}.json", {**head, "kind": kind, "rows": [asdict(row) for row in rows]})
    return rows


def rows_of(records: Sequence[R]) -> list[Row]:
    """One row per name, in order of appearance: a claim of a gain, or the median of a figure."""
    groups: dict[tuple[str, str], list[R]] = {}
    for record in records:
        groups.setdefault((record.name, record.metric), []).append(record)
    return [_row(group) for group in groups.values()]


def _row(records: Sequence[PromptRecord] | Sequence[Measurement]) -> Row:
    prompts = [record for record in records if isinstance(record, PromptRecord)]
    return claim(prompts) if prompts else median_row([r for r in records if isinstance(r, Measurement)])


def read_records(path: Path) -> Sequence[PromptRecord] | Sequence[Measurement]:
    """The records of a raw file."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if rows and "value" in rows[0]:
        return [Measurement(**row) for row in rows]
    return [PromptRecord(**row) for row in rows]
