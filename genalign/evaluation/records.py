"""Gains over several training seeds: records of each prompt and seed, and the mean gain that they give."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from genalign.evaluation.evaluate import Evaluation
from genalign.evaluation.paired import pairs
from genalign.metrics.intervals import difference_kind, joined, mean_over_tasks, t_interval


@dataclass(frozen=True)
class PromptRecord:
    """One prompt under one training seed: mean scores over its ``n`` noises, before and after."""

    name: str
    metric: str
    seed: int
    task: str
    prompt: str
    before: float
    after: float
    n: int


@dataclass(frozen=True)
class ResultRow:
    """A mean gain, or the median of a measured quantity, with its 95 % interval from ``n`` prompts, runs or repeats.

    ``low`` and ``high`` are infinite where no interval keeps its coverage (see ``Estimate``).
    """

    name: str
    metric: str
    mean: float
    low: float
    high: float
    n: int


def mean(values: Iterable[float]) -> float:
    """Return the arithmetic mean of at least one value."""
    listed = list(values)
    return sum(listed) / len(listed)


def prompt_records(name: str, metric: str, seed: int, before: Evaluation, after: Evaluation) -> list[PromptRecord]:
    """Average one score of two paired evaluations over the noises of each prompt.

    A noise whose score failed before or after is left out, and so is a prompt without any other.

    Args:
        name: The run or method that the records belong to.
        metric: The score to average.
        seed: The training seed.
        before: The evaluation of the base model.
        after: The evaluation of the trained model.
    """
    scores: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for pair in pairs(before, after):
        values = pair.before.scores[metric], pair.after.scores[metric]
        if all(map(math.isfinite, values)):
            scores.setdefault((pair.before.task, pair.before.prompt), []).append(values)
    return [
        PromptRecord(name, metric, seed, task, prompt, mean(v[0] for v in rows), mean(v[1] for v in rows), len(rows))
        for (task, prompt), rows in scores.items()
    ]


def gain_row(records: Sequence[PromptRecord]) -> ResultRow:
    """Estimate the mean gain of one (name, metric).

    The interval is over prompts (``mean_over_tasks``), and for several seeds over seeds too (``joined``). A number of
    the whole run, such as a distance of sets, is one record per seed: its interval is over seeds alone. Raises
    ValueError for records of several names or metrics.
    """
    if len({(record.name, record.metric) for record in records}) != 1:
        raise ValueError("a gain is computed for one name and one metric")
    by_seed: dict[int, dict[str, list[float]]] = {}
    by_prompt: dict[str, dict[str, list[float]]] = {}
    for record in records:
        gain = record.after - record.before
        by_seed.setdefault(record.seed, {}).setdefault(record.task, []).append(gain)
        by_prompt.setdefault(record.task, {}).setdefault(record.prompt, []).append(gain)

    kind = difference_kind([(record.before, record.after) for record in records], all(map(_is_share, records)))
    seed_gains = [mean(map(mean, by_seed[seed].values())) for seed in sorted(by_seed)]
    prompts = {task: [*map(mean, gains.values())] for task, gains in by_prompt.items()}
    if sum(map(len, prompts.values())) == 1:
        interval = mean_over_tasks({"runs": seed_gains}, kind)
    else:
        interval = mean_over_tasks(prompts, kind)
        if len(by_seed) > 1:
            interval = joined(interval, t_interval(seed_gains))
    return ResultRow(records[0].name, records[0].metric, interval.mean, interval.low, interval.high, interval.n)


def _is_share(record: PromptRecord) -> bool:
    """Whether both means are of ``n`` zeros and ones."""
    counts = (record.before * record.n, record.after * record.n)
    return all(abs(count - round(count)) < 1e-6 and 0 <= round(count) <= record.n for count in counts)
