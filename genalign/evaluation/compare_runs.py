"""Comparison of recipes: finished training runs, read from their folders and summarized over seeds."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from genalign.evaluation.evaluate import load_evaluation
from genalign.evaluation.records import PromptRecord, gain_row, mean, prompt_records
from genalign.metrics.intervals import Estimate, effect_size
from genalign.runtime.files import without_infinities, write_json

DiversityFunction = Callable[[Path], Mapping[str, float]]
"""Measures the diversity of the samples in an evaluation's folder, by name; empty for samples of another world."""

_LATE_ROUNDS = 5  # rounds at the end of a run over which its KL is averaged


@dataclass(frozen=True)
class RecipeSummary:
    """A recipe's results over its seeds.

    ``gain`` is the main score's gain on ``prompts`` evaluated prompts, with its 95 % interval ``low`` to ``high`` (over
    prompts only for a single seed) and its ``effect`` size; ``scores`` and ``tasks`` are the gains of every score and
    task. ``kl`` is the mean divergence from the base model in the last rounds, and ``diversity`` is after minus before.
    ``minutes`` of training and ``nfe`` are mean costs of a run, ``minutes_range`` and ``nfe_range`` the least and the
    most over the seeds.
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
    prompts: int
    effect: float
    minutes_range: tuple[float, float]
    nfe_range: tuple[float, float]

    @property
    def estimate(self) -> Estimate:
        """The main score's gain with its interval over prompts and seeds."""
        return Estimate(self.gain, self.low, self.high, self.prompts)


BUDGET_TOLERANCE = 0.05
"""The largest cost of the most expensive run over the cheapest one for which budgets count as equal."""


def equal_budgets(ranges: Iterable[tuple[float, float]]) -> bool:
    """Say whether all runs cost the same within ``BUDGET_TOLERANCE``, by the least and the most of each recipe."""
    lows, highs = zip(*ranges, strict=True)
    return bool(max(highs) <= (1 + BUDGET_TOLERANCE) * min(lows))


def summarize_recipes(recipes: Mapping[str, Mapping[int, Path]], diversity: DiversityFunction) -> list[RecipeSummary]:
    """Summarize every recipe by the scores that all runs have, of which the first is the main one.

    ``recipes`` are the folders of each recipe's finished runs, at least one, by training seed. A score that failed for
    every sample of a recipe is not among them. Raises ValueError if the runs have no score in common.
    """
    evaluations = {
        name: {seed: (load_evaluation(run / "before"), load_evaluation(run / "after")) for seed, run in runs.items()}
        for name, runs in recipes.items()
    }
    by_run = [pair for by_seed in evaluations.values() for pair in by_seed.values()]
    first, *others = (side.score_names for pair in by_run for side in pair)
    shared = [name for name in first if all(name in names for names in others)]
    records: dict[str, dict[str, list[PromptRecord]]] = {
        name: {
            score: [row for seed, pair in by_seed.items() for row in prompt_records(name, score, seed, *pair)]
            for score in shared
        }
        for name, by_seed in evaluations.items()
    }
    scores = [score for score in shared if all(of_recipe[score] for of_recipe in records.values())]
    if not scores:
        raise ValueError(
            "the recipes have no score in common: give each a reward of the same name (with weight 0 it only reports)"
        )
    return [
        _summarize({score: records[name][score] for score in scores}, list(runs.values()), diversity)
        for name, runs in recipes.items()
    ]


def _summarize(
    records: Mapping[str, Sequence[PromptRecord]], runs: Sequence[Path], diversity: DiversityFunction
) -> RecipeSummary:
    """Summarize one recipe by the records of each score, of which the first is the main one."""
    gains = {score: gain_row(rows) for score, rows in records.items()}
    main, tasks = next(iter(gains.values())), dict[str, list[float]]()
    prompts: dict[tuple[str, str], list[PromptRecord]] = {}
    for record in records[main.metric]:
        tasks.setdefault(record.task, []).append(record.after - record.before)
        prompts.setdefault((record.task, record.prompt), []).append(record)
    means = [(mean(r.before for r in rows), mean(r.after for r in rows)) for rows in prompts.values()]

    spreads, kl, minutes, nfe = [], [], [], []
    for run in runs:
        before, after = diversity(run / "before"), diversity(run / "after")
        spreads.append({name: after[name] - before[name] for name in before})
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        kl.append(mean(row["kl"] or 0.0 for row in rows[-_LATE_ROUNDS:]))
        minutes.append(rows[-1]["machine"]["seconds"] / 60)
        nfe.append(rows[-1]["nfe"])
    return RecipeSummary(
        name=main.name,
        seeds=len(runs),
        gain=main.mean,
        low=main.low,
        high=main.high,
        scores={score: row.mean for score, row in gains.items()},
        tasks={task: mean(values) for task, values in tasks.items()},
        diversity={name: mean(spread[name] for spread in spreads) for name in spreads[0]},
        kl=mean(kl),
        minutes=mean(minutes),
        nfe=mean(nfe),
        prompts=main.n,
        effect=effect_size(main.mean, means),
        minutes_range=(min(minutes), max(minutes)),
        nfe_range=(min(nfe), max(nfe)),
    )


def write_recipe_summaries(path: Path, summaries: Sequence[RecipeSummary]) -> None:
    """Write the summaries as JSON, best first; a number that is not finite becomes null."""
    rows = [asdict(summary) for summary in sorted(summaries, key=lambda summary: -summary.gain)]
    write_json(path, without_infinities(rows))
