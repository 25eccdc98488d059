"""Means with 95 % confidence intervals, and win rates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import scipy
from scipy.special import betainccinv, betaincinv, ndtri, stdtrit

LEVEL = 0.95
_TAIL = (1 - LEVEL) / 2
WELCH_PROMPTS = 4
"""Of each task: with 3 beside large tasks the interval of Welch and Satterthwaite covers 92 %, and with 2 only 87 %."""
MIN_REPEATS = 5
"""Of a median: the range of four values covers 87.5 %, that of five 93.75 %."""

Kind = Literal["score", "share", "share difference"]
"""What is averaged: scores; shares, the means of zeros and ones; or paired differences in [-1, 1] (difference_kind)."""


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % confidence interval, from ``n`` independent units: prompts, seeds or trials.

    ``low`` and ``high`` are infinite where no narrower interval would cover the truth as often as it says.
    """

    mean: float
    low: float
    high: float
    n: int

    @property
    def has_interval(self) -> bool:
        """Whether there is an interval to print; an interval without width says only that the values are equal."""
        return math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high

    @property
    def no_interval(self) -> str:
        """Why there is no interval, and how many prompts would give one."""
        if self.low == self.high:
            return "no interval: all values are equal" if self.n > 1 else "no interval: a single value"
        return f"no interval: it needs 2 or more prompts{' in every task' if self.n > 1 else ''}"

    def text(self, form: str) -> str:
        """Format mean and interval by a format specification: "+0.03 (+0.01 to +0.05)" for "+.2f"."""
        interval = f"{self.low:{form}} to {self.high:{form}}" if self.has_interval else self.no_interval
        return f"{self.mean:{form}} ({interval})"

    def as_dict(self) -> dict[str, float | None]:
        """Convert to JSON types, with null for infinite limits."""
        return {name: value if math.isfinite(value) else None for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Estimate:
        """Restore an estimate from ``as_dict``."""
        low, high = (-math.inf if value["low"] is None else value["low"]), value["high"]
        return cls(value["mean"], low, math.inf if high is None else high, value["n"])


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


def mean_over_tasks(values_by_task: Mapping[str, Sequence[float]], kind: Kind) -> Estimate:
    """Estimate the unweighted mean over tasks of the mean over prompts (GenEval's overall).

    A value is one prompt's mean over its samples, so a prompt's samples count as one draw. The interval depends on
    what the values are, by ``kind``:

    score             Student's, with Welch and Satterthwaite's degrees of freedom over the tasks. Where one of several
                      tasks has under WELCH_PROMPTS prompts, the tasks' own intervals, combined by their squared
                      distances from the means (Zou and Donner, Statistics in Medicine 27, 2008); infinite where a task
                      has one prompt
    share             Clopper and Pearson's exact interval. Of several tasks the wider one of two: the tasks' own
                      limits, combined as above; and those of one share of K^2 / sum(1 / n_k) trials, for n_k prompts
                      in each of K tasks, which has the variance of the mean if the tasks' shares are equal
    share difference  the same combination of the intervals of the mean improvement and of the mean loss, with their
                      multinomial correlation; where several samples share a prompt, of as many trials as explain the
                      variance over prompts (Korn and Graubard, Survey Methodology 24, 1998); of several tasks as above

    Args:
        values_by_task: Finite values of every task, one per prompt.
        kind: What the values are.

    Returns:
        The mean with its interval, and the number of prompts.

    Raises:
        ValueError: There is no task, or a task has no values or a value that is not finite or possible.
    """
    if not values_by_task:
        raise ValueError("there is nothing to average: give at least one task")
    tasks = [_checked(values, f"task {task!r}") for task, values in values_by_task.items()]
    mean, n = float(np.mean([values.mean() for values in tasks])), sum(map(len, tasks))
    if kind == "score":
        reach = _reach_of_scores(tasks)
        return Estimate(mean, mean - reach, mean + reach, n)
    least = 0 if kind == "share" else -1
    if any(values.min() < least or values.max() > 1 for values in tasks):
        raise ValueError(f"a {kind} is in [{least}, 1]: average such values as scores")
    _, freedom = _variance(tasks)
    low, high = _share_of_tasks(tasks, kind, freedom)
    if len(tasks) > 1:
        own = [(values.mean(), *_share_of_tasks([values], kind, freedom)) for values in tasks]
        low = min(low, mean - math.hypot(*(m - task_low for m, task_low, _ in own)) / len(tasks))
        high = max(high, mean + math.hypot(*(task_high - m for m, _, task_high in own)) / len(tasks))
    return Estimate(mean, max(low, least), min(high, 1.0), n)


def _reach_of_scores(tasks: Sequence[npt.NDArray[np.float64]]) -> float:
    """Return half the length of the interval of a mean over tasks of scores."""
    if len(tasks) > 1 and 1 < min(map(len, tasks)) < WELCH_PROMPTS:
        own = (float(stdtrit(freedom, 1 - _TAIL)) * variance**0.5 for variance, freedom in map(_variance, zip(tasks)))
        return math.hypot(*own) / len(tasks)
    variance, freedom = _variance(tasks)
    reach: float = float(stdtrit(freedom, 1 - _TAIL)) * variance**0.5
    return reach


def _share_of_tasks(tasks: Sequence[npt.NDArray[np.float64]], kind: Kind, freedom: float) -> tuple[float, float]:
    """Find the limits of the mean of the tasks' shares, or of their differences, as of one share or difference.

    Args:
        tasks: The values of each task.
        kind: "share" or "share difference".
        freedom: The degrees of freedom of the variance over prompts.
    """
    better, worse = (float(np.mean([(sign * values).clip(0).mean() for values in tasks])) for sign in (1, -1))
    trials = len(tasks) ** 2 / sum(1 / len(values) for values in tasks)
    if kind == "share":
        return _share_limits(better, trials)
    variance, _ = _variance(tasks)
    if 0 < variance < math.inf:  # explains as many trials, and more where a prompt has a mean of several differences
        explained = (better + worse - (better - worse) ** 2) / variance
        trials = max(trials, explained * float(ndtri(1 - _TAIL) / stdtrit(freedom, 1 - _TAIL)) ** 2)
    return _difference_limits(better, worse, trials)


def _variance(tasks: Sequence[npt.NDArray[np.float64]]) -> tuple[float, float]:
    """The variance of the mean over tasks, and its degrees of freedom (Welch and Satterthwaite).

    The variance is infinite where a task has one value, and its degrees of freedom 1 where it is 0.
    """
    counts = np.array([len(values) for values in tasks])
    if counts.min() < 2:
        return math.inf, 1.0
    variances = np.array([values.var(ddof=1) / len(values) for values in tasks]) / len(tasks) ** 2
    total, squares = float(variances.sum()), float((variances**2 / (counts - 1)).sum())
    return total, (total**2 / squares if squares > 0 else 1.0)


def share(successes: float, n: int) -> Estimate:
    """Estimate a share with the exact interval (Clopper and Pearson 1934); half successes are allowed.

    Raises:
        ValueError: no trial, or more successes than trials.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"{successes} successes in {n} trials is no share: need n >= 1 and 0 <= successes <= n")
    return Estimate(successes / n, *_share_limits(successes / n, n), n)


def _share_limits(mean: float, trials: float) -> tuple[float, float]:
    """Clopper and Pearson's limits of a share, also for fractions of trials."""
    successes = mean * trials
    failures = max(trials - successes, 0.0)
    low = float(betaincinv(successes, failures + 1, _TAIL)) if successes > 0 else 0.0
    high = float(betainccinv(successes + 1, failures, _TAIL)) if failures > 0 else 1.0
    return min(low, mean), max(high, mean)


def _difference_limits(better: float, worse: float, trials: float) -> tuple[float, float]:
    """Zou and Donner's limits of the difference of two shares of the same trials that exclude each other."""
    mean = better - worse
    (b_low, b_high), (w_low, w_high) = _share_limits(better, trials), _share_limits(worse, trials)
    spread = (better * (1 - better) * worse * (1 - worse)) ** 0.5
    correlation = -min(1.0, better * worse / spread) if spread > 0 else -1.0

    def reach(a: float, b: float) -> float:
        return float(max(a * a + b * b - 2 * correlation * a * b, 0.0) ** 0.5)

    low, high = mean - reach(better - b_low, w_high - worse), mean + reach(b_high - better, worse - w_low)
    return max(low, -1.0), min(high, 1.0)


def clustered_share(values: Sequence[float]) -> Estimate:
    """Estimate a share from each prompt's own share, where prompts have many trials or few.

    The interval is Clopper and Pearson's. Its number of trials is the number of prompts, n, or, if more would explain
    the variance over prompts (Korn and Graubard, Survey Methodology 24, 1998), their geometric mean: trials of a prompt
    that agree count as one. That mean is our rule: as many as explain the variance cover 83 % where 30 prompts are
    almost all right and few almost all wrong, since the variance is then too small in most draws.

    Args:
        values: The share of each prompt, in [0, 1]; half successes are allowed.

    Returns:
        The mean over prompts with its interval, and the number of prompts.

    Raises:
        ValueError: There is no value, or one outside of [0, 1].
    """
    array = _checked(values, "the list of shares")
    if array.min() < 0 or array.max() > 1:
        raise ValueError("a share is in [0, 1]: average such values as scores")
    mean, (variance, freedom), trials = float(array.mean()), _variance([array]), float(len(array))
    if 0 < variance < math.inf:
        explained = mean * (1 - mean) / variance
        explained *= float(ndtri(1 - _TAIL) / stdtrit(freedom, 1 - _TAIL)) ** 2
        trials = max(trials, (trials * explained) ** 0.5)
    return Estimate(mean, *_share_limits(mean, trials), len(array))


def jackknife(whole: float, left_out: Sequence[float]) -> Estimate:
    """Estimate a statistic of n independent units, such as prompts, from its values without each of them.

    The interval is Student's, with the jackknife's standard error (Tukey, Annals of Mathematical Statistics 29, 1958).
    Where few units have most of the influence there are fewer degrees of freedom than n - 1: with the values' distances
    d from their mean, 3 (sum d^2)^2 / sum d^4 - 1, which is about n - 1 for normal distances (our rule; without it the
    interval of a correlation covers 91 % where the units' spreads differ much). The interval is infinite for a single
    unit, and where a value is not finite.
    """
    n, values = len(left_out), np.asarray(left_out, np.float64)
    if n < 2 or not (np.isfinite(values).all() and math.isfinite(whole)):
        return Estimate(whole, -math.inf, math.inf, n)
    squares = (values - values.mean()) ** 2
    total, fourth = float(squares.sum()), float((squares**2).sum())
    freedom = min(max(3 * total**2 / fourth - 1, 1.0), n - 1.0) if fourth > 0 else 1.0
    reach = float(stdtrit(freedom, 1 - _TAIL)) * ((n - 1) / n * total) ** 0.5
    return Estimate(whole, whole - reach, whole + reach, n)


def difference_kind(pairs: Sequence[tuple[float, float]], zeros_and_ones: bool) -> Kind:
    """Say which interval suits the differences of (before, after) pairs of prompt means.

    Those of zeros and ones are share differences. So are those of other scores in [0, 1] that most prompts leave as
    they were: of few changes Student's interval covers 90 % (the tests simulate it).
    """
    bounded = all(0 <= value <= 1 for pair in pairs for value in pair)
    unchanged = sum(before == after for before, after in pairs)
    return "share difference" if zeros_and_ones or (bounded and 2 * unchanged > len(pairs)) else "score"


def effect_size(gain: float, means: Sequence[tuple[float, float]]) -> float:
    """Divide a gain by the standard deviation over prompts (Cohen's d_av) of their (before, after) means.

    The variance is the mean of the two sides' variances. The effect size is infinite for a gain without any spread,
    and 0 for no gain.
    """
    if gain == 0:
        return 0.0
    variance = sum(float(np.var(side, ddof=1)) for side in zip(*means, strict=True)) / 2 if len(means) > 1 else 0.0
    return gain / variance**0.5 if variance > 0 else math.copysign(math.inf, gain)


def t_interval(values: Sequence[float]) -> Estimate:
    """Estimate the mean over independent repetitions, such as training seeds, with Student's interval.

    Raises:
        ValueError: fewer than two values, or one that is not finite.
    """
    array = _checked(values, "the list")
    if len(array) < 2:
        raise ValueError("an interval over seeds needs at least two of them, and three to be of use")
    mean, error = float(array.mean()), float(array.std(ddof=1)) / len(array) ** 0.5
    reach = float(scipy.stats.t.isf(_TAIL, len(array) - 1)) * error
    return Estimate(mean, mean - reach, mean + reach, len(array))


def welch_interval(first: Sequence[float], second: Sequence[float]) -> Estimate:
    """Estimate the difference of the means of two independent groups, such as the seeds of two methods (Welch 1947).

    The interval is infinite where a group has a single value. ``n`` is the size of the smaller group.

    Raises:
        ValueError: no value, or one that is not finite.
    """
    groups = [_checked(first, "the first group"), _checked(second, "the second group")]
    difference, least = float(groups[0].mean() - groups[1].mean()), min(map(len, groups))
    if least < 2:
        return Estimate(difference, -math.inf, math.inf, least)
    variances = [float(group.var(ddof=1)) / len(group) for group in groups]
    squares = sum(variance**2 / (len(group) - 1) for variance, group in zip(variances, groups, strict=True))
    freedom = sum(variances) ** 2 / squares if squares > 0 else 1.0
    reach = float(stdtrit(freedom, 1 - _TAIL)) * sum(variances) ** 0.5
    return Estimate(difference, difference - reach, difference + reach, least)


def median_interval(values: Sequence[float]) -> Estimate:
    """Estimate the median of repeated measurements, with its exact interval from order statistics.

    The interval of five values, their range, covers 93.75 %, and that of more at least 95 %; fewer give none.

    Raises:
        ValueError: no value, or one that is not finite.
    """
    array = np.sort(_checked(values, "the list"))
    if len(array) < MIN_REPEATS:
        return Estimate(float(np.median(array)), -math.inf, math.inf, len(array))
    rank = max(0, int(scipy.stats.binom.ppf(_TAIL, len(array), 0.5)) - 1)
    return Estimate(float(np.median(array)), float(array[rank]), float(array[-1 - rank]), len(array))


def joined(prompts: Estimate, seeds: Estimate) -> Estimate:
    """Join the intervals of one mean over prompts and over seeds: their distances from the mean add in squares.

    Prompts and seeds are two draws, and either interval alone holds for the other's draw as it was. ``n`` counts the
    prompts.

    Raises:
        ValueError: the means differ.
    """
    if not np.isclose(prompts.mean, seeds.mean, rtol=1e-6, atol=1e-9):
        raise ValueError(f"intervals of two different means, {prompts.mean:g} and {seeds.mean:g}, cannot be joined")
    mean = prompts.mean
    low, high = (math.hypot(getattr(prompts, side) - mean, getattr(seeds, side) - mean) for side in ("low", "high"))
    return Estimate(mean, mean - low, mean + high, prompts.n)


def win_rate(before: Sequence[float], after: Sequence[float]) -> WinRate:
    """Estimate how often ``after`` beats ``before``, a tie as half, with the exact interval for independent pairs.

    Where several pairs share a prompt, pass the per-prompt means.

    Raises:
        ValueError: lists of different lengths, empty, or with a value that is not finite.
    """
    wins, losses, ties = _outcomes(before, after)
    n = wins + losses + ties
    p_value = float(scipy.stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
    return WinRate(share(wins + ties / 2, n), ties / n, p_value)


def win_test(before: Sequence[float], after: Sequence[float]) -> WinTest:
    """Test whether ``after`` beats ``before`` in independent pairs. Raises ValueError as ``win_rate`` does."""
    wins, losses, ties = _outcomes(before, after)
    decided = wins + losses
    low = float(scipy.stats.beta.ppf(1 - LEVEL, wins, losses + 1)) if wins else 0.0
    p_value = float(scipy.stats.binomtest(wins, decided, alternative="greater").pvalue) if decided else 1.0
    above_half = float(scipy.stats.beta.sf(0.5, wins + 1, losses + 1))
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
