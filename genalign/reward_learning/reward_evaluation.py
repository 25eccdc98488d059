"""All measures of one reward, or of one judge of pairs, on preference data and on several samples of each prompt."""

from __future__ import annotations

import contextlib
import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genalign.diffusion.noise import derived_seed
from genalign.metrics.intervals import Estimate, clustered_share, mean_over_tasks
from genalign.reward_learning.examples import Examples, Item, examples
from genalign.reward_learning.item_scores import ItemScorer
from genalign.reward_learning.judged_pairs import (
    EvaluatedPairs,
    annotator_votes,
    item_grades,
    item_prompts,
    judged_pairs,
    pairs_of_values,
    win_shares,
)
from genalign.reward_learning.measures import (
    BestOfNCurve,
    UnmeasurableError,
    best_of_n,
    nuisance_report,
    prompt_means,
    rank_agreement,
    starc_distance,
)
from genalign.reward_learning.pair_measures import (
    CalibrationBin,
    annotator_agreement,
    calibration,
    credit,
    margin_bins,
    order_consistency,
    pair_accuracy,
    position_bias,
)
from genalign.reward_learning.perturbations import PERTURBATIONS
from genalign.reward_learning.preferences import OVERALL, Judgment
from genalign.runtime.files import without_infinities
from genalign.runtime.media import medium_of
from genalign.scoring.judge_orders import both_orders
from genalign.scoring.score import NamedReward
from genalign.types import PairwiseReward

_MARGINS = 4  # bins of pairs by their margin
_ONE_SIDED = 5  # pairs from which an annotator who always prefers one side is named
_CERTAIN = 1e-6  # least distance of a judge's preference from 0 and 1 in its logit


@dataclass(frozen=True)
class EvaluationOptions:
    """What is measured of a reward.

    Args:
        dimension: The dimension of the judgments that all but the accuracy by dimension is about; None takes
            "overall", or else the first.
        scale: What turns differences of scores into logits of a preference.
        bins: Number of bins of the calibration error.
        best_of: The largest n of best-of-n; None takes the median number of samples of a prompt.
        robustness: Number of pairs whose samples are perturbed; 0 for none.
        seed: Seed of the perturbations and of the bootstrap.
    """

    dimension: str | None = None
    scale: float = 1.0
    bins: int = 10
    best_of: int | None = None
    robustness: int = 64
    seed: int = 0


@dataclass(frozen=True)
class RewardMeasure:
    """A measure of a reward with its interval over prompts.

    Attributes:
        section: What it is about, such as "accuracy by subset".
        name: Its name in the section.
        value: The estimate; its n counts prompts.
        is_share: Whether it is a share, or a difference of two.
        counted: What it is of, such as "120 pairs".
    """

    section: str
    name: str
    value: Estimate
    is_share: bool = False
    counted: str = ""


@dataclass
class RewardEvaluation:
    """The measures of a reward.

    Attributes:
        measures: The measures, in the order of their sections.
        best_of_n: The truth of the best of n, if there is a truth and several samples of a prompt.
        bins: The bins of the calibration.
        counts: How many judgments, pairs, items and prompts there are, and how many could not be scored.
        notes: What was left out and what should be known, in sentences.
        pairs: A record of every pair, as JSON types.
    """

    measures: list[RewardMeasure] = field(default_factory=list)
    best_of_n: BestOfNCurve | None = None
    bins: tuple[CalibrationBin, ...] = ()
    counts: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    pairs: list[dict[str, Any]] = field(default_factory=list)

    def add(self, section: str, name: str, value: Estimate, is_share: bool = False, counted: str = "") -> None:
        """Add a measure."""
        self.measures.append(RewardMeasure(section, name, value, is_share, counted))

    def sections(self) -> dict[str, list[RewardMeasure]]:
        """Group the measures by section, in order of first appearance."""
        sections = dict[str, list[RewardMeasure]]()
        for one in self.measures:
            sections.setdefault(one.section, []).append(one)
        return sections

    @contextlib.contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Note the reason where the data do not allow what is measured inside the context."""
        try:
            yield
        except UnmeasurableError as error:
            self.notes.append(f"{what} is not measured: {error}")

    def as_dict(self) -> dict[str, Any]:
        """Convert to JSON types, with null for what is not finite; without the pairs."""
        curve = self.best_of_n
        points = zip(curve.kl, curve.truth, curve.gain, curve.scores, strict=True) if curve else ()
        content: dict[str, Any] = {
            "measures": {
                f"{one.section}/{one.name}": one.value.as_dict() | ({"of": one.counted} if one.counted else {})
                for one in self.measures
            },
            "best_of_n": [
                {"n": n, "kl": kl, "truth": truth.as_dict(), "gain": gain.as_dict(), "score": score.as_dict()}
                for n, (kl, truth, gain, score) in enumerate(points, start=1)
            ],
            "calibration_bins": [
                {"confidence": one.confidence, "accuracy": one.accuracy.as_dict(), "pairs": one.pairs}
                for one in self.bins
            ],
            "counts": self.counts,
            "notes": self.notes,
        }
        plain: dict[str, Any] = without_infinities(content)
        return plain


@dataclass(frozen=True)
class _Predictions:
    """What a reward or judge says of pairs of items.

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


def evaluate_reward(
    scorer: ItemScorer,
    reward: NamedReward,
    judgments: Sequence[Judgment] = (),
    samples: Sequence[Item] = (),
    truth: NamedReward | None = None,
    others: Sequence[NamedReward] = (),
    trained_on: frozenset[str] | None = None,
    options: EvaluationOptions | None = None,
) -> RewardEvaluation:
    """Measure a reward on judgments, on several samples of each prompt, or on both.

    Args:
        scorer: Scores items.
        reward: The reward.
        judgments: Judgments with scores; without any, the pairs of ``samples`` by their truth are judged.
        samples: Samples, several of each prompt; without any, those of the judgments.
        truth: What the samples are worth; without it, the ratings or complete rankings of the judgments.
        others: Other rewards, whose distances are measured.
        trained_on: The digests of the items that the reward was trained on; None if they are not known.
        options: What is measured.

    Returns:
        The measures, and why others are missing.

    Raises:
        ValueError: There are neither judgments nor samples, or a judgment cannot be used.
        RewardError: A reward scores nothing.
    """
    options = options or EvaluationOptions()
    report = RewardEvaluation()
    data = examples(judgments) if judgments else None
    groups = tuple(samples) or (data.items if data else ())
    if not groups:
        raise ValueError("there is nothing to measure a reward on: give preferences, or samples with a truth")
    group_scores = scorer.scores(reward, groups)
    worth, what = _truth(scorer, groups, None if samples else data, truth, options)
    if data:
        scores = scorer.scores(reward, data.items) if samples else group_scores
        pairs = _measure_judgments(report, data, _Predictions(scores, {}), judgments, trained_on, options)
        _measure_robustness(report, scorer, reward, data.items, scores, pairs, options)
    elif worth is not None:
        pairs = pairs_of_values(worth, item_prompts(groups))
        predictions, seen = _Predictions(group_scores, {}), _seen(groups, trained_on)
        _measure_pairs(report, groups, pairs, predictions.of(pairs.rows), seen, options)
        _measure_robustness(report, scorer, reward, groups, group_scores, pairs, options)
    report.counts |= {"samples": len(groups), "samples without a score": int(group_scores.isnan().sum())}
    _measure_groups(report, groups, group_scores, worth, what, options)
    _measure_nuisances(report, scorer, groups, group_scores, worth)
    rewards = {reward.name: group_scores} | ({} if worth is None else {what: worth})
    rewards |= {other.name: scorer.scores(other, groups) for other in others}
    for (first, left), (second, right) in itertools.combinations(rewards.items(), 2):
        with report.attempt(f"the STARC distance of {first} and {second}"):
            distance = starc_distance(left, right, item_prompts(groups))
            report.add("STARC distance", f"{first} and {second}", distance)
    return report


def evaluate_judge(
    scorer: ItemScorer,
    judge: PairwiseReward,
    name: str,
    judgments: Sequence[Judgment],
    trained_on: frozenset[str] | None = None,
    options: EvaluationOptions | None = None,
) -> RewardEvaluation:
    """Measure a judge of pairs on judgments, each pair in both orders.

    A preference for the same sample in both orders counts by its mean; otherwise the pair is a tie. What is measured of
    single samples (best of n, ranks, distances, nuisances, robustness) needs a reward of single samples, such as
    ``rewards.pairwise.WinRateReward``, and is left out.

    Args:
        scorer: Reads samples and asks the judge.
        judge: Preferences of two batches.
        name: The name of the judge.
        judgments: Judgments with scores.
        trained_on: The digests of the items that the judge was trained on; None if they are not known.
        options: What is measured.

    Raises:
        ValueError: A judgment cannot be used, or the samples of a pair differ in shape.
        RewardError: The judge decides nothing.
    """
    options = options or EvaluationOptions()
    report, data = RewardEvaluation(), examples(judgments)
    every = [judged_pairs(data, dimension).rows for dimension in data.dimensions]
    rows = torch.unique(torch.cat(every), dim=0)
    first, second = (scorer.preferences(judge, name, data.items, rows, reverse) for reverse in (False, True))
    preferred, consistency = both_orders(first, second)
    logits = torch.logit(preferred.double(), eps=_CERTAIN).tolist()
    known = {(a, b): logit for (a, b), logit in zip(rows.tolist(), logits, strict=True)}
    prompt = item_prompts(data.items)[rows[:, 0]]
    counted = f"{consistency.pairs} pairs"
    with report.attempt("position bias"):
        shown_first = torch.stack([first, second]).mean(0)
        report.add("position bias", "judge", position_bias(shown_first, prompt), True, counted)
        same = order_consistency(first, second, prompt)
        report.add("position bias", "same sample in both orders", same, True, counted)
    _measure_judgments(report, data, _Predictions(None, known), judgments, trained_on, options)
    report.notes.append("a judge of pairs has no scores: best of n, ranks, distances, nuisances, robustness left out")
    return report


# Pairs


def _measure_judgments(
    report: RewardEvaluation,
    data: Examples,
    predictions: _Predictions,
    judgments: Sequence[Judgment],
    trained_on: frozenset[str] | None,
    options: EvaluationOptions,
) -> EvaluatedPairs:
    """Measure the predictions of judgments, and return the pairs of the main dimension."""
    main = options.dimension or (OVERALL if OVERALL in data.dimensions else data.dimensions[0])
    if main not in data.dimensions:
        raise ValueError(f"no judgment has the dimension {main!r}: there are {', '.join(data.dimensions)}")
    prompt, seen = item_prompts(data.items), _seen(data.items, trained_on)
    pairs = judged_pairs(data, main)
    difference = predictions.of(pairs.rows)
    report.counts |= {"judgments": len(judgments), "prompts": int(prompt.max()) + 1}
    _measure_pairs(report, data.items, pairs, difference, seen, options)
    if len(data.dimensions) > 1:
        for dimension in data.dimensions:
            own = judged_pairs(data, dimension)
            _add_accuracy(report, "accuracy by dimension", dimension, predictions.of(own.rows), own, prompt)
    _measure_annotators(report, data, main, pairs, difference)
    return pairs


def _seen(items: Sequence[Item], trained_on: frozenset[str] | None) -> Tensor | None:
    """Say which items (n,) the reward was trained on, by the digests of their files; None where nothing is known."""
    return None if trained_on is None else torch.tensor([item.digest in trained_on for item in items], dtype=torch.bool)


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


def _measure_pairs(
    report: RewardEvaluation,
    items: Sequence[Item],
    pairs: EvaluatedPairs,
    difference: Tensor,
    seen: Tensor | None,
    options: EvaluationOptions,
) -> None:
    """Measure accuracy and calibration on the pairs of one dimension, and record every pair."""
    prompt = item_prompts(items)
    of_pairs = prompt[pairs.rows[:, 0]]
    missing = int(difference.isnan().sum())
    report.counts |= {"pairs": len(pairs), "pairs without a score": missing}
    if missing:
        report.notes.append(f"{missing} of {len(pairs)} pairs have no score and are left out")
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
    subsets, generators = _by_subset(items, pairs), _by_generators(items, pairs)
    for section, groups in (("accuracy by subset", subsets), ("accuracy by generators", generators)):
        for name, rows in sorted(groups.items()):
            _add_accuracy(report, section, name, difference, pairs, prompt, rows)
    if len(subsets) > 1:
        _add_mean_over_subsets(report, subsets, difference, pairs, of_pairs)
    _measure_seen(report, pairs, difference, seen, prompt)
    with report.attempt("calibration"):
        result_of = calibration(difference, pairs.preferred, of_pairs, options.scale, options.bins, options.seed)
        report.bins = result_of.bins
        chance = f"{result_of.ece_if_calibrated:.3f} if it were calibrated"
        report.add("calibration", "expected calibration error", result_of.ece, False, chance)
        report.add("calibration", "Brier score", result_of.brier)
        report.add("calibration", "log loss", result_of.log_loss, False, "a coin has 0.693")
        fitted = f"log loss {result_of.fitted_log_loss:.3f} with it, scale {options.scale:g} was used"
        report.add("calibration", "scale that fits", result_of.fitted_scale, False, fitted)
        if result_of.fitted_scale.mean == 0:
            report.notes.append("no scale above 0 fits: the scores say no more than a coin about these preferences")
        report.add("calibration", "temperature that fits", _temperature(result_of.fitted_scale, options.scale))
    report.pairs = [_record(items, pairs, difference, seen, place) for place in range(len(pairs))]


def _temperature(scale: Estimate, used: float) -> Estimate:
    """Divide the scale that was used by the one that fits."""
    mean, low, high = (used / value if value > 0 else torch.inf for value in (scale.mean, scale.high, scale.low))
    return Estimate(mean, low, high, scale.n)


def _by_subset(items: Sequence[Item], pairs: EvaluatedPairs) -> dict[str, Tensor]:
    """Group the rows of pairs by the "subset" of their prompt's metadata."""
    groups = defaultdict[str, list[int]](list)
    for place, row in enumerate(pairs.rows[:, 0].tolist()):
        if subset := (items[row].prompt.metadata or {}).get("subset"):
            groups[str(subset)].append(place)
    return {name: torch.tensor(rows) for name, rows in groups.items()}


def _by_generators(items: Sequence[Item], pairs: EvaluatedPairs) -> dict[str, Tensor]:
    """Group the rows of pairs by the generators of their samples, where both are known."""
    groups = defaultdict[str, list[int]](list)
    for place, (first, second) in enumerate(pairs.rows.tolist()):
        names = items[first].sample.generator, items[second].sample.generator
        if names[0] and names[1]:
            groups[" and ".join(sorted(filter(None, names)))].append(place)
    return {name: torch.tensor(rows) for name, rows in groups.items()}


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
    """Report pairs with an item that the reward was trained on apart from the others."""
    if seen is None:
        report.notes.append("it is not known whether the reward was trained on these items: there is no list of them")
        return
    pair_seen = seen[pairs.rows].any(1)
    report.counts |= {"items trained on": int(seen.sum()), "pairs trained on": int(pair_seen.sum())}
    report.notes.append(
        f"the reward was trained on {int(seen.sum())} of the {len(seen)} items, by the hash of their files, which are"
        f" in {int(pair_seen.sum())} of the {len(pairs)} pairs"
    )
    if bool(pair_seen.any()):
        for name, rows in (("trained on", pair_seen), ("not trained on", ~pair_seen)):
            _add_accuracy(report, "training data", name, difference, pairs, prompt, rows.nonzero()[:, 0])


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


def _measure_annotators(
    report: RewardEvaluation, data: Examples, dimension: str, pairs: EvaluatedPairs, difference: Tensor
) -> None:
    """Measure the position bias of the annotators, and their agreement with the reward and with each other."""
    prompt = item_prompts(data.items)
    column = data.dimensions.index(dimension)
    shown = data.pairs.preferred[:, column].masked_fill(data.pairs.difference[:, column].isnan(), torch.nan)
    if not bool(shown.isnan().all()):
        names = ["", *dict.fromkeys(filter(None, data.pairs.annotators))]
        for name in names:
            own = torch.tensor([name in ("", annotator) for annotator in data.pairs.annotators]) & ~shown.isnan()
            if not bool(own.any()):
                continue
            value = position_bias(shown[own], prompt[data.pairs.rows[own, 0]])
            label = f"annotator {name}" if name else "all annotators"
            report.add("position bias", label, value, True, f"{int(own.sum())} pairs")
            if name and int(own.sum()) >= _ONE_SIDED and abs(value.mean) == 0.5:
                side = "first" if value.mean > 0 else "second"
                report.notes.append(f"annotator {name} preferred the {side} sample in all {int(own.sum())} pairs")
    votes = annotator_votes(data, dimension, pairs)
    if not votes.annotators:
        return
    with report.attempt("agreement with annotators"):
        agreement = annotator_agreement(votes, difference, prompt[pairs.rows[:, 0]])
        for name, one in agreement.items():
            section, label = "agreement with annotators", f"annotator {name}" if name else "annotators"
            report.add(section, f"reward with {label}", one.with_reward, True, f"{one.pairs} pairs")
            if one.with_others and one.reward_with_others:
                majority = f"the others' majority{'' if name else ', each left out in turn'}"
                report.add(section, f"{label} with {majority}", one.with_others, True)
                report.add(
                    section,
                    f"reward with that majority{f' (without {name})' if name else ''}",
                    one.reward_with_others,
                    True,
                )


# Several samples of each prompt


def _truth(
    scorer: ItemScorer,
    items: Sequence[Item],
    data: Examples | None,
    truth: NamedReward | None,
    options: EvaluationOptions,
) -> tuple[Tensor | None, str]:
    """What the items are worth (n,), and its name: another reward, ratings, or complete rankings."""
    if truth is not None:
        return scorer.scores(truth, items), truth.name
    if data is None:
        return None, ""
    main = options.dimension or (OVERALL if OVERALL in data.dimensions else data.dimensions[0])
    if main not in data.dimensions:
        return None, ""
    grades = item_grades(data, main)
    if not bool(grades.isnan().all()):
        return grades, "ratings"
    pairs = judged_pairs(data, main)
    shares = win_shares(pairs, item_prompts(items)) if len(pairs) else grades
    return (None, "") if bool(shares.isnan().all()) else (shares, "rankings")


def _measure_groups(
    report: RewardEvaluation,
    items: Sequence[Item],
    scores: Tensor,
    truth: Tensor | None,
    what: str,
    options: EvaluationOptions,
) -> None:
    """Measure the best of n and the order within prompts against the truth."""
    prompt = item_prompts(items)
    if truth is None:
        report.notes.append("best of n and ranks need a truth: ratings, rankings, or a reward as the truth")
        return
    with report.attempt("best of n"):
        curve = best_of_n(scores, truth, prompt, options.best_of)
        report.best_of_n = curve
        if curve.left_out:
            report.notes.append(f"best of {len(curve)}: {curve.left_out} prompts with fewer samples are left out")
        report.add("best of n", f"{what} of one sample", curve.truth[0])
        report.add("best of n", f"{what} of the best of {len(curve)}", curve.truth[-1])
        highest = max(range(len(curve)), key=lambda place: curve.truth[place].mean)
        report.add("best of n", f"gain in {what}", curve.gain[-1], False, f"highest at n = {highest + 1}")
    with report.attempt("the order within prompts"):
        ranks = rank_agreement(scores, truth, prompt)
        report.add("order within prompts", "Kendall's tau-b", ranks.tau)
        chance = f"{ranks.by_chance:.3f} by chance"
        report.add("order within prompts", "best sample found", ranks.best_found, True, chance)
        if ranks.left_out:
            report.notes.append(f"ranks: {ranks.left_out} prompts have one sample, or samples that are equally good")


def _measure_nuisances(
    report: RewardEvaluation, scorer: ItemScorer, items: Sequence[Item], scores: Tensor, truth: Tensor | None
) -> None:
    """Correlate scores and truth with statistics of the samples within prompts."""
    statistics, prompt = scorer.statistics(items), item_prompts(items)
    for section, values in (("nuisances", scores), ("nuisances of the truth", truth)):
        if values is None:
            continue
        with report.attempt(section):
            found = nuisance_report(values, statistics, prompt)
            for name, value in found.correlations.items():
                report.add(section, name, value)
            report.add(section, "explained share of the variance", found.explained, True)
            if found.constant:
                report.notes.append(f"{section}: {', '.join(found.constant)} do not vary within prompts")


def _measure_robustness(
    report: RewardEvaluation,
    scorer: ItemScorer,
    reward: NamedReward,
    items: Sequence[Item],
    scores: Tensor,
    pairs: EvaluatedPairs,
    options: EvaluationOptions,
) -> None:
    """Score perturbed samples of some pairs: how far scores move, and how often the preferred sample changes."""
    difference = scores[pairs.rows[:, 0]] - scores[pairs.rows[:, 1]]
    decided = (~difference.isnan() & (difference != 0)).nonzero()[:, 0]
    if not options.robustness or not len(decided):
        return
    generator = torch.Generator().manual_seed(derived_seed(options.seed, "perturbed pairs"))
    drawn = decided[torch.randperm(len(decided), generator=generator)[: options.robustness]]
    rows, places = torch.unique(pairs.rows[drawn], return_inverse=True)
    chosen, clean, prompt = [items[row] for row in rows.tolist()], scores[rows], item_prompts(items)
    deviation = float(clean.std(correction=0))
    medium = medium_of(scorer.reader(chosen[0])[None]).name
    for name, perturbation in PERTURBATIONS.get(medium, {}).items():
        moved = scorer.scores(reward, chosen, (name, perturbation), options.seed)
        after = moved[places[:, 0]] - moved[places[:, 1]]
        flips = ((after.sign() - difference[drawn].sign()).abs() / 2).masked_fill(after.isnan(), torch.nan)
        with report.attempt(f"robustness to {name}"):
            change = (moved - clean) / deviation
            both = [mean_over_tasks({"all": prompt_means(c, prompt[rows])}, "score") for c in (change, change.abs())]
            flipped = clustered_share(prompt_means(flips, prompt[pairs.rows[drawn, 0]]))
            report.add("robustness", f"{name}: decisions that flip", flipped, True, f"{len(drawn)} pairs")
            report.add("robustness", f"{name}: shift of the score", both[0], False, "standard deviations")
            report.add("robustness", f"{name}: size of the change", both[1], False, "standard deviations")
