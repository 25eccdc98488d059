"""Accuracy and agreement by hand, the calibration of a known logistic, and planted position bias."""

from __future__ import annotations

import math

import pytest
import torch

from genalign.metrics.intervals import share
from genalign.reward_learning.measures import UnmeasurableError
from genalign.reward_learning.pair_measures import (
    Votes,
    annotator_agreement,
    calibration,
    credit,
    margin_bins,
    order_consistency,
    pair_accuracy,
    position_bias,
    winner_accuracy,
)

NAN = math.nan


def test_credit_of_ties() -> None:
    difference = torch.tensor([2.0, -2.0, 0.0, 0.0, 1.0, NAN, 1.0, 3.0])
    preferred = torch.tensor([1.0, 1.0, 1.0, 0.5, 0.5, 1.0, NAN, 0.7])
    expected = torch.tensor([1.0, 0.0, 0.5, 1.0, 0.5, NAN, NAN, 1.0], dtype=torch.float64)
    torch.testing.assert_close(credit(difference, preferred), expected, equal_nan=True)


def test_accuracy_by_hand() -> None:
    """Prompt 0: right, wrong, a tie; prompt 1: right; prompt 2: the reward is tied; prompt 3 has no score."""
    difference = torch.tensor([1.0, 1.0, 1.0, -0.5, 0.0, NAN])
    preferred = torch.tensor([1.0, 0.0, 0.5, 0.0, 1.0, 1.0])
    result = pair_accuracy(difference, preferred, torch.tensor([0, 0, 0, 1, 2, 3]))
    assert result.accuracy is not None and result.accuracy.n == 3
    assert result.accuracy.mean == pytest.approx((0.5 + 1 + 0.5) / 3)
    assert result.with_ties.mean == pytest.approx((1.5 / 3 + 1 + 0.5) / 3)
    assert result.share_of_pairs == pytest.approx(2.5 / 4)
    assert (result.pairs, result.ties, result.reward_ties) == (5, 1, 1)
    assert pair_accuracy(difference, torch.full((6,), 0.5), torch.arange(6)).accuracy is None
    with pytest.raises(UnmeasurableError, match="nothing could be scored"):
        pair_accuracy(torch.tensor([NAN]), torch.ones(1), torch.zeros(1))


def test_winners_above_all_others_by_hand() -> None:
    """Prompt 0: above both, and below one of three; prompt 1: tied with one of two; prompt 2 has no score of one."""
    difference = torch.tensor([1.0, -2.0, 1.0, 1.0, -0.5, 0.0, 2.0, 1.0, NAN])
    preferred = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.9, 1.0, 1.0, 1.0, 1.0])
    prompt = torch.tensor([0, 0, 0, 0, 0, 1, 1, 2, 2])
    result = winner_accuracy(difference, preferred, prompt, [[0, 1], [2, 3, 4], [5, 6], [7, 8]])
    assert result.winners == 3 and result.accuracy.n == 2
    assert result.accuracy.mean == pytest.approx(((1 + 0) / 2 + 1 / 2) / 2)
    assert result.by_chance == pytest.approx(((1 / 3 + 1 / 4) / 2 + 1 / 3) / 2)
    with pytest.raises(UnmeasurableError, match="nothing could be scored"):
        winner_accuracy(difference, preferred, prompt, [[7, 8]])


def test_a_pair_a_prompt_has_the_exact_interval_of_a_share() -> None:
    difference = torch.ones(40)
    preferred = torch.tensor([1.0] * 30 + [0.0] * 10)
    estimate = pair_accuracy(difference, preferred, torch.arange(40)).accuracy
    assert estimate is not None
    exact = share(30, 40)
    assert (estimate.mean, estimate.n) == (0.75, 40)
    assert estimate.low == pytest.approx(exact.low, abs=2e-3) and estimate.high == pytest.approx(exact.high, abs=2e-3)


def test_bins_of_margins() -> None:
    margin = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, NAN])
    bins = margin_bins(margin, 4)
    assert [rows.tolist() for _, _, rows in bins] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert bins[1][:2] == pytest.approx((0.3, 0.4))
    assert [len(rows) for _, _, rows in margin_bins(torch.tensor([1.0, 1.0, 1.0, 0.2, 0.2]), 4)] == [2, 3]
    assert margin_bins(torch.ones(9), 4) == [] and margin_bins(torch.tensor([NAN]), 4) == []


def _logistic(scale: float, prompts: int, pairs: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Differences, preferences that are drawn by sigmoid(scale difference), and prompts."""
    generator = torch.Generator().manual_seed(seed)
    difference = torch.randn(prompts * pairs, generator=generator, dtype=torch.float64)
    drawn = torch.rand(prompts * pairs, generator=generator, dtype=torch.float64) < torch.sigmoid(scale * difference)
    return difference, drawn.double(), torch.arange(prompts).repeat_interleave(pairs)


def test_the_scale_of_a_known_logistic_is_found() -> None:
    difference, preferred, prompt = _logistic(2.0, 1000, 4, seed=0)
    used = calibration(difference, preferred, prompt, scale=2.0)
    assert used.fitted_scale.low <= 2.0 <= used.fitted_scale.high < 2.3
    assert used.ece.low == 0 and used.ece.mean < 2 * used.ece_if_calibrated
    sharp = calibration(difference, preferred, prompt, scale=8.0)
    assert sharp.fitted_scale.mean == pytest.approx(used.fitted_scale.mean)
    assert sharp.ece.low > used.ece.high and sharp.log_loss.low > used.log_loss.high
    assert sharp.fitted_log_loss == pytest.approx(used.fitted_log_loss) and sharp.brier.mean > used.brier.mean
    assert len(sharp.bins) == 10 and sum(one.pairs for one in sharp.bins) == 4000
    assert sharp.bins[-1].confidence > 0.99 > sharp.bins[-1].accuracy.mean


def test_calibration_by_hand() -> None:
    """Probabilities 0.8, 0.2 and 0.5 of preferences 1, 1 and 1/2: one bin, of confidence 0.7 and accuracy 0.5."""
    logit = math.log(4)
    result = calibration(
        torch.tensor([logit, -logit, 0.0]), torch.tensor([1.0, 1.0, 0.5]), torch.tensor([0, 1, 2]), bins=1
    )
    assert result.brier.mean == pytest.approx((0.04 + 0.64 + 0) / 3)
    assert result.log_loss.mean == pytest.approx((-math.log(0.8) - math.log(0.2) + math.log(2)) / 3)
    assert result.ece.mean == pytest.approx((0.8 + 0.8 + 0.5) / 3 - (1 + 0 + 0.5) / 3)
    assert result.fitted_scale.mean == 0.0


def test_calibration_does_not_depend_on_which_sample_is_first() -> None:
    difference, preferred, prompt = _logistic(1.0, 60, 3, seed=1)
    turned = torch.arange(180) % 2 == 0
    ways = (
        (difference, preferred),
        (
            torch.where(turned, -difference, difference),
            torch.where(turned, 1 - preferred, preferred),
        ),
    )
    first, second = (calibration(*way, prompt) for way in ways)
    assert first.ece == second.ece and first.log_loss.mean == pytest.approx(second.log_loss.mean)
    assert first.fitted_scale.mean == pytest.approx(second.fitted_scale.mean)


def test_differences_that_separate_all_pairs_fit_any_scale() -> None:
    result = calibration(torch.tensor([1.0, -2.0, 0.5]), torch.tensor([1.0, 0.0, 1.0]), torch.arange(3))
    assert math.isinf(result.fitted_scale.mean) and result.fitted_log_loss == 0


@pytest.mark.slow
@pytest.mark.parametrize(("true_scale", "pairs"), [(1.0, 1), (0.3, 4)])
def test_intervals_of_the_calibration_cover_the_truth(true_scale: float, pairs: int) -> None:
    """By scale 1: the calibrated reward has an error of 0, and the other of the mean of |p - q|."""
    fine = torch.randn(200_000, generator=torch.Generator().manual_seed(9), dtype=torch.float64).abs()
    error = float((torch.sigmoid(fine) - torch.sigmoid(true_scale * fine)).mean())
    errors, scales = 0, 0
    for seed in range(80):
        result = calibration(*_logistic(true_scale, 150, pairs, seed), seed=seed)
        errors += result.ece.low <= error <= result.ece.high
        scales += result.fitted_scale.low <= true_scale <= result.fitted_scale.high
    assert errors / 80 >= 0.85 and scales / 80 >= 0.88  # three deviations below 0.92 and 0.95


def test_planted_position_bias_is_found() -> None:
    generator = torch.Generator().manual_seed(0)
    right = (torch.rand(400, generator=generator) < 0.5).float()
    biased = torch.where(torch.rand(400, generator=generator) < 0.4, 1.0, right)  # 0.4 + 0.6 * 0.5 for the first
    prompt = torch.arange(100).repeat_interleave(4)
    value = position_bias(biased, prompt)
    assert value.low <= 0.2 <= value.high and value.low > 0.1
    fair = position_bias(right, prompt)
    assert fair.low < 0 < fair.high
    first, second = torch.tensor([0.9, 0.8, 0.9, 0.5, NAN]), torch.tensor([0.2, 0.7, 0.9, 0.2, 0.1])
    assert order_consistency(first, second, torch.arange(5)).mean == pytest.approx(1 / 4)


def test_agreement_of_annotators_by_hand() -> None:
    """Pair 0: ada and bob prefer the first, cy the second; pair 1: ada the first, bob the second; pair 2: ada alone."""
    votes = Votes(
        torch.tensor([0, 0, 0, 1, 1, 2]),
        torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 0.0]),
        ("ada", "bob", "cy", "ada", "bob", "ada"),
    )
    difference, prompt = torch.tensor([3.0, -1.0, 2.0]), torch.arange(3)
    result = annotator_agreement(votes, difference, prompt)
    ada, cy = result["ada"], result["cy"]
    assert ada.with_reward.mean == pytest.approx((1 + 0 + 0) / 3) and ada.pairs == 3
    assert ada.with_others and ada.reward_with_others and cy.with_others and cy.reward_with_others
    assert ada.with_others.mean == pytest.approx((0.5 + 0) / 2)  # bob and cy are tied on pair 0
    assert ada.reward_with_others.mean == pytest.approx((0.5 + 1) / 2)
    assert cy.with_others.mean == 0 and cy.reward_with_others.mean == 1
    everyone = result[""]
    assert everyone.with_others and everyone.with_others.mean == pytest.approx(((0.5 + 0.5 + 0) / 3 + 0) / 2)
    unscored = annotator_agreement(votes, torch.tensor([NAN, -1.0, 2.0]), prompt)
    assert "cy" not in unscored and unscored["ada"].pairs == 2
