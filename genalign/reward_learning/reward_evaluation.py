"""All measures of one reward, or of one judge of pairs, on preference data and on several samples of each prompt."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from genalign.diffusion.noise import derived_seed
from genalign.metrics.intervals import clustered_share, mean_over_tasks
from genalign.reward_learning.examples import Examples, Item, examples, prompt_numbers
from genalign.reward_learning.item_scores import ItemScorer
from genalign.reward_learning.judged_pairs import (
    EvaluatedPairs,
    item_grades,
    judged_pairs,
    pairs_of_values,
    win_shares,
)
from genalign.reward_learning.measures import (
    best_of_n,
    nuisance_report,
    prompt_means,
    rank_agreement,
    starc_distance,
)
from genalign.reward_learning.pair_measures import order_consistency, position_bias
from genalign.reward_learning.pair_report import (
    PairPredictions,
    items_seen,
    main_dimension,
    measure_judgments,
    measure_pairs,
)
from genalign.reward_learning.perturbations import PERTURBATIONS
from genalign.reward_learning.preferences import Judgment
from genalign.reward_learning.reward_report import EvaluationOptions, RewardEvaluation
from genalign.runtime.media import medium_of
from genalign.scoring.judge_orders import both_orders
from genalign.scoring.score import NamedReward
from genalign.types import PairwiseReward

_CERTAIN = 1e-6  # least distance of a judge's preference from 0 and 1 in its logit


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
        pairs = measure_judgments(report, data, PairPredictions(scores, {}), judgments, trained_on, options)
        _measure_robustness(report, scorer, reward, data.items, scores, pairs, options)
    elif worth is not None:
        pairs = pairs_of_values(worth, prompt_numbers(groups))
        predictions, seen = PairPredictions(group_scores, {}), items_seen(groups, trained_on)
        measure_pairs(report, groups, pairs, predictions.of(pairs.rows), seen, options)
        _measure_robustness(report, scorer, reward, groups, group_scores, pairs, options)
    report.counts |= {"samples": len(groups), "samples without a score": int(group_scores.isnan().sum())}
    _measure_groups(report, groups, group_scores, worth, what, options)
    _measure_nuisances(report, scorer, groups, group_scores, worth)
    rewards = {reward.name: group_scores} | ({} if worth is None else {what: worth})
    rewards |= {other.name: scorer.scores(other, groups) for other in others}
    for (first, left), (second, right) in itertools.combinations(rewards.items(), 2):
        with report.attempt(f"the STARC distance of {first} and {second}"):
            distance = starc_distance(left, right, prompt_numbers(groups))
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
    single samples (best of n, ranks, distances, nuisances, robustness) is left out, since a judge has no scores.

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
    by_pair = {(a, b): logit for (a, b), logit in zip(rows.tolist(), logits, strict=True)}
    prompt = prompt_numbers(data.items)[rows[:, 0]]
    counted = f"{consistency.pairs} pairs"
    with report.attempt("position bias"):
        in_both_orders = torch.stack([first, second]).mean(0)
        report.add("position bias", "judge", position_bias(in_both_orders, prompt), True, counted)
        same = order_consistency(first, second, prompt)
        report.add("position bias", "same sample in both orders", same, True, counted)
    measure_judgments(report, data, PairPredictions(None, by_pair), judgments, trained_on, options)
    report.notes.append("a judge of pairs has no scores: best of n, ranks, distances, nuisances, robustness left out")
    return report


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
    main = main_dimension(data, options)
    grades = item_grades(data, main)
    if not bool(grades.isnan().all()):
        return grades, "ratings"
    pairs = judged_pairs(data, main)
    shares = win_shares(pairs, prompt_numbers(items)) if len(pairs) else grades
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
    prompt = prompt_numbers(items)
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
    statistics, prompt = scorer.statistics(items), prompt_numbers(items)
    for section, values in (("nuisances", scores), ("nuisances of the truth", truth)):
        if values is None:
            continue
        with report.attempt(section):
            result = nuisance_report(values, statistics, prompt)
            for name, value in result.correlations.items():
                report.add(section, name, value)
            report.add(section, "explained share of the variance", result.explained, True)
            if result.constant:
                report.notes.append(f"{section}: {', '.join(result.constant)} do not vary within prompts")


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
    subset, clean, prompt = [items[row] for row in rows.tolist()], scores[rows], prompt_numbers(items)
    deviation = float(clean.std(correction=0))
    medium = medium_of(scorer.reader(subset[0])[None]).name
    for name, perturbation in PERTURBATIONS.get(medium, {}).items():
        moved = scorer.scores(reward, subset, (name, perturbation), options.seed)
        after = moved[places[:, 0]] - moved[places[:, 1]]
        flips = ((after.sign() - difference[drawn].sign()).abs() / 2).masked_fill(after.isnan(), torch.nan)
        with report.attempt(f"robustness to {name}"):
            change = (moved - clean) / deviation
            both = [mean_over_tasks({"all": prompt_means(c, prompt[rows])}, "score") for c in (change, change.abs())]
            flipped = clustered_share(prompt_means(flips, prompt[pairs.rows[drawn, 0]]))
            report.add("robustness", f"{name}: decisions that flip", flipped, True, f"{len(drawn)} pairs")
            report.add("robustness", f"{name}: shift of the score", both[0], False, "standard deviations")
            report.add("robustness", f"{name}: size of the change", both[1], False, "standard deviations")
