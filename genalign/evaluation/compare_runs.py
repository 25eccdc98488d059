"""Comparison of recipes: finished training runs, read from their folders and summarized over seeds."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from genalign.evaluation.evaluate import load_evaluation
from genalign.evaluation.records import PromptRecord, gain_row, mean, prompt_records
from genalign.metrics.intervals import Estimate
from genalign.runtime.files import without_infinities, write_json

DiversityFunction = Callable[[Path], Mapping[str, float]]
"""Measures the diversity of the samples in an evaluation's folder, by name; empty for samples of another world."""

_LATE_ROUNDS = 5  # rounds at the end of a run over which its KL is averaged


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

    @property
    def estimate(self) -> Estimate:
        """The main score's gain with its interval."""
        return Estimate(self.gain, self.low, self.high, self.seeds)


def summarize_recipes(recipes: Mapping[str, Mapping[int, Path]], diversity: DiversityFunction) -> list[RecipeSummary]:
    """Summarize every recipe by the scores that all runs have, of which the first is the main one.

    ``recipes`` are the folders of each recipe's finished runs, at least one, by training seed. Raises ValueError if the
    runs have no score in common.
    """
    evaluations = {
        name: {seed: (load_evaluation(run / "before"), load_evaluation(run / "after")) for seed, run in runs.items()}
        for name, runs in recipes.items()
    }
    by_run = [pair for by_seed in evaluations.values() for pair in by_seed.values()]
    first, *others = (side.score_names for pair in by_run for side in pair)
    scores = [name for name in first if all(name in names for names in others)]
    if not scores:
        raise ValueError(
            "the recipes have no score in common: give each a reward of the same name (with weight 0 it only reports)"
        )
    summaries = []
    for name, runs in recipes.items():
        records: dict[str, list[PromptRecord]] = {
            score: [row for seed, pair in evaluations[name].items() for row in prompt_records(name, score, seed, *pair)]
            for score in scores
        }
        summaries.append(_summarize(records, list(runs.values()), diversity))
    return summaries


def _summarize(
    records: Mapping[str, Sequence[PromptRecord]], runs: Sequence[Path], diversity: DiversityFunction
) -> RecipeSummary:
    """Summarize one recipe by the records of each score, of which the first is the main one."""
    gains = {score: gain_row(rows) for score, rows in records.items()}
    main, tasks = next(iter(gains.values())), dict[str, list[float]]()
    for record in records[main.metric]:
        tasks.setdefault(record.task, []).append(record.after - record.before)

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
    )


def write_recipe_summaries(path: Path, summaries: Sequence[RecipeSummary]) -> None:
    """Write the summaries as JSON, best first; a number that is not finite becomes null."""
    rows = [asdict(summary) for summary in sorted(summaries, key=lambda summary: -summary.gain)]
    write_json(path, without_infinities(rows))
