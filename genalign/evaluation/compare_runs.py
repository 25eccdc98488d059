"""Several recipes side by side: finished runs read from their folders, summarised over seeds."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from genalign.evaluation.evaluate import Evaluation, load_evaluation
from genalign.evaluation.records import PromptRecord, claim, prompt_records
from genalign.runtime.files import write_json

DiversityOf = Callable[[Path], Mapping[str, float]]


@dataclass(frozen=True)
class Contender:
    """One recipe's finished runs, seed by seed."""

    name: str
    runs: Mapping[int, Path]


@dataclass(frozen=True)
class RecipeSummary:
    """What a recipe came to, over its seeds: the gain of the main score on held-out prompts with its 95 % interval (of
    one seed: over prompts alone), the gain of every score and task, and means of what it cost. ``kl`` is that of the
    last rounds from the base; ``diversity`` is after minus before, where it can be read.
    """

    name: str
    seeds: int
    gain: float
    low: float
    high: float
    scores: Mapping[str, float]
    tasks: Mapping[str, float]
    kl: float
    diversity: Mapping[str, float]
    minutes: float
    nfe: float


def standings(contenders: Sequence[Contender], diversity: DiversityOf) -> list[RecipeSummary]:
    """Read every recipe's runs, by the scores that all of them have; the main one is the first. Raises ValueError for
    a recipe without runs, and where the recipes have no score in common.
    """
    for contender in contenders:
        if not contender.runs:
            raise ValueError(f"recipe {contender.name!r} has no finished run")
    pairs = [{seed: _pair(run) for seed, run in contender.runs.items()} for contender in contenders]
    scores = _common_scores([side for evaluations in pairs for pair in evaluations.values() for side in pair])
    return [
        _standing(contender, evaluations, scores, diversity)
        for contender, evaluations in zip(contenders, pairs, strict=True)
    ]


def _common_scores(evaluations: Sequence[Evaluation]) -> list[str]:
    first, *others = (evaluation.score_names for evaluation in evaluations)
    if scores := [name for name in first if all(name in names for names in others)]:
        return scores
    raise ValueError(
        "the recipes have no score in common: give each a reward of the same name (with weight 0 it only reports)"
    )


def _standing(
    contender: Contender,
    evaluations: Mapping[int, tuple[Evaluation, Evaluation]],
    scores: Sequence[str],
    diversity: DiversityOf,
) -> RecipeSummary:
    records = {score: _records(contender.name, score, evaluations) for score in scores}
    main = claim(records[scores[0]])
    rounds = [_rows(run) for run in contender.runs.values()]
    return RecipeSummary(
        name=contender.name,
        seeds=len(contender.runs),
        gain=main.mean,
        low=main.low,
        high=main.high,
        scores={score: claim(found).mean for score, found in records.items()},
        tasks=_task_gains(records[scores[0]]),
        kl=_mean([_late_kl(rows) for rows in rounds]),
        diversity=_diversity_gain(contender.runs.values(), diversity),
        minutes=_mean([rows[-1]["machine"]["seconds"] / 60 for rows in rounds]),
        nfe=_mean([rows[-1]["nfe"] for rows in rounds]),
    )


def _diversity_gain(runs: Iterable[Path], diversity: DiversityOf) -> dict[str, float]:
    spread = [_difference(diversity(run / "before"), diversity(run / "after")) for run in runs]
    return {name: _mean([found[name] for found in spread]) for name in spread[0]}


def _pair(run: Path) -> tuple[Evaluation, Evaluation]:
    return load_evaluation(run / "before"), load_evaluation(run / "after")


def _records(name: str, score: str, pairs: Mapping[int, tuple[Evaluation, Evaluation]]) -> list[PromptRecord]:
    return [record for seed, pair in pairs.items() for record in prompt_records(name, score, seed, *pair)]


def _task_gains(records: Sequence[PromptRecord]) -> dict[str, float]:
    tasks: dict[str, list[float]] = {}
    for record in records:
        tasks.setdefault(record.task, []).append(record.after - record.before)
    return {task: _mean(gains) for task, gains in tasks.items()}


def _rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def _late_kl(rows: Sequence[Mapping[str, Any]]) -> float:
    return _mean([row["kl"] or 0.0 for row in rows[-5:]])


def _difference(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    return {name: after[name] - before[name] for name in before}


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def write_standings(path: Path, standings: Sequence[RecipeSummary]) -> None:
    """As JSON, best first; a diversity that could not be read is null."""
    ordered = [asdict(found) for found in sorted(standings, key=lambda found: -found.gain)]
    for found in ordered:
        found["diversity"] = {name: v if math.isfinite(v) else None for name, v in found["diversity"].items()}
    write_json(path, ordered)
