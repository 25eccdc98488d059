"""The measures of a reward, or of a judge of pairs, on judgments: accuracy, calibration, positions and annotators."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genalign.metrics.intervals import Estimate, mean_over_tasks
from genalign.reward_learning.examples import Examples, Item, prompt_numbers
from genalign.reward_learning.judged_pairs import EvaluatedPairs, annotator_votes, judged_pairs, wins_over_several
from genalign.reward_learning.measures import UnmeasurableError, prompt_means
from genalign.reward_learning.pair_measures import (
    PreferenceCalibration,
    Votes,
    annotator_agreement,
    calibration,
    credit,
    margin_bins,
    pair_accuracy,
    position_bias,
    winner_accuracy,
)
from genalign.reward_learning.preferences import OVERALL, Judgment
from genalign.reward_learning.reward_report import EvaluationOptions, RewardEvaluation
from genalign.runtime.files import without_infinities

_MARGINS = 4  # bins of pairs by their margin
_ONE_SIDED = 5  # pairs from which an annotator who always prefers one side is named


@dataclass(frozen=True)
class PairPredictions:
    """What a reward, or a judge of pairs, says of pairs of items.

    Attributes:
        scores: The scores (n,) of the items, of a reward.
        differences: The logits of a judge's preferences, by the items of a pair.
    """

    scores: Tensor | None
    differences: Mapping[tuple[int, int], float]

    def of(self, rows: Tensor) -> Tensor:
        """Return the differences (N,) of pairs (N, 2) of items; NaN where a score is missing."""
        if self.scores is not None:
            return self.scores[rows[:, 0]] - self.scores[rows[:, 1]]
        return torch.tensor([self.differences[a, b] for a, b in rows.tolist()], dtype=torch.float64)


def measure_judgments(
    report: RewardEvaluation,
    data: Examples,
    predictions: PairPredictions,
    judgments: Sequence[Judgment],
    trained_on: frozenset[str] | None,
    options: EvaluationOptions,
) -> EvaluatedPairs:
    """Measure the predictions of judgments, and return the pairs of the main dimension."""
    main = main_dimension(data, options)
    prompt, seen = prompt_numbers(data.items), items_seen(data.items, trained_on)
    pairs = judged_pairs(data, main)
    report.counts |= {"judgments": len(judgments), "prompts": int(prompt.max()) + 1}
    difference = measure_pairs(report, data.items, pairs, predictions.of(pairs.rows), seen, options)
    if len(data.dimensions) > 1:
        for dimension in data.dimensions:
            own = judged_pairs(data, dimension)
            unseen = of_unseen(predictions.of(own.rows), own, seen)
            _add_accuracy(report, "accuracy by dimension", dimension, unseen, own, prompt)
    if wins := wins_over_several(pairs, prompt):
        with report.attempt("one sample against several"):
            winners = winner_accuracy(difference, pairs.preferred, prompt[pairs.rows[:, 0]], wins)
            counted = f"{winners.winners} winners, {winners.by_chance:.3f} by chance"
            report.add("one against several", "winner above all others", winners.accuracy, True, counted)
    _measure_sides(report, judgments, main)
    _measure_agreement(report, annotator_votes(data, main, pairs), difference, prompt[pairs.rows[:, 0]])
    return pairs


def main_dimension(data: Examples, options: EvaluationOptions) -> str:
    """Return the dimension that all but the accuracy by dimension is about. Raises ValueError if no judgment has it."""
    main = options.dimension or (OVERALL if OVERALL in data.dimensions else data.dimensions[0])
    if main not in data.dimensions:
        raise ValueError(f"no judgment has the dimension {main!r}: there are {', '.join(data.dimensions)}")
    return main


def items_seen(items: Sequence[Item], trained_on: frozenset[str] | None) -> Tensor | None:
    """Say which items (n,) the reward was trained on, by the digests of their files; None where nothing is known."""
    return None if trained_on is None else torch.tensor([item.digest in trained_on for item in items], dtype=torch.bool)


def of_unseen(difference: Tensor, pairs: EvaluatedPairs, seen: Tensor | None) -> Tensor:
    """Return the differences (N,) of pairs, NaN for those with an item that was trained on, unless all of them are."""
    trained_on = torch.zeros(len(pairs), dtype=torch.bool) if seen is None else seen[pairs.rows].any(1)
    return difference if bool(trained_on.all()) else difference.masked_fill(trained_on, torch.nan)


def _add_accuracy(
    report: RewardEvaluation,
    section: str,
    name: str,
    difference: Tensor,
    pairs: EvaluatedPairs,
    prompt: Tensor,
    rows: Tensor | None = None,
) -> None:
    """Add the accuracy on pairs without ties, on all of them or on some ``rows``; ``prompt`` (n,) is of the items."""
    index = torch.arange(len(pairs)) if rows is None else rows
    with report.attempt(f"{section}, {name}"):
        of_pairs = prompt[pairs.rows[index, 0]]
        result = pair_accuracy(difference[index], pairs.preferred[index], of_pairs)
        if result.accuracy is None:
            raise UnmeasurableError("all of its pairs are ties")
        report.add(section, name, result.accuracy, True, f"{result.pairs - result.ties} pairs")


def measure_pairs(
    report: RewardEvaluation,
    items: Sequence[Item],
    pairs: EvaluatedPairs,
    difference: Tensor,
    seen: Tensor | None,
    options: EvaluationOptions,
) -> Tensor:
    """Measure accuracy and calibration on the pairs of one dimension, and record every pair.

    Pairs with an item that was trained on count nowhere but in the section "training data", unless all pairs have one.
    Returns the differences (N,) that count, NaN for the others.
    """
    prompt, every = prompt_numbers(items), difference
    of_pairs = prompt[pairs.rows[:, 0]]
    missing = int(difference.isnan().sum())
    report.counts |= {"pairs": len(pairs), "pairs without a score": missing}
    if missing:
        report.notes.append(f"{missing} of {len(pairs)} pairs have no score and are left out")
    _measure_seen(report, pairs, every, seen, prompt)
    difference = of_unseen(every, pairs, seen)
    with report.attempt("accuracy"):
        result = pair_accuracy(difference, pairs.preferred, of_pairs)
        report.counts |= {"ties": result.ties, "ties of the reward": result.reward_ties}
        if result.accuracy:
            counted = f"{result.pairs - result.ties} pairs, {result.share_of_pairs:.3f} of all pairs"
            report.add("accuracy", "without ties", result.accuracy, True, counted)
        report.add("accuracy", "with ties as half", result.with_ties, True, f"{result.pairs} pairs")
    for low, high, rows in margin_bins(pairs.margin, _MARGINS):
        name = f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
        _add_accuracy(report, "accuracy by margin", name, difference, pairs, prompt, rows)
    subsets, generators = _by_subset_and_generators(items, pairs)
    for section, groups in (("accuracy by subset", subsets), ("accuracy by generators", generators)):
        for name, rows in sorted(groups.items()):
            _add_accuracy(report, section, name, difference, pairs, prompt, rows)
    if len(subsets) > 1:
        _add_mean_over_subsets(report, subsets, difference, pairs, of_pairs)
    with report.attempt("calibration"):
        result_of = calibration(difference, pairs.preferred, of_pairs, options.scale, options.bins, options.seed)
        _add_calibration(report, result_of, options.scale)
    report.pairs = [_record(items, pairs, every, seen, place) for place in range(len(pairs))]
    return difference


def _add_calibration(report: RewardEvaluation, result: PreferenceCalibration, used: float) -> None:
    """Add the errors of the probabilities by the scale that was used, and the scale and temperature that fit."""
    report.bins = result.bins
    chance = f"{result.ece_if_calibrated:.3f} if it were calibrated"
    report.add("calibration", "expected calibration error", result.ece, False, chance)
    report.add("calibration", "Brier score", result.brier)
    report.add("calibration", "log loss", result.log_loss, False, "a coin has 0.693")
    scale = result.fitted_scale
    fitted = f"log loss {result.fitted_log_loss:.3f} with it, scale {used:g} was used"
    report.add("calibration", "scale that fits", scale, False, fitted)
    if scale.mean == 0:
        report.notes.append("no scale above 0 fits: the scores say no more than a coin about these preferences")
    mean, low, high = (used / value if value > 0 else torch.inf for value in (scale.mean, scale.high, scale.low))
    report.add("calibration", "temperature that fits", Estimate(mean, low, high, scale.n))


def _by_subset_and_generators(
    items: Sequence[Item], pairs: EvaluatedPairs
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Group the rows of pairs by the "subset" of their prompt's metadata, and by their generators where known."""
    subsets, generators = defaultdict[str, list[int]](list), defaultdict[str, list[int]](list)
    for place, (first, second) in enumerate(pairs.rows.tolist()):
        if subset := (items[first].prompt.metadata or {}).get("subset"):
            subsets[str(subset)].append(place)
        names = items[first].sample.generator, items[second].sample.generator
        if names[0] and names[1]:
            generators[" and ".join(sorted(filter(None, names)))].append(place)
    by_subset, by_generators = (
        {name: torch.tensor(rows) for name, rows in groups.items()} for groups in (subsets, generators)
    )
    return by_subset, by_generators


def _add_mean_over_subsets(
    report: RewardEvaluation,
    subsets: Mapping[str, Tensor],
    difference: Tensor,
    pairs: EvaluatedPairs,
    prompt: Tensor,
) -> None:
    """Add the unweighted mean of the accuracies of the subsets, as RewardBench averages them."""
    right = credit(difference, pairs.preferred).masked_fill(pairs.preferred == 0.5, torch.nan)
    scored = {name: rows for name, rows in subsets.items() if not bool(right[rows].isnan().all())}
    if scored:
        shares = {name: prompt_means(right[rows], prompt[rows]) for name, rows in scored.items()}
        report.add("accuracy by subset", "mean over subsets", mean_over_tasks(shares, "share"), True)


def _measure_seen(
    report: RewardEvaluation, pairs: EvaluatedPairs, difference: Tensor, seen: Tensor | None, prompt: Tensor
) -> None:
    """Report the accuracy on pairs with an item that the reward was trained on, and how many there are."""
    if seen is None:
        report.notes.append("it is not known whether the reward was trained on these items: there is no list of them")
        return
    pair_seen = seen[pairs.rows].any(1)
    report.counts |= {"items trained on": int(seen.sum()), "pairs trained on": int(pair_seen.sum())}
    count = int(pair_seen.sum())
    note = (
        f"the reward was trained on {int(seen.sum())} of the {len(seen)} samples, by the hash of their files, which are"
        f" in {count} of the {len(pairs)} pairs"
    )
    if count:
        if count == len(pairs):
            note += ": all measures are of training data, collect other pairs"
        else:
            note += ": these pairs count only in the section training data"
        rows = pair_seen.nonzero()[:, 0]
        _add_accuracy(report, "training data", "pairs that were trained on", difference, pairs, prompt, rows)
    report.notes.append(note)


def _record(
    items: Sequence[Item], pairs: EvaluatedPairs, difference: Tensor, seen: Tensor | None, place: int
) -> dict[str, Any]:
    """Describe a pair and what was predicted as JSON types."""
    two = [items[row] for row in pairs.rows[place].tolist()]
    contents = [item.sample.content for item in two]
    record: dict[str, Any] = {
        "prompt": two[0].prompt.text,
        "digests": [item.digest for item in two],
        "files": [str(content) if isinstance(content, Path) else None for content in contents],
        "generators": [item.sample.generator for item in two],
        "preferred": float(pairs.preferred[place]),
        "margin": float(pairs.margin[place]),
        "difference": float(difference[place]),
        "credit": float(credit(difference[place], pairs.preferred[place])),
    }
    if seen is not None:
        record["trained_on"] = bool(seen[pairs.rows[place]].any())
    plain: dict[str, Any] = without_infinities(record)
    return plain


def _measure_sides(report: RewardEvaluation, judgments: Sequence[Judgment], dimension: str) -> None:
    """Measure how far annotators prefer the sample that was shown first, where the order is known.

    Data that name no annotator say nothing of the order either, unless they list it.
    """
    ordered = [one for one in judgments if one.kind in ("pair", "ranking") and dimension in one.scores]
    ordered = [one for one in ordered if one.shown or (one.annotator is not None and one.shown is not None)]
    numbers: dict[str, int] = {}
    by_name = defaultdict[str, list[tuple[float, int]]](list)
    for judgment in map(Judgment.in_shown_order, ordered):
        number = numbers.setdefault(judgment.prompt.text, len(numbers))
        for left, right in combinations(judgment.scores[dimension], 2):
            share = left if judgment.kind == "pair" else (1.0 + (left > right) - (left < right)) / 2
            for name in dict.fromkeys(("", judgment.annotator or "")):
                by_name[name].append((share, number))
    for name, choices in by_name.items():
        first, prompt = torch.tensor(choices, dtype=torch.float64).unbind(1)
        value = position_bias(first, prompt)
        label = f"annotator {name}" if name else "all annotators"
        report.add("position bias", label, value, True, f"{len(choices)} pairs")
        if name and len(choices) >= _ONE_SIDED and abs(value.mean) == 0.5:
            side = "first" if value.mean > 0 else "second"
            report.notes.append(f"annotator {name} preferred the {side} sample in all {len(choices)} pairs")


def _measure_agreement(report: RewardEvaluation, votes: Votes, difference: Tensor, prompt: Tensor) -> None:
    """Measure the agreement of the annotators with the reward and with each other; ``prompt`` (N,) is of the pairs."""
    if not votes.annotators:
        return
    with report.attempt("agreement with annotators"):
        for name, one in annotator_agreement(votes, difference, prompt).items():
            section, label = "agreement with annotators", f"annotator {name}" if name else "annotators"
            report.add(section, f"reward with {label}", one.with_reward, True, f"{one.pairs} pairs")
            if one.with_others and one.reward_with_others:
                majority = f"the others' majority{'' if name else ', each left out in turn'}"
                report.add(section, f"{label} with {majority}", one.with_others, True)
                own = f"reward with that majority{f' (without {name})' if name else ''}"
                report.add(section, own, one.reward_with_others, True)
