"""Standings of recipes at equal cost: the held-out scores of their runs, read between evaluations at one budget.

The evaluations of a run during training give its score against NFE and against seconds of training. Both standings are
read from the same runs, at the largest cost that every run has reached. Seconds compare only what ran on the same
machine, one run at a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np

from genalign.evaluation.records import mean
from genalign.metrics.intervals import Estimate, t_interval, welch_interval
from genalign.runtime.files import without_infinities, write_json

Cost = Literal["nfe", "seconds"]
_LATE = 0.75  # the fraction of the budget after which a rise says that a recipe has not levelled off


@dataclass(frozen=True)
class Look:
    """An evaluation on held-out prompts during training: what the run had cost by then, and the mean of each score."""

    nfe: float
    seconds: float
    scores: Mapping[str, float]


@dataclass(frozen=True)
class Curve:
    """A held-out score of one run against its cost, at its evaluations in order."""

    costs: tuple[float, ...]
    scores: tuple[float, ...]

    def at(self, cost: float) -> float:
        """The score at a cost, on a straight line between the evaluations before and after."""
        return float(np.interp(cost, self.costs, self.scores))


def mean_curve(runs: Iterable[Curve], points: int = 40) -> Curve:
    """The mean of curves, between the largest of their first costs and the least of their last."""
    curves = list(runs)
    costs = np.linspace(max(curve.costs[0] for curve in curves), min(curve.costs[-1] for curve in curves), points)
    return Curve(tuple(costs.tolist()), tuple(mean(curve.at(cost) for curve in curves) for cost in costs))


@dataclass(frozen=True)
class Standing:
    """The score of a recipe at the common budget.

    Args:
        name: The recipe.
        score: The mean over seeds with its interval over seeds, infinite for one seed.
        rise: The rise of this mean over the last quarter of the budget.
    """

    name: str
    score: Estimate
    rise: Estimate

    @property
    def seeds(self) -> int:
        """The number of seeds of the recipe."""
        return self.score.n


@dataclass(frozen=True)
class Difference:
    """The score of ``first`` minus that of ``second`` at the common budget, with Welch's interval over seeds."""

    first: str
    second: str
    estimate: Estimate

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.estimate.low > 0 or self.estimate.high < 0

    @property
    def words(self) -> str:
        """The difference with its interval, or the largest difference that it does not exclude."""
        low, high = self.estimate.low, self.estimate.high
        if not np.isfinite([low, high]).all():
            return f"{self.estimate.mean:+.3f} (no interval: it needs two seeds of each)"
        if self.is_clear:
            return f"{self.estimate.mean:+.3f} ({low:+.3f} to {high:+.3f})"
        return f"not told apart within \N{PLUS-MINUS SIGN}{max(abs(low), abs(high)):.3f}"


@dataclass(frozen=True)
class Standings:
    """Recipes at equal cost, best first.

    Args:
        cost: What is equal.
        budget: How much of it: the most that every run has reached.
        score: The name of the held-out score.
        recipes: The recipes.
        differences: Those of all pairs, the better recipe first.
        curves: The curve of every run, by recipe and seed.
    """

    cost: Cost
    budget: float
    score: str
    recipes: tuple[Standing, ...]
    differences: tuple[Difference, ...]
    curves: Mapping[str, Mapping[int, Curve]]

    def behind(self, name: str) -> Difference | None:
        """The difference between the best recipe and this one; None for the best itself."""
        best = self.recipes[0].name
        return next((d for d in self.differences if (d.first, d.second) == (best, name)), None)

    def as_dict(self) -> dict[str, Any]:
        """Return the standings and differences as JSON types."""
        return {
            "budget": self.budget,
            "score": self.score,
            "recipes": [
                {"name": one.name, "score": one.score.as_dict(), "rise": one.rise.as_dict()} for one in self.recipes
            ],
            "differences": [
                {"first": d.first, "second": d.second, **d.estimate.as_dict(), "words": d.words}
                for d in self.differences
            ],
        }


def read_looks(run: Path) -> list[Look]:
    """Read the evaluations on held-out prompts of a run, in order."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [
        Look(row["nfe"], row["machine"]["seconds"], {name: one["mean"] for name, one in row["held_out"].items()})
        for row in rows
        if row.get("held_out")
    ]


def shared_looks(recipes: Mapping[str, Mapping[int, Path]]) -> dict[str, dict[int, list[Look]]]:
    """Read the evaluations of all runs, by recipe and seed.

    Raises ValueError where a run has none, or was evaluated in another way than the first one.
    """
    looks: dict[str, dict[int, list[Look]]] = {}
    first: tuple[Path, Any] | None = None
    for name, runs in recipes.items():
        for seed, run in runs.items():
            own = looks.setdefault(name, {})[seed] = read_looks(run)
            if not own:
                raise ValueError(
                    f"{run} has no evaluations on held-out prompts: set held_out.every_seconds (or every) for all runs"
                )
            # What held-out scores depend on besides the weights
            config, prompts = (json.loads((run / f"{file}.json").read_text("utf-8")) for file in ("config", "prompts"))
            size = {key: config["held_out"].get(key) for key in ("samples_per_task", "seeds")}
            protocol = size, prompts["held_out"]["suite_hash"], config.get("evaluation") or config["sampling"]
            first = first or (run, protocol)
            if protocol != first[1]:
                raise ValueError(f"{run} was evaluated on other held-out samples than {first[0]}: set held_out alike")
    return looks


def common_score(looks: Mapping[str, Mapping[int, Sequence[Look]]], preferred: str) -> str:
    """Choose the score that stands: ``preferred``, or else the first that all runs have.

    Raises ValueError if the runs have no held-out score in common.
    """
    names = [list(look.scores) for runs in looks.values() for run in runs.values() for look in run]
    common = [name for name in names[0] if all(name in others for others in names)]
    if not common:
        raise ValueError("the runs have no held-out score in common: give each a scorer of the same name in held_out")
    return preferred if preferred in common else common[0]


def standings(looks: Mapping[str, Mapping[int, Sequence[Look]]], cost: Cost, score: str) -> Standings:
    """Compare recipes at the largest cost that every run has reached.

    Args:
        looks: The evaluations of every run by recipe and seed.
        cost: What is equal, NFE or seconds of training.
        score: The held-out score.
    """
    curves = {
        name: {
            seed: Curve(tuple(getattr(look, cost) for look in run), tuple(look.scores[score] for look in run))
            for seed, run in runs.items()
        }
        for name, runs in looks.items()
    }
    budget = min(run.costs[-1] for runs in curves.values() for run in runs.values())
    ends = {name: [run.at(budget) for run in runs.values()] for name, runs in curves.items()}
    rises = {name: [run.at(budget) - run.at(_LATE * budget) for run in runs.values()] for name, runs in curves.items()}
    ordered = sorted(ends, key=lambda name: -mean(ends[name]))
    return Standings(
        cost,
        budget,
        score,
        tuple(Standing(name, _over_seeds(ends[name]), _over_seeds(rises[name])) for name in ordered),
        tuple(Difference(a, b, welch_interval(ends[a], ends[b])) for a, b in combinations(ordered, 2)),
        curves,
    )


def _over_seeds(values: Sequence[float]) -> Estimate:
    return t_interval(values) if len(values) > 1 else Estimate(values[0], -np.inf, np.inf, 1)


def write_standings(path: Path, both: Sequence[Standings]) -> None:
    """Write standings as JSON, by what is equal."""
    write_json(path, without_infinities({one.cost: one.as_dict() for one in both}))
