"""Checks of annotators: who nearly always chooses one side, and how far annotators of the same samples agree."""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import numpy as np
import numpy.typing as npt
import scipy.stats

from genalign.metrics.intervals import Estimate, mean_over_tasks, share, t_interval
from genalign.reward_learning.preferences import OVERALL, Judgment, Kind

Array = npt.NDArray[np.float64]
Level = Literal["nominal", "interval"]

MIN_PAIRS = 20
"""The least number of decided pairs by which an annotator's sides are tested."""

_NEARLY_ALWAYS, _SIGNIFICANCE = 0.9, 1e-3


@dataclass(frozen=True)
class SideChoices:
    """How often an annotator preferred the first sample of a pair.

    Attributes:
        annotator: The name.
        first: The share of the decided pairs whose first sample was preferred, with its exact interval.
        p_value: That of the exact two-sided binomial test against one half.
    """

    annotator: str
    first: Estimate
    p_value: float

    @property
    def one_sided(self) -> bool:
        """Whether nine in ten choices or more, of ``MIN_PAIRS`` at least, are of one side (p < 0.001)."""
        often = max(self.first.mean, 1 - self.first.mean) >= _NEARLY_ALWAYS
        return often and self.first.n >= MIN_PAIRS and self.p_value < _SIGNIFICANCE

    def __str__(self) -> str:
        side, count = ("left", self.first.mean) if self.first.mean >= 0.5 else ("right", 1 - self.first.mean)
        return (
            f"annotator {self.annotator!r} chose the {side} sample in {round(count * self.first.n)} of {self.first.n}"
            f" decided pairs (p = {self.p_value:.1g}): leave these judgments out of training with"
            " exclude_annotators, or shuffle the sides and ask again"
        )


def side_choices(judgments: Sequence[Judgment]) -> list[SideChoices]:
    """Count the sides that each named annotator chose, in all dimensions together.

    A pair counts once, also where its dimensions are in several judgments: by the side that it has in more of them, in
    the order in which its samples were shown; not at all where that is not known. It says something where sides were
    shuffled.
    """
    signs = defaultdict[tuple[str, str, tuple[Path | bytes, ...]], float](float)
    for judgment in map(Judgment.in_shown_order, judgments):
        if judgment.kind == "pair" and judgment.annotator is not None and judgment.shown is not None:
            pair = judgment.annotator, judgment.prompt.text, tuple(sample.content for sample in judgment.samples)
            signs[pair] += sum(float(np.sign(left - right)) for left, right in judgment.scores.values())
    first, decided = Counter[str](), Counter[str]()
    for (name, *_), sign in signs.items():
        decided[name] += sign != 0
        first[name] += sign > 0
    return [
        SideChoices(name, share(first[name], count), float(scipy.stats.binomtest(first[name], count).pvalue))
        for name, count in decided.items()
        if count
    ]


@dataclass(frozen=True)
class Agreement:
    """How far annotators agree about the same samples, in one dimension and kind of judgment.

    Attributes:
        kind: The kind of the judgments.
        annotators: The names of those who judged what another judged, too.
        judged: The number of samples, or pairs of samples, that two or more annotators judged.
        raw: The share of two annotators' judgments that are equal, over these, with its interval over prompts.
        alpha: Krippendorff's alpha, with its jackknife interval over prompts: 1 for full agreement, 0 for that of
            chance; NaN where all judgments are equal, so chance would agree as well.
    """

    kind: Kind
    annotators: tuple[str, ...]
    judged: int
    raw: Estimate
    alpha: Estimate


def agreement(judgments: Sequence[Judgment], dimension: str = OVERALL) -> list[Agreement]:
    """Measure the agreement of named annotators, for each kind of judgment that two annotators gave of the same.

    Pairs and all pairs of a ranking are compared by who wins, or a tie; labels by equality; ratings by equality, and
    in alpha by squared differences. Who judged the same twice is counted by the last judgment.
    """
    results = []
    for kind, table in _answers_by_kind(judgments, dimension).items():
        shared = {unit: values for unit, values in table.items() if len(values) > 1}
        if not shared:
            continue
        by_prompt: dict[object, list[list[float]]] = {}
        for (prompt, *_), values in shared.items():
            by_prompt.setdefault(prompt, []).append(list(values.values()))
        names = tuple(dict.fromkeys(name for values in shared.values() for name in values))
        equal = [
            [float(np.mean([a == b for a, b in itertools.combinations(values, 2)])) for values in units]
            for units in by_prompt.values()
        ]
        raw = [float(np.mean(shares)) for shares in equal]
        level: Level = "interval" if kind == "rating" else "nominal"
        alpha = _jackknife(list(by_prompt.values()), level)
        results.append(Agreement(kind, names, len(shared), mean_over_tasks({"": raw}, "share"), alpha))
    return results


def krippendorff_alpha(units: Sequence[Sequence[float]], level: Level) -> float:
    """Compute Krippendorff's alpha, 1 - observed / expected disagreement (Computing Krippendorff's Alpha, 2011).

    Args:
        units: The values that annotators gave each unit; a unit with fewer than two says nothing.
        level: "nominal" counts unequal values, "interval" their squared differences.

    Returns:
        Alpha; NaN where no unit has two values, or all values are equal.
    """
    table = _Disagreements.of([units], level)
    return float(table.alphas(table.observed, table.counts)[0])


@dataclass(frozen=True)
class _Disagreements:
    """What alpha is computed from, for P groups of units with C different values.

    Attributes:
        observed: The disagreement within units (P), over all ordered pairs of a unit's values, each divided by one less
            than their number.
        counts: How often each value occurs (P, C) in units with two or more.
        distances: The disagreement (C, C) of two values.
    """

    observed: Array
    counts: Array
    distances: Array

    @classmethod
    def of(cls, groups: Sequence[Sequence[Sequence[float]]], level: Level) -> Self:
        shared = [[values for values in units if len(values) > 1] for units in groups]
        categories = sorted({value for units in shared for values in units for value in values})
        places = {value: place for place, value in enumerate(categories)}
        scale = np.asarray(categories, float)
        differences = scale[:, None] - scale[None, :]
        distances = differences**2 if level == "interval" else (differences != 0).astype(float)
        observed, counts = np.zeros(len(shared)), np.zeros((len(shared), len(scale)))
        for row, units in enumerate(shared):
            for values in units:
                own = np.bincount([places[value] for value in values], minlength=len(scale)).astype(float)
                observed[row] += own @ distances @ own / (len(values) - 1)
                counts[row] += own
        return cls(observed, counts, distances)

    def alphas(self, observed: Array, counts: Array) -> Array:
        """Compute alpha (N) from disagreements (N) and counts (N, C); NaN where nothing is expected to disagree."""
        totals = counts.sum(-1)
        expected = np.einsum("nc,ck,nk->n", counts, self.distances, counts)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(expected > 0, 1 - observed * (totals - 1) / expected, np.nan)


def judged_units(judgment: Judgment, dimension: str) -> list[tuple[tuple[object, ...], float]]:
    """List by what annotators are compared: pairs of samples, with the sign of who wins, or samples, with their grade.

    A unit has the prompt's text first; the two of a pair are in an order that does not depend on the judgment.
    """
    names = [str(one.content) if isinstance(one.content, Path) else one.digest() for one in judgment.samples]
    rows = list(zip(names, judgment.scores[dimension], strict=True))
    if judgment.kind in ("rating", "label"):
        return [((judgment.prompt.text, name), value) for name, value in rows]
    return [
        ((judgment.prompt.text, one, other), float(np.sign(a - b)))
        for (one, a), (other, b) in itertools.combinations(sorted(rows), 2)
    ]


def _answers_by_kind(
    judgments: Sequence[Judgment], dimension: str
) -> dict[Kind, dict[tuple[object, ...], dict[str, float]]]:
    """Collect the last answer of each annotator to each unit, by the kind of judgment; a ranking is all its pairs."""
    tables: dict[Kind, dict[tuple[object, ...], dict[str, float]]] = {}
    for judgment in judgments:
        if judgment.annotator is not None and dimension in judgment.scores:
            kind: Kind = "pair" if judgment.kind == "ranking" else judgment.kind
            for unit, value in judged_units(judgment, dimension):
                tables.setdefault(kind, {}).setdefault(unit, {})[judgment.annotator] = value
    return tables


def _jackknife(prompts: Sequence[Sequence[Sequence[float]]], level: Level) -> Estimate:
    """Estimate alpha, with the interval of Student's of its jackknife pseudo-values over prompts (Tukey 1958)."""
    table, count = _Disagreements.of(prompts, level), len(prompts)
    observed, counts = table.observed.sum(0, keepdims=True), table.counts.sum(0, keepdims=True)
    whole = float(table.alphas(observed, counts)[0])
    pseudo = count * whole - (count - 1) * table.alphas(observed - table.observed, counts - table.counts)
    if count < 2 or not np.isfinite(pseudo).all():
        return Estimate(whole, -math.inf, math.inf, count)
    reach = t_interval(pseudo.tolist())
    return Estimate(whole, whole - (reach.mean - reach.low), whole + (reach.high - reach.mean), count)
