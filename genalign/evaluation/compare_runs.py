"""Comparison of recipes: finished training runs, read from their folders and summarized over seeds."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from genalign.evaluation.evaluate import Evaluation, load_evaluation
from genalign.evaluation.records import PromptRecord, gain_row, mean, prompt_records
from genalign.runtime.files import write_json

DiversityFunction = Callable[[Path], Mapping[str, float]]
"""Measures the diversity of the samples in an evaluation's folder, by name; empty for samples of another world."""

_LATE_ROUNDS = 5  # rounds at the end of a run over which its KL is averaged


@dataclass(frozen=True)
class RecipeRuns:
    """The folders of one recipe's finished runs, by training seed."""

    name: str
    runs: Mapping[int, Path]


@dataclass(frozen=True)
class RecipeSummary:
    """A recipe's results over its seeds.

    ``gain`` is the main score's gain on the evaluated prompts, with its 95 % interval ``low`` to ``high`` (over prompts
    alone for a single seed); ``scores`` and ``tasks`` are the gains of every score and task. ``kl`` is the mean
    divergence from the base model in the last rounds, ``diversity`` is after minus before, and ``minutes`` and ``nfe``
    are mean costs of a run.
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


def summarize_recipes(recipes: Sequence[RecipeRuns], diversity: DiversityFunction) -> list[RecipeSummary]:
    """Summarize every recipe by the scores that all runs have, of which the first is the main one.

    Raises ValueError for a recipe without runs, or if the runs have no score in common.
    """
    for recipe in recipes:
        if not recipe.runs:
            raise ValueError(f"recipe {recipe.name!r} has no finished run")
    evaluations = [
        {seed: (load_evaluation(run / "before"), load_evaluation(run / "after")) for seed, run in recipe.runs.items()}
        for recipe in recipes
    ]
    first, *others = (side.score_names for by_seed in evaluations for pair in by_seed.values() for side in pair)
    scores = [name for name in first if all(name in names for names in others)]
    if not scores:
        raise ValueError(
            "the recipes have no score in common: give each a reward of the same name (with weight 0 it only reports)"
        )
    return [
        _summarize(recipe, by_seed, scores, diversity) for recipe, by_seed in zip(recipes, evaluations, strict=True)
    ]


def _summarize(
    recipe: RecipeRuns,
    evaluations: Mapping[int, tuple[Evaluation, Evaluation]],
    scores: Sequence[str],
    diversity: DiversityFunction,
) -> RecipeSummary:
    records: dict[str, list[PromptRecord]] = {score: [] for score in scores}
    for score in scores:
        for seed, pair in evaluations.items():
            records[score] += prompt_records(recipe.name, score, seed, *pair)
    gains = {score: gain_row(rows) for score, rows in records.items()}
    tasks: dict[str, list[float]] = {}
    for record in records[scores[0]]:
        tasks.setdefault(record.task, []).append(record.after - record.before)

    spreads = []
    for run in recipe.runs.values():
        before, after = diversity(run / "before"), diversity(run / "after")
        spreads.append({name: after[name] - before[name] for name in before})

    main = gains[scores[0]]
    return RecipeSummary(
        name=recipe.name,
        seeds=len(recipe.runs),
        gain=main.mean,
        low=main.low,
        high=main.high,
        scores={score: row.mean for score, row in gains.items()},
        tasks={task: mean(values) for task, values in tasks.items()},
        diversity={name: mean(spread[name] for spread in spreads) for name in spreads[0]},
        **_mean_costs(recipe.runs.values()),
    )


def _mean_costs(runs: Iterable[Path]) -> dict[str, float]:
    """Average the KL of the last rounds, the minutes and the NFE over the metrics of finished runs."""
    kl, minutes, nfe = [], [], []
    for run in runs:
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        kl.append(mean(row["kl"] or 0.0 for row in rows[-_LATE_ROUNDS:]))
        minutes.append(rows[-1]["machine"]["seconds"] / 60)
        nfe.append(rows[-1]["nfe"])
    return {"kl": mean(kl), "minutes": mean(minutes), "nfe": mean(nfe)}


def write_recipe_summaries(path: Path, summaries: Sequence[RecipeSummary]) -> None:
    """Write the summaries as JSON, best first; a diversity that is not finite becomes null."""
    rows = [asdict(summary) for summary in sorted(summaries, key=lambda summary: -summary.gain)]
    for row in rows:
        row["diversity"] = {name: v if math.isfinite(v) else None for name, v in row["diversity"].items()}
    write_json(path, rows)
