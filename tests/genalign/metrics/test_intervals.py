import numpy as np
import pytest

from genalign.metrics.intervals import Estimate, bootstrap_mean, t_interval, wider, wilson, win_rate, win_test


def test_overall_weights_tasks_equally():
    estimate = bootstrap_mean({"a": [1.0, 1.0, 0.0, 0.0], "b": [1.0]}, n_images=15)
    assert estimate.mean == pytest.approx((0.5 + 1.0) / 2)
    assert estimate.n == 15
    assert estimate.as_dict() == {"mean": estimate.mean, "low": estimate.low, "high": estimate.high, "n": 15}


def test_resamples_stay_inside_their_task():
    """Tasks without spread have an interval without width, however much they differ from each other."""
    assert bootstrap_mean({"a": [0.2] * 5, "b": [0.8] * 7}, 12) == Estimate(*[pytest.approx(0.5)] * 3, 12)


def test_interval_of_a_fair_coin():
    """1000 prompts, half of them right: the standard error is 0.5 / sqrt(1000)."""
    estimate = bootstrap_mean({"a": [0.0, 1.0] * 500}, 1000)
    reach = 1.96 * 0.5 / 1000**0.5
    assert estimate.low == pytest.approx(0.5 - reach, abs=0.003)
    assert estimate.high == pytest.approx(0.5 + reach, abs=0.003)


def test_bootstrap_is_deterministic_and_depends_on_its_seed():
    values = {"a": [0.1, 0.5, 0.7, 0.2], "b": [0.3, 0.9]}
    assert bootstrap_mean(values, 6) == bootstrap_mean(values, 6)
    assert bootstrap_mean(values, 6) != bootstrap_mean(values, 6, seed=1)


def test_bootstrap_covers_the_truth():
    """Two tasks of 40 prompts of different difficulty, 3 images each: the truth is inside 95 times in 100."""
    rng = np.random.default_rng(7)
    inside = 0
    for _ in range(400):
        easy = rng.binomial(3, rng.beta(4, 2, 40)) / 3
        hard = rng.binomial(3, rng.beta(1, 3, 40)) / 3
        estimate = bootstrap_mean({"easy": easy.tolist(), "hard": hard.tolist()}, 240, resamples=500)
        inside += estimate.low <= (4 / 6 + 1 / 4) / 2 <= estimate.high
    assert 0.91 <= inside / 400 <= 0.98


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "at least one task"),
        ({"a": [0.5], "counting": []}, "task 'counting' has no values"),
        ({"a": [float("nan")]}, "task 'a' has values that are not finite"),
    ],
)
def test_bootstrap_refuses(values, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_mean(values, 1)


def test_t_interval_by_hand():
    """Mean 4, standard deviation 2, three seeds: 4 +- 4.302653 * 2 / sqrt(3)."""
    estimate = t_interval([2.0, 4.0, 6.0])
    reach = 4.302653 * 2 / 3**0.5
    assert (estimate.mean, estimate.n) == (4.0, 3)
    assert (estimate.low, estimate.high) == pytest.approx((4 - reach, 4 + reach), rel=1e-6)
    with pytest.raises(ValueError, match="at least two"):
        t_interval([0.5])


def test_wilson_by_hand():
    """8 of 10, from the formula with z = 1.959964; 0 of 10 ends at z^2 / (n + z^2)."""
    estimate = wilson(8, 10)
    assert (estimate.mean, estimate.low, estimate.high) == pytest.approx((0.8, 0.490162, 0.943318), abs=1e-6)
    none = wilson(0, 10)
    assert (none.mean, none.low, none.n) == (0.0, 0.0, 10)
    assert none.high == pytest.approx(0.277533, abs=1e-6)


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (3, 2), (-1, 2)])
def test_wilson_refuses(successes, n):
    with pytest.raises(ValueError, match="no proportion"):
        wilson(successes, n)


def test_wider_covers_both():
    assert wider(Estimate(0.5, 0.4, 0.55, 96), Estimate(0.5, 0.45, 0.6, 3)) == Estimate(0.5, 0.4, 0.6, 96)
    with pytest.raises(ValueError, match="different means"):
        wider(Estimate(0.5, 0.4, 0.6, 3), Estimate(0.6, 0.5, 0.7, 3))


def test_win_rate_counts_ties_as_half():
    """Two wins, one loss, one tie: 2.5 of 4. The sign test has 2 of 3: two-sided p = 1."""
    result = win_rate([0, 0, 1, 1], [1, 1, 0, 1])
    assert (result.rate.mean, result.ties, result.p_value) == (0.625, 0.25, pytest.approx(1.0))
    assert (result.rate.low, result.rate.high) == (wilson(2.5, 4).low, wilson(2.5, 4).high)
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
