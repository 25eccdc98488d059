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
    """A mean with its 95 % confidence interval, from ``n`` samples, seeds or trials."""

    mean: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class WinRate:
    """A win rate that counts a tie as half a win, the fraction of ``ties``, and a sign test's ``p_value`` without."""

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
    """Estimate the unweighted mean over tasks of the mean over prompts (GenEval's overall) by a percentile bootstrap.

    A value is one prompt's mean over its samples, so that a prompt's samples count as one draw; prompts are resampled
    within their task. Per-prompt differences make the interval a paired one. It is too narrow for a task of very few
    prompts, by a factor of about sqrt((n - 1) / n) for n prompts, and has no width for a task of one.

    Args:
        values_by_task: Finite values of every task, one per prompt.
        n_images: The number of samples to report as ``n``.
        resamples: The number of draws of the bootstrap.
        seed: The seed of the bootstrap.

    Raises:
        ValueError: There is no task, or a task has no values or a value that is not finite.
    """
    if not values_by_task:
        raise ValueError("there is nothing to average: give at least one task")
    tasks = [_checked(values, f"task {task!r}") for task, values in values_by_task.items()]
    rng = np.random.default_rng(seed)
    # Means (tasks, resamples) of draws with replacement
    draws = np.mean([v[rng.integers(len(v), size=(resamples, len(v)))].mean(1) for v in tasks], axis=0)
    low, high = np.percentile(draws, _TAILS)
    return Estimate(float(np.mean([values.mean() for values in tasks])), float(low), float(high), n_images)


def t_interval(values: Sequence[float]) -> Estimate:
    """Estimate the mean over independent repetitions, such as training seeds, with Student's interval.

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
    """Estimate the median of repeated measurements, with its exact interval from order statistics.

    The interval has 95 % or a little more; of fewer than six values, which cannot give one, it is their range.

    Raises:
        ValueError: no value, or one that is not finite.
    """
    array = np.sort(_checked(values, "the list"))
    rank = max(0, int(stats.binom.ppf((1 - LEVEL) / 2, len(array), 0.5)) - 1)
    return Estimate(float(np.median(array)), float(array[rank]), float(array[-1 - rank]), len(array))


def wilson(successes: float, n: int) -> Estimate:
    """Estimate a proportion with Wilson's score interval (Wilson 1927); half successes are allowed.

    Raises:
        ValueError: no trial, or more successes than trials.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"{successes} successes in {n} trials is no proportion: need n >= 1 and 0 <= successes <= n")
    z = float(stats.norm.ppf((1 + LEVEL) / 2))
    p, scale = successes / n, 1 + z * z / n
    center = (p + z * z / (2 * n)) / scale
    reach = z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5 / scale
    return Estimate(p, max(0.0, min(p, center - reach)), min(1.0, max(p, center + reach)), n)


def wider(a: Estimate, b: Estimate) -> Estimate:
    """Join two intervals of one mean, such as over prompts and over seeds, into one; ``n`` is of ``a``.

    Raises:
        ValueError: the means differ.
    """
    if not np.isclose(a.mean, b.mean, rtol=1e-6, atol=1e-9):
        raise ValueError(f"intervals of two different means, {a.mean:g} and {b.mean:g}, cannot be joined")
    return Estimate(a.mean, min(a.low, b.low), max(a.high, b.high), a.n)


def win_rate(before: Sequence[float], after: Sequence[float]) -> WinRate:
    """Estimate how often ``after`` beats ``before``, a tie as half, with Wilson's interval for independent pairs.

    Where several pairs share a prompt, pass the per-prompt means.

    Raises:
        ValueError: lists of different lengths, empty, or with a value that is not finite.
    """
    wins, losses, ties = _outcomes(before, after)
    n = wins + losses + ties
    p_value = float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
    return WinRate(wilson(wins + ties / 2, n), ties / n, p_value)


def win_test(before: Sequence[float], after: Sequence[float]) -> WinTest:
    """Test whether ``after`` beats ``before`` in independent pairs. Raises ValueError as ``win_rate`` does."""
    wins, losses, ties = _outcomes(before, after)
    decided = wins + losses
    low = float(stats.beta.ppf(1 - LEVEL, wins, losses + 1)) if wins else 0.0
    p_value = float(stats.binomtest(wins, decided, alternative="greater").pvalue) if decided else 1.0
    above_half = float(stats.beta.sf(0.5, wins + 1, losses + 1))
    return WinTest((wins + ties / 2) / (decided + ties), wins, losses, ties, low, p_value, above_half)


def _outcomes(before: Sequence[float], after: Sequence[float]) -> tuple[int, int, int]:
    """Count the wins of ``after``, its losses, and ties."""
    if len(before) != len(after):
        raise ValueError(f"a win rate needs pairs: got {len(before)} values before and {len(after)} after")
    difference = _checked(after, "after") - _checked(before, "before")
    wins, losses = int((difference > 0).sum()), int((difference < 0).sum())
    return wins, losses, len(difference) - wins - losses


def _checked(values: Sequence[float], what: str) -> npt.NDArray[np.float64]:
    """Convert ``values`` to a float64 vector. Raises ValueError for no values, or values that are not finite."""
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{what} has no values: leave it out, or score at least one sample of it")
    if not np.isfinite(array).all():
        raise ValueError(f"{what} has values that are not finite: drop failed scores before averaging")
    return array
