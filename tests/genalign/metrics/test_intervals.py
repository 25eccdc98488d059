"""Intervals by hand, and how often they cover the truth in simulations."""

from math import inf

import numpy as np
import pytest
from scipy.stats import binomtest, ttest_ind

from genalign.metrics.intervals import (
    Estimate,
    clustered_share,
    difference_kind,
    effect_size,
    jackknife,
    joined,
    mean_over_tasks,
    median_interval,
    share,
    t_interval,
    welch_interval,
    win_rate,
    win_test,
)


def test_overall_weights_tasks_equally_and_counts_prompts():
    estimate = mean_over_tasks({"a": [1.0, 1.0, 0.0, 0.0], "b": [1.0, 1.0]}, "share")
    assert estimate.mean == pytest.approx((0.5 + 1.0) / 2) and estimate.n == 6
    assert estimate.as_dict() == {"mean": estimate.mean, "low": estimate.low, "high": estimate.high, "n": 6}


def test_a_score_of_one_task_has_students_interval():
    """Mean 4, standard deviation 2, three prompts: 4 +- 4.302653 * 2 / sqrt(3)."""
    estimate = mean_over_tasks({"a": [2.0, 4.0, 6.0]}, "score")
    reach = 4.302653 * 2 / 3**0.5
    assert (estimate.mean, estimate.low, estimate.high) == pytest.approx((4, 4 - reach, 4 + reach), rel=1e-6)


@pytest.mark.parametrize(
    ("tasks", "reason"),
    [
        ({"a": [0.5, 0.7], "b": [0.1]}, "no interval: it needs 2 or more prompts in every task"),
        ({"a": [0.5]}, "no interval: it needs 2 or more prompts"),
        ({"a": [0.5] * 9}, "no interval: all values are equal"),
    ],
)
def test_scores_of_few_prompts_have_no_interval_and_say_how_many_would_do(tasks, reason):
    estimate = mean_over_tasks(tasks, "score")
    assert not estimate.has_interval and estimate.no_interval == reason
    assert estimate.text("+.2f") == f"{estimate.mean:+.2f} ({reason})"
    assert Estimate.from_dict(estimate.as_dict()) == estimate
    assert mean_over_tasks({"a": [0.5, 0.7], "b": [0.1, 0.2]}, "score").has_interval


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (8, 10), (10, 10), (1, 1), (250, 960)])
def test_shares_have_the_exact_interval(successes, n):
    expected = binomtest(successes, n).proportion_ci()
    values = [1.0] * successes + [0.0] * (n - successes)
    for estimate in (share(successes, n), mean_over_tasks({"all": values}, "share")):
        assert (estimate.mean, estimate.n) == (successes / n, n)
        assert (estimate.low, estimate.high) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_a_difference_of_shares_that_has_one_sign_has_the_exact_lower_limit_of_its_share():
    """Of ten prompts three improved and none got worse: by hand, from the limits of 3/10 and 0/10."""
    estimate = mean_over_tasks({"all": [1.0] * 3 + [0.0] * 7}, "share difference")
    low, high = binomtest(3, 10).proportion_ci()
    worse = binomtest(0, 10).proportion_ci().high
    assert estimate.mean == pytest.approx(0.3) and estimate.high == pytest.approx(high)
    assert estimate.low == pytest.approx(0.3 - (0.3 - low + worse))


# ------------------------------------------------------------------------------------------------------- coverage

REPEATS = 500
STRATA = {
    "3": (3,),
    "6": (6,),
    "20": (20,),
    "200": (200,),
    "6 x 1": (1,) * 6,
    "6 x 5": (5,) * 6,
    "2 and 100": (2, 100, 100),
    "3 and 40": (3, 40, 40, 40),
    "mixed": (1, 2, 6, 3, 40),
}


def _covers(draws, truth, kind):
    """The share of repeats (tasks of (repeats, prompts)) whose interval has the truth."""
    rows = [{str(k): task[i].tolist() for k, task in enumerate(draws)} for i in range(REPEATS)]
    estimates = [mean_over_tasks(row, kind) for row in rows]
    return np.mean([e.low - 1e-9 <= truth <= e.high + 1e-9 for e in estimates])


@pytest.mark.parametrize("strata", STRATA)
@pytest.mark.parametrize("spread", [0, 1])
def test_intervals_of_scores_cover_the_truth(strata, spread):
    rng = np.random.default_rng(1)
    draws = [rng.normal(k, 1 + 2 * (spread * k % 2), (REPEATS, n)) for k, n in enumerate(STRATA[strata])]
    assert _covers(draws, np.mean(range(len(draws))), "score") >= 0.93


@pytest.mark.parametrize("strata", STRATA)
@pytest.mark.parametrize(("truth", "images"), [(0.03, 1), (0.5, 1), (0.97, 1), (0.03, 4)])
def test_intervals_of_shares_cover_the_truth(strata, truth, images):
    """Images of one prompt agree more than those of several: the chance of a prompt is drawn first."""
    rng = np.random.default_rng(2)
    shapes = [(REPEATS, n) for n in STRATA[strata]]
    chances = [np.full(shape, truth) if images == 1 else rng.beta(truth, 1 - truth, shape) for shape in shapes]
    assert _covers([rng.binomial(images, chance) / images for chance in chances], truth, "share") >= 0.93


@pytest.mark.parametrize("strata", [(1, 100, 100, 100, 100, 100), (2, 50), (5,) * 6])
@pytest.mark.parametrize("truths", [(0.2, 0.0), (0.8, 1.0), (0.03, 0.5), (0.97, 0.03)])
def test_intervals_of_shares_that_differ_by_task_cover_the_truth(strata, truths):
    """A small task whose share is the only uncertain one would be lost in one share of all tasks (80 %)."""
    rng = np.random.default_rng(5)
    shares = [truths[min(k, 1)] for k in range(len(strata))]
    draws = [rng.binomial(1, truth, (REPEATS, n)).astype(float) for truth, n in zip(shares, strata, strict=True)]
    assert _covers(draws, np.mean(shares), "share") >= 0.93
    changes = [draw - rng.binomial(1, 0.03, draw.shape) * (1 - draw) for draw in draws]
    truth = np.mean([share - 0.03 * (1 - share) for share in shares])
    assert _covers(changes, truth, "share difference") >= 0.93


@pytest.mark.parametrize("prompts", [6, 20, 88, 200])
@pytest.mark.parametrize("chance", [0.03, 0.1, 0.3])
def test_intervals_of_rare_changes_of_a_score_cover_the_truth(prompts, chance):
    """A share of parts, as of a prompt's objects, that improves by a quarter or a half in few prompts."""
    rng, hits = np.random.default_rng(6), []
    for changes in rng.choice([0, 0.25, 0.5], (REPEATS, prompts), p=[1 - chance, chance / 2, chance / 2]):
        kind = difference_kind([(0.25, 0.25 + change) for change in changes], False)
        estimate = mean_over_tasks({"all": changes}, kind)
        hits += [estimate.low <= 0.375 * chance <= estimate.high] if estimate.has_interval else []
    assert np.mean(hits) >= 0.93


def test_kinds_of_differences():
    assert difference_kind([(0.0, 1.0), (1.0, 0.5)], True) == "share difference"
    assert difference_kind([(0.2, 0.2), (0.4, 0.4), (0.1, 0.3)], False) == "share difference"
    assert difference_kind([(0.2, 0.3), (0.4, 0.4), (0.1, 0.3)], False) == "score"
    assert difference_kind([(5.2, 5.2), (5.4, 5.4), (5.1, 5.3)], False) == "score"


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize(("of_prompts", "of_seeds"), [(1, 0.2), (1, 0.5), (0.1, 1), (1, 0)])
def test_intervals_over_prompts_and_seeds_cover_the_truth(seeds, of_prompts, of_seeds):
    """The wider of the two intervals alone covers 92 % of five seeds."""
    rng = np.random.default_rng(7)
    gains = rng.normal(0, 0.3, (4 * REPEATS, seeds, 20)) + rng.normal(0, of_prompts, (4 * REPEATS, 1, 20))
    gains += rng.normal(0, of_seeds, (4 * REPEATS, seeds, 1))
    hits = []
    for run in gains:
        estimate = joined(mean_over_tasks({"all": run.mean(0)}, "score"), t_interval(run.mean(1)))
        hits.append(estimate.low <= 0 <= estimate.high)
    assert np.mean(hits) >= 0.93


@pytest.mark.parametrize("repeats", [3, 4, 5, 6, 9, 20])
def test_intervals_of_medians_cover_the_truth_or_are_not_printed(repeats):
    estimates = [median_interval(values) for values in np.random.default_rng(8).exponential(1, (REPEATS, repeats))]
    assert np.mean([e.low <= np.log(2) <= e.high for e in estimates]) >= 0.93
    assert all(estimate.has_interval == (repeats >= 5) for estimate in estimates)


@pytest.mark.parametrize("prompts", [3, 20, 88])
@pytest.mark.parametrize(("won", "lost"), [(0.03, 0.0), (0.5, 0.5), (0.4, 0.2), (0.97, 0.03)])
def test_intervals_of_win_rates_cover_the_truth(prompts, won, lost):
    outcomes = np.random.default_rng(9).choice([1, -1, 0], (REPEATS, prompts), p=[won, lost, 1 - won - lost])
    rates = [win_rate([0.0] * prompts, row).rate for row in outcomes]
    assert np.mean([rate.low <= won + (1 - won - lost) / 2 <= rate.high for rate in rates]) >= 0.93


@pytest.mark.parametrize("strata", STRATA)
@pytest.mark.parametrize(("better", "worse"), [(0.03, 0.0), (0.25, 0.25), (0.9, 0.05)])
def test_intervals_of_paired_shares_cover_the_truth(strata, better, worse):
    rng = np.random.default_rng(3)
    chances = [better, worse, 1 - better - worse]
    draws = [rng.choice([1.0, -1.0, 0.0], (REPEATS, n), p=chances) for n in STRATA[strata]]
    assert _covers(draws, better - worse, "share difference") >= 0.93


@pytest.mark.parametrize("strata", ["6", "200", "6 x 5", "mixed"])
@pytest.mark.parametrize(("images", "a", "b", "gain"), [(4, 0.3, 0.3, 0.0), (4, 1, 30, 0.05), (16, 15, 15, 0.1)])
def test_intervals_of_paired_shares_of_several_images_cover_the_truth(strata, images, a, b, gain):
    """The chance of a prompt is drawn first; afterwards it is higher by ``gain``, at most 1."""
    rng = np.random.default_rng(4)
    truth = float(np.mean((rng.beta(a, b, 10**6) + gain).clip(0, 1))) - a / (a + b)
    chances = [rng.beta(a, b, (REPEATS, n)) for n in STRATA[strata]]
    draws = [(rng.binomial(images, (c + gain).clip(0, 1)) - rng.binomial(images, c)) / images for c in chances]
    assert _covers(draws, truth, "share difference") >= 0.93


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        ({}, "score", "at least one task"),
        ({"a": [0.5], "counting": []}, "share", "task 'counting' has no values"),
        ({"a": [float("nan")]}, "score", "task 'a' has values that are not finite"),
        ({"a": [1.5]}, "share", r"a share is in \[0, 1\]"),
        ({"a": [-1.5]}, "share difference", r"a share difference is in \[-1, 1\]"),
    ],
)
def test_values_that_cannot_be_averaged_are_refused(values, kind, message):
    with pytest.raises(ValueError, match=message):
        mean_over_tasks(values, kind)


def test_t_interval_by_hand():
    """Mean 4, standard deviation 2, three seeds: 4 +- 4.302653 * 2 / sqrt(3)."""
    estimate = t_interval([2.0, 4.0, 6.0])
    reach = 4.302653 * 2 / 3**0.5
    assert (estimate.mean, estimate.n) == (4.0, 3)
    assert (estimate.low, estimate.high) == pytest.approx((4 - reach, 4 + reach), rel=1e-6)
    with pytest.raises(ValueError, match="at least two"):
        t_interval([0.5])


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (3, 2), (-1, 2)])
def test_impossible_shares_are_refused(successes, n):
    with pytest.raises(ValueError, match="is no share"):
        share(successes, n)


def test_joined_distances_add_in_squares():
    estimate = joined(Estimate(0.5, 0.2, 0.9, 96), Estimate(0.5, 0.1, 0.8, 3))
    assert (estimate.mean, estimate.low, estimate.high, estimate.n) == (0.5, pytest.approx(0), pytest.approx(1), 96)
    assert joined(Estimate(0.5, -inf, inf, 96), Estimate(0.5, 0.45, 0.6, 3)) == Estimate(0.5, -inf, inf, 96)
    with pytest.raises(ValueError, match="different means"):
        joined(Estimate(0.5, 0.4, 0.6, 3), Estimate(0.6, 0.5, 0.7, 3))


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_intervals_over_seeds_cover_the_truth(seeds):
    estimates = [t_interval(values) for values in np.random.default_rng(10).normal(0, 1, (REPEATS, seeds))]
    assert np.mean([estimate.low <= 0 <= estimate.high for estimate in estimates]) >= 0.93


def test_effect_sizes_by_hand():
    """Half a point, in standard deviations of the mean variance of both sides."""
    means = [(1.0, 0.0), (2.0, 4.0), (3.0, 2.0), (2.0, 2.0)]
    before, after = np.var([1, 2, 3, 2], ddof=1), np.var([0, 4, 2, 2], ddof=1)
    assert effect_size(0.5, means) == pytest.approx(0.5 / ((before + after) / 2) ** 0.5)
    assert (effect_size(0.0, means), effect_size(-0.5, [(1.0, 0.5)] * 3)) == (0.0, -inf)


def test_win_rate_counts_ties_as_half():
    """Two wins, one loss, one tie: 2.5 of 4. The sign test has 2 of 3: two-sided p = 1."""
    result = win_rate([0, 0, 1, 1], [1, 1, 0, 1])
    assert (result.rate.mean, result.ties, result.p_value) == (0.625, 0.25, pytest.approx(1.0))
    assert (result.rate.low, result.rate.high) == (share(2.5, 4).low, share(2.5, 4).high)
    assert win_rate([0] * 6, [1] * 6).p_value == pytest.approx(2 / 64)
    assert win_rate([1, 1], [1, 1]).p_value == 1.0
    with pytest.raises(ValueError, match="needs pairs"):
        win_rate([1.0], [1.0, 2.0])


@pytest.mark.parametrize(
    ("wins", "rate", "low", "p_value", "above_half"),
    [(253, 0.6024, 0.5615, 1.58e-5, 0.999987), (256, 0.6095, 0.5687, 4.15e-6, 0.999997)],
)
def test_win_tests_are_those_of_the_paper(wins, rate, low, p_value, above_half):
    """DRAGON's listening tests of 420 votes each, to the digits that are printed."""
    result = win_test([0] * 420, [1] * wins + [-1] * (420 - wins))
    assert (result.rate, result.low) == pytest.approx((rate, low), abs=5e-5)
    assert result.p_value == pytest.approx(p_value, rel=4e-3)
    assert result.above_half == pytest.approx(above_half, abs=5e-7)


def test_win_tests_leave_ties_to_the_rate():
    result = win_test([0, 0, 1, 1, 1], [1, 1, 0, 1, 1])
    assert (result.wins, result.losses, result.ties, result.rate) == (2, 1, 2, 0.6)
    assert result.p_value == pytest.approx(0.5) and result.above_half == pytest.approx(11 / 16)
    even = win_test([1] * 3, [1] * 3)
    assert (even.rate, even.low, even.p_value, even.above_half) == (0.5, 0.0, 1.0, 0.5)


def test_welch_intervals_are_those_of_scipy_and_cover_the_truth():
    first, second = [0.5, 0.7, 0.6], [0.2, 0.25, 0.3, 0.1, 0.2]
    expected = ttest_ind(first, second, equal_var=False).confidence_interval(0.95)
    estimate = welch_interval(first, second)
    assert (estimate.low, estimate.high) == pytest.approx((expected.low, expected.high), rel=1e-9) and estimate.n == 3
    assert welch_interval([1.0], [0.5, 0.6]).low == -inf and welch_interval([1.0, 1.0], [0.5, 0.5]).high == 0.5
    rng = np.random.default_rng(0)
    draws = [welch_interval(rng.normal(0.3, 0.02, 3).tolist(), rng.normal(0.2, 0.05, 3).tolist()) for _ in range(400)]
    assert np.mean([draw.low <= 0.1 <= draw.high for draw in draws]) > 0.93


def test_a_clustered_share_of_one_trial_a_prompt_is_about_exact_and_of_equal_shares_narrower():
    values = [1.0] * 30 + [0.0] * 10
    estimate, exact = clustered_share(values), share(30, 40)
    assert (estimate.mean, estimate.n) == (0.75, 40)
    assert (estimate.low, estimate.high) == pytest.approx((exact.low, exact.high), abs=1e-9)
    steady = clustered_share([0.7, 0.72, 0.68, 0.71, 0.69, 0.7])  # 0.21 / 0.02 ** 2 * 6 trials would explain them
    assert steady.low > 0.55 > share(4, 6).low and steady.high < 0.85
    with pytest.raises(ValueError, match="in \\[0, 1\\]"):
        clustered_share([1.2])


@pytest.mark.parametrize("prompts", [5, 20, 200])
@pytest.mark.parametrize(("trials", "spread"), [(1, 1.0), (4, 1.0), (40, 20.0), (40, 0.5)])
@pytest.mark.parametrize("truth", [0.5, 0.9])
def test_intervals_of_clustered_shares_cover_the_truth(prompts, trials, spread, truth):
    """The chance of a prompt is drawn from a beta distribution; a large ``spread`` is a narrow one."""
    rng = np.random.default_rng(8)
    chances = rng.beta(2 * spread * truth, 2 * spread * (1 - truth), (REPEATS, prompts))
    estimates = [clustered_share(row) for row in rng.binomial(trials, chances) / trials]
    assert np.mean([e.low <= truth <= e.high for e in estimates]) >= 0.93


def test_the_jackknife_of_a_mean_is_students_interval():
    """With distances as even as these the degrees of freedom are n - 1, and one that dominates leaves 2.3236."""
    values = np.array([-1.0, 1.0, -1.0, 1.0, 0.5])
    left_out = (values.sum() - values) / 4
    estimate, student = jackknife(values.mean(), left_out), t_interval(values)
    assert (estimate.low, estimate.high, estimate.n) == pytest.approx((student.low, student.high, 5))
    far = np.array([0.0] * 19 + [20.0])
    wide = jackknife(1.0, (far.sum() - far) / 19)
    assert wide.high - 1 == pytest.approx((t_interval(far).high - 1) * 3.7764740 / 2.0930241, rel=1e-6)
    assert jackknife(1.0, [1.0]).low == -inf and jackknife(1.0, [1.0, inf, 2.0]).high == inf
