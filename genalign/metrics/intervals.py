"""Means with 95 % confidence intervals, and win rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

LEVEL = 0.95
_TAILS = (50 * (1 - LEVEL), 50 * (1 + LEVEL))


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % confidence interval, from ``n`` images, seeds or trials."""

    mean: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class WinRate:
    """``rate`` counts a tie as half a win; ``ties`` is their share; ``p_value`` is of the sign test without them."""

    rate: Estimate
    ties: float
    p_value: float


@dataclass(frozen=True)
class WinTest:
    """Whether trials are won more often than lost, by the statistics of DRAGON's tables (arXiv 2504.15217).

    ``rate`` counts a tie as half a win. The rest is of ``wins`` and ``losses`` alone: ``low``, the one-sided 95 %
    Clopper-Pearson bound of their rate; ``p_value`` of the exact one-sided binomial test against one half;
    ``above_half``, the probability of a rate above one half after a uniform prior, of Beta(wins + 1, losses + 1).
    """

    rate: float
    wins: int
    losses: int
    ties: int
    low: float
    p_value: float
    above_half: float


def bootstrap_mean(
    values_by_task: Mapping[str, Sequence[float]], n_images: int, resamples: int = 2000, seed: int = 0
) -> Estimate:
    """The unweighted mean over tasks of the mean over prompts (GenEval's overall), by a percentile bootstrap.

    A value is one prompt's mean over its images, so that images of one prompt count as one draw; prompts are resampled
    within their task. Per-prompt differences make the interval a paired one. It is too narrow for a task of very few
    prompts, by a factor of about sqrt((n - 1) / n) for n prompts, and has no width for a task of one.

    Args:
        values_by_task: finite values, one per prompt, of every task.
        n_images: what to report as ``n``.

    Raises:
        ValueError: there is no task, or a task has no values or a value that is not finite.
    """
    if not values_by_task:
        raise ValueError("there is nothing to average: give at least one task")
    tasks = [_checked(values, f"task {task!r}") for task, values in values_by_task.items()]
    rng = np.random.default_rng(seed)
    draws = np.mean([_resampled_means(values, resamples, rng) for values in tasks], axis=0)
    low, high = np.percentile(draws, _TAILS)
    return Estimate(float(np.mean([values.mean() for values in tasks])), float(low), float(high), n_images)


def _resampled_means(
    values: npt.NDArray[np.float64], resamples: int, rng: np.random.Generator
) -> npt.NDArray[np.float64]:
    """Means (resamples,) of draws with replacement."""
    means: npt.NDArray[np.float64] = values[rng.integers(len(values), size=(resamples, len(values)))].mean(1)
    return means


def t_interval(values: Sequence[float]) -> Estimate:
    """The mean over independent repetitions, such as training seeds, with Student's interval.

    Raises:
        ValueError: fewer than two values, or one that is not finite.
    """
    array = _checked(values, "the list")
    if len(array) < 2:
        raise ValueError("an interval over seeds needs at least two of them, and three to be of use")
    mean, error = float(array.mean()), float(array.std(ddof=1)) / len(array) ** 0.5
    reach = float(stats.t.ppf((1 + LEVEL) / 2, len(array) - 1)) * error
    return Estimate(mean, mean - reach, mean + reach, len(array))


def median_interval(values: Sequence[float]) -> Estimate:
    """The median of repeated measurements with its exact interval from order statistics (95 % or a little more); of
    fewer than six, which cannot give one, their range.

    Raises:
        ValueError: no value, or one that is not finite.
    """
    array = np.sort(_checked(values, "the list"))
    rank = max(0, int(stats.binom.ppf((1 - LEVEL) / 2, len(array), 0.5)) - 1)
    return Estimate(float(np.median(array)), float(array[rank]), float(array[-1 - rank]), len(array))


def wilson(successes: float, n: int) -> Estimate:
    """A proportion with Wilson's score interval (Wilson 1927); half successes are allowed.

    Raises:
        ValueError: no trial, or more successes than trials.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"{successes} successes in {n} trials is no proportion: need n >= 1 and 0 <= successes <= n")
    z = float(stats.norm.ppf((1 + LEVEL) / 2))
    p, scale = successes / n, 1 + z * z / n
    centre = (p + z * z / (2 * n)) / scale
    reach = z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5 / scale
    return Estimate(p, max(0.0, min(p, centre - reach)), min(1.0, max(p, centre + reach)), n)


def wider(a: Estimate, b: Estimate) -> Estimate:
    """What covers both intervals of one mean, say over prompts and over seeds; ``n`` is that of ``a``.

    Raises:
        ValueError: the means differ.
    """
    if not np.isclose(a.mean, b.mean, rtol=1e-6, atol=1e-9):
        raise ValueError(f"intervals of two different means, {a.mean:g} and {b.mean:g}, cannot be joined")
    return Estimate(a.mean, min(a.low, b.low), max(a.high, b.high), a.n)


def win_rate(before: Sequence[float], after: Sequence[float]) -> WinRate:
    """How often ``after`` beats ``before`` in pairs, a tie as half; Wilson's interval, for pairs that are independent.

    Where several pairs share a prompt, pass the per-prompt means.

    Raises:
        ValueError: lists of different lengths, empty, or with a value that is not finite.
    """
    wins, losses, ties = _outcomes(before, after)
    n = wins + losses + ties
    p_value = float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
    return WinRate(wilson(wins + ties / 2, n), ties / n, p_value)


def win_test(before: Sequence[float], after: Sequence[float]) -> WinTest:
    """How often ``after`` beats ``before`` in pairs that are independent; raises ValueError as ``win_rate``."""
    return counted_win_test(*_outcomes(before, after))


def counted_win_test(wins: int, losses: int, ties: int = 0) -> WinTest:
    """The same of counted trials. Raises ValueError for none."""
    n, decided = wins + losses + ties, wins + losses
    if n < 1 or min(wins, losses, ties) < 0:
        raise ValueError(f"{wins} wins, {losses} losses and {ties} ties are no trials: count one or more")
    low = float(stats.beta.ppf(1 - LEVEL, wins, losses + 1)) if wins else 0.0
    p_value = float(stats.binomtest(wins, decided, alternative="greater").pvalue) if decided else 1.0
    above_half = float(stats.beta.sf(0.5, wins + 1, losses + 1))
    return WinTest((wins + ties / 2) / n, wins, losses, ties, low, p_value, above_half)


def _outcomes(before: Sequence[float], after: Sequence[float]) -> tuple[int, int, int]:
    """Wins of ``after``, its losses, and ties."""
    if len(before) != len(after):
        raise ValueError(f"a win rate needs pairs: got {len(before)} values before and {len(after)} after")
    difference = _checked(after, "after") - _checked(before, "before")
    wins, losses = int((difference > 0).sum()), int((difference < 0).sum())
    return wins, losses, len(difference) - wins - losses


def _checked(values: Sequence[float], what: str) -> npt.NDArray[np.float64]:
    """``values`` as a float64 vector, refused where it is empty or not finite."""
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{what} has no values: leave it out, or score at least one image of it")
    if not np.isfinite(array).all():
        raise ValueError(f"{what} has values that are not finite: drop failed scores before averaging")
    return array
