"""How well a reward predicts preferences between two samples of a prompt, from tensors alone.

N pairs; a ``difference`` (N,) is the reward's score of the first sample less that of the second, or what a judge of
pairs says instead: 0 is a tie. ``preferred`` (N,) is the share of the preference for the first sample: 1, 0, or 1/2 for
a tie. ``prompt`` (N,) is the number of the prompt. A pair with a NaN is left out. Intervals are over prompts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import brentq
from scipy.special import stdtrit
from torch import Tensor

from genalign.metrics.intervals import Estimate, clustered_share, mean_over_tasks
from genalign.reward_learning.measures import UnmeasurableError, prompt_means

_DRAWS = 1000  # of the bootstrap, and of labels of a calibrated reward
_AT_ONCE = 100  # of these
_TAIL = 0.025
_STEEPEST = 1e4  # times the root mean square of the differences: a larger scale separates all pairs


# Accuracy


def credit(difference: Tensor, preferred: Tensor) -> Tensor:
    """Compute how right (N,) a predicted preference is: 1, 0, or 1/2 where it or the preference is a tie, but not both.

    It is 1 - |d - p| with both rounded to 0, 1/2 and 1.
    """
    right = 1 - (difference.double().sign() - (preferred.double() - 0.5).sign()).abs() / 2
    return right.masked_fill(difference.isnan() | preferred.isnan(), torch.nan)  # the sign of NaN is 0


@dataclass(frozen=True)
class PairAccuracy:
    """How often a reward prefers what was preferred.

    Attributes:
        accuracy: Without the pairs that were judged a tie; a tie of the reward counts half. None if all are ties.
        with_ties: With them: a tie counts half unless both say it.
        share_of_pairs: The accuracy with every pair counting the same, rather than every prompt; NaN if all are ties.
        pairs: Number of pairs with a difference and a preference.
        ties: Number of those that were judged a tie.
        reward_ties: Number of those on which the reward is tied.
    """

    accuracy: Estimate | None
    with_ties: Estimate
    share_of_pairs: float
    pairs: int
    ties: int
    reward_ties: int


def pair_accuracy(difference: Tensor, preferred: Tensor, prompt: Tensor) -> PairAccuracy:
    """Estimate how often a reward prefers what was preferred. Raises UnmeasurableError without a scored pair."""
    right = credit(difference, preferred)
    tied = preferred == 0.5
    decided = right.masked_fill(tied, torch.nan)
    scored = ~right.isnan()
    with_ties = clustered_share(prompt_means(right, prompt))
    untied = bool((scored & ~tied).any())
    return PairAccuracy(
        clustered_share(prompt_means(decided, prompt)) if untied else None,
        with_ties,
        float(decided.nanmean()),
        int(scored.sum()),
        int((scored & tied).sum()),
        int((scored & (difference == 0)).sum()),
    )


def margin_bins(margin: Tensor, count: int) -> list[tuple[float, float, Tensor]]:
    """Split pairs into at most ``count`` bins of about equal size by their margin (N,): (lowest, highest, rows).

    Equal margins are in one bin. NaN is in none, and a single bin is none.
    """
    values = margin[~margin.isnan()].double()
    if not len(values):
        return []
    edges = torch.quantile(values, torch.linspace(0, 1, count + 1, dtype=torch.float64)[1:-1], interpolation="lower")
    place = torch.bucketize(margin.double(), torch.unique(edges))
    bins = [(~margin.isnan() & (place == number)).nonzero()[:, 0] for number in range(int(place.max()) + 1)]
    filled = [(float(margin[rows].min()), float(margin[rows].max()), rows) for rows in bins if len(rows)]
    return filled if len(filled) > 1 else []


# One sample against several


@dataclass(frozen=True)
class WinnerAccuracy:
    """How often a reward prefers a sample to all that it was preferred to, which are several.

    Attributes:
        accuracy: The share of these samples; one that ties with k of the others counts 1 / (k + 1).
        by_chance: That of a reward that draws scores by lot.
        winners: Number of these samples.
    """

    accuracy: Estimate
    by_chance: float
    winners: int


def winner_accuracy(
    difference: Tensor, preferred: Tensor, prompt: Tensor, wins: Sequence[Sequence[int]]
) -> WinnerAccuracy:
    """Estimate how often a reward prefers a sample to all that it was preferred to.

    Args:
        difference: Differences (N,) of scores.
        preferred: Preferences (N,) for the first samples.
        prompt: The number (N,) of the prompt.
        wins: The numbers of the pairs that each sample won; those of a sample with a NaN are left out.

    Raises:
        UnmeasurableError: No sample has a score beside all that it was preferred to.
    """
    lead = torch.where(preferred > 0.5, difference, -difference)
    values, chances, prompts = list[float](), list[float](), list[int]()
    for places in wins:
        leads = lead[list(places)]
        if not bool(leads.isnan().any()):
            values.append(float(bool((leads >= 0).all())) / (1 + int((leads == 0).sum())))
            chances.append(1 / (1 + len(leads)))
            prompts.append(int(prompt[places[0]]))
    shares, by_chance = (
        prompt_means(torch.tensor(column, dtype=torch.float64), torch.tensor(prompts)) for column in (values, chances)
    )
    return WinnerAccuracy(clustered_share(shares), math.fsum(by_chance) / len(by_chance), len(values))


# Calibration


@dataclass(frozen=True)
class CalibrationBin:
    """Pairs of similar ``confidence``, the mean probability of the sample that the reward prefers, and its accuracy."""

    confidence: float
    accuracy: Estimate
    pairs: int

    def as_dict(self) -> dict[str, Any]:
        """Convert to JSON types, for ``from_dict``."""
        return {"confidence": self.confidence, "accuracy": self.accuracy.as_dict(), "pairs": self.pairs}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Self:
        """Restore a bin from ``as_dict``."""
        return cls(value["confidence"], Estimate.from_dict(value["accuracy"]), value["pairs"])


@dataclass(frozen=True)
class PreferenceCalibration:
    """How far sigmoid(scale difference) is the probability of a preference.

    Attributes:
        log_loss: Cross-entropy in nats; a coin has log 2 = 0.693.
        brier: Mean squared error of the probability; a coin has 1/4 where there are no ties.
        ece: Expected calibration error: the mean distance of confidence and accuracy over the bins.
        ece_if_calibrated: What that error would be, on average, if the probabilities were true: chance alone.
        fitted_scale: The scale with the least log loss, not below 0; infinite if the differences separate all pairs.
        fitted_log_loss: The log loss by that scale, on the same pairs.
        bins: The bins of about equal numbers of pairs, by confidence.
    """

    log_loss: Estimate
    brier: Estimate
    ece: Estimate
    ece_if_calibrated: float
    fitted_scale: Estimate
    fitted_log_loss: float
    bins: tuple[CalibrationBin, ...]


def calibration(
    difference: Tensor, preferred: Tensor, prompt: Tensor, scale: float = 1.0, bins: int = 10, seed: int = 0
) -> PreferenceCalibration:
    """Measure the calibration of preferences sigmoid(scale difference), the Bradley-Terry model.

    Every prompt counts the same, and within it every pair. The interval of the calibration error is from a bootstrap
    over prompts: chance raises the error, so the lower limit is the error less the 97.5 % quantile of the distance of
    the drawn bins from the measured ones, by the triangle inequality, and the upper one is reflected at the error.

    Args:
        difference: Differences (N,) of scores.
        preferred: Preferences (N,) for the first samples.
        prompt: The number (N,) of the prompt.
        scale: What turns differences into logits.
        bins: Number of bins of the calibration error.
        seed: Seed of the bootstrap.

    Raises:
        UnmeasurableError: No pair has a difference and a preference.
    """
    binned = _BinnedPairs.of(difference, preferred, prompt, scale, bins)
    gaps, wanted, prompts, weight = binned.gaps, binned.wanted, binned.prompts, binned.weight
    confidence, hits, place = binned.confidence, binned.hits, binned.place
    losses = F.binary_cross_entropy_with_logits(scale * gaps, wanted, reduction="none")
    squares = (torch.sigmoid(scale * gaps) - wanted).square()
    fitted = _fitted_scale(gaps, wanted, weight, prompts)
    best = scale if math.isinf(fitted.mean) else fitted.mean
    fitted_losses = F.binary_cross_entropy_with_logits(best * gaps, wanted, reduction="none")
    log_loss, brier = (mean_over_tasks({"all": prompt_means(column, prompts)}, "score") for column in (losses, squares))
    rng = np.random.default_rng(seed)
    return PreferenceCalibration(
        log_loss,
        brier,
        _calibration_error(confidence, hits, weight, prompts, place, rng),
        _chance_error(confidence, weight, place, rng),
        fitted,
        0.0 if math.isinf(fitted.mean) else float((weight * fitted_losses).sum()),
        binned.bins(),
    )


def expected_calibration_error(difference: Tensor, preferred: Tensor, prompt: Tensor, bins: int = 10) -> float:
    """Compute the calibration error of sigmoid(difference) that ``calibration`` estimates, without its interval.

    Raises UnmeasurableError where no pair has a difference and a preference.
    """
    binned = _BinnedPairs.of(difference, preferred, prompt, 1.0, bins)
    gaps = binned.weight * (binned.confidence - binned.hits)
    return float(gaps.new_zeros(bins).index_add_(0, binned.place, gaps).abs().sum())


def calibration_bins(
    difference: Tensor, preferred: Tensor, prompt: Tensor, bins: int = 10
) -> tuple[CalibrationBin, ...]:
    """Return the bins of ``expected_calibration_error``. Raises UnmeasurableError likewise."""
    return _BinnedPairs.of(difference, preferred, prompt, 1.0, bins).bins()


@dataclass(frozen=True)
class _BinnedPairs:
    """The n complete pairs, turned so that the reward prefers the first sample, in bins of like confidence, in float64.

    Attributes:
        gaps: The differences (n,), not turned.
        wanted: The preferences (n,), not turned.
        prompts: The numbers (n,) of the prompts, from 0.
        weight: The weight (n,) of each pair: that of its prompt over the number of its pairs.
        confidence: The probability (n,) of the sample that the reward prefers.
        hits: The preference (n,) for that sample; 1/2 where the reward is tied.
        place: The number (n,) of the bin.
    """

    gaps: Tensor
    wanted: Tensor
    prompts: Tensor
    weight: Tensor
    confidence: Tensor
    hits: Tensor
    place: Tensor

    @classmethod
    def of(cls, difference: Tensor, preferred: Tensor, prompt: Tensor, scale: float, bins: int) -> Self:
        complete = ~(difference.isnan() | preferred.isnan())
        if not bool(complete.any()):
            raise UnmeasurableError("no pair could be scored")
        gaps, wanted = difference[complete].double(), preferred[complete].double()
        _, prompts, sizes = torch.unique(prompt[complete], return_inverse=True, return_counts=True)
        weight = 1 / (len(sizes) * sizes.double())[prompts]
        logits = scale * gaps
        confidence = torch.sigmoid(logits.abs())
        hits = torch.where(logits < 0, 1 - wanted, wanted).masked_fill(logits == 0, 0.5)
        edges = torch.quantile(confidence, torch.linspace(0, 1, bins + 1, dtype=torch.float64)[1:-1])
        return cls(gaps, wanted, prompts, weight, confidence, hits, torch.bucketize(confidence, torch.unique(edges)))

    def bins(self) -> tuple[CalibrationBin, ...]:
        """Measure the accuracy in each bin, with its interval over prompts."""
        parts = (self.place == number for number in torch.unique(self.place).tolist())
        return tuple(
            CalibrationBin(
                float(self.confidence[part].mean()),
                clustered_share(prompt_means(self.hits[part], self.prompts[part])),
                int(part.sum()),
            )
            for part in parts
        )


def _fitted_scale(gaps: Tensor, wanted: Tensor, weight: Tensor, prompts: Tensor) -> Estimate:
    """Minimize the log loss over the scale, with the sandwich's interval over prompts."""
    count, unit = int(prompts.max()) + 1, float(gaps.square().mean().sqrt())

    def slope(scale: float) -> float:
        return float((weight * (torch.sigmoid(scale * gaps) - wanted) * gaps).sum())

    if unit == 0 or slope(0.0) >= 0:
        return Estimate(0.0, 0.0, math.inf, count)
    if slope(_STEEPEST / unit) <= 0:  # 0 where every sigmoid is 0 or 1
        return Estimate(math.inf, 0.0, math.inf, count)
    scale = float(brentq(slope, 0.0, _STEEPEST / unit, xtol=1e-12 / unit))
    probability = torch.sigmoid(scale * gaps)
    scores = torch.zeros(count, dtype=torch.float64).index_add_(0, prompts, weight * (probability - wanted) * gaps)
    curvature = float((weight * probability * (1 - probability) * gaps.square()).sum())
    if count < 2 or curvature == 0:
        return Estimate(scale, 0.0, math.inf, count)
    error = (count / (count - 1) * float(scores.square().sum())) ** 0.5 / curvature
    reach = float(stdtrit(count - 1, 1 - _TAIL)) * error
    return Estimate(scale, max(scale - reach, 0.0), scale + reach, count)


def _calibration_error(
    confidence: Tensor, hits: Tensor, weight: Tensor, prompts: Tensor, place: Tensor, rng: np.random.Generator
) -> Estimate:
    """Estimate the calibration error in fixed bins, with the interval of the bootstrap over prompts."""
    count, width = int(prompts.max()) + 1, int(place.max()) + 1
    gaps = torch.zeros(count, width, dtype=torch.float64)
    gaps.index_put_((prompts, place), weight * (confidence - hits), accumulate=True)
    error = float(gaps.sum(0).abs().sum())
    if count < 2:
        return Estimate(error, -math.inf, math.inf, count)
    measured, errors, distances = gaps.sum(0).numpy(), list[float](), list[float]()
    for _ in range(_DRAWS // _AT_ONCE):
        drawn = rng.multinomial(count, np.full(count, 1 / count), _AT_ONCE) @ gaps.numpy()
        errors += np.abs(drawn).sum(1).tolist()
        distances += np.abs(drawn - measured).sum(1).tolist()
    low = max(error - float(np.quantile(distances, 1 - _TAIL)), 0.0)
    return Estimate(error, low, max(2 * error - float(np.quantile(errors, _TAIL)), error), count)


def _chance_error(confidence: Tensor, weight: Tensor, place: Tensor, rng: np.random.Generator) -> float:
    """Average the calibration error over labels 0 and 1 that are drawn by the probabilities."""
    chances, weights = confidence.numpy(), weight.numpy()
    member = F.one_hot(place).double().numpy()
    errors = list[float]()
    for _ in range(_DRAWS // _AT_ONCE):
        labels = rng.random((_AT_ONCE, len(chances))) < chances
        errors += np.abs(((chances - labels) * weights) @ member).sum(1).tolist()
    return float(np.mean(errors))


# Positions


def position_bias(first: Tensor, prompt: Tensor) -> Estimate:
    """Estimate the mean preference (N,) for the sample that was shown first, less 1/2; 0.5 is always the first.

    Raises UnmeasurableError without a preference.
    """
    estimate = clustered_share(prompt_means(first, prompt))
    return replace(estimate, mean=estimate.mean - 0.5, low=estimate.low - 0.5, high=estimate.high - 0.5)


def order_consistency(first: Tensor, second: Tensor, prompt: Tensor) -> Estimate:
    """Estimate how often a judge prefers the same sample in both orders.

    Args:
        first: Its preferences (N,) for the first samples, which were shown first.
        second: Its preferences (N,) for the second samples, which were shown first then.
        prompt: The number (N,) of the prompt.

    Raises:
        UnmeasurableError: No pair was judged in both orders.
    """
    same = ((first - 0.5) * (0.5 - second) > 0).double()
    return clustered_share(prompt_means(same.masked_fill(first.isnan() | second.isnan(), torch.nan), prompt))


# Annotators


@dataclass(frozen=True)
class Votes:
    """V preferences of annotators, one for each annotator and pair that it judged.

    Attributes:
        pair: The number (V,) long of the pair.
        preferred: The preference (V,) for the pair's first sample.
        annotators: Who judged (V).
    """

    pair: Tensor
    preferred: Tensor
    annotators: tuple[str, ...]


@dataclass(frozen=True)
class AnnotatorAgreement:
    """How often two agree on pairs; a tie counts half unless both say it.

    Attributes:
        with_reward: The annotator with the reward, on all pairs that the annotator judged.
        with_others: The annotator with the majority of the other annotators, where there are others.
        reward_with_others: The reward with the majority of the same others, on the same pairs.
        pairs: Number of pairs that the annotator judged and the reward scored.
    """

    with_reward: Estimate
    with_others: Estimate | None
    reward_with_others: Estimate | None
    pairs: int


def annotator_agreement(votes: Votes, difference: Tensor, prompt: Tensor) -> dict[str, AnnotatorAgreement]:
    """Measure the agreement of each annotator with the reward and with the other annotators, and that of the reward.

    Args:
        votes: The preferences.
        difference: The differences (N,) of the pairs by the reward.
        prompt: The number (N,) of the prompt of each pair.

    Returns:
        By annotator, and under "" of all annotators together: there ``with_others`` is how far annotators agree if each
        is left out in turn, and ``reward_with_others`` how far the reward agrees as one more annotator.

    Raises:
        UnmeasurableError: No pair could be scored.
    """
    totals = torch.zeros(len(difference), dtype=torch.float64).index_add_(0, votes.pair, votes.preferred.double())
    counts = torch.bincount(votes.pair, minlength=len(difference))[votes.pair]
    others = (totals[votes.pair] - votes.preferred) / (counts - 1)  # NaN or infinite without others
    others = others.masked_fill(counts < 2, torch.nan)
    predicted = difference[votes.pair].double()
    columns = [
        credit(predicted, votes.preferred),
        credit(votes.preferred.double() - 0.5, others).masked_fill(predicted.isnan(), torch.nan),
        credit(predicted, others),
    ]
    if bool(columns[0].isnan().all()):
        raise UnmeasurableError("no pair could be scored")
    names = ["", *dict.fromkeys(votes.annotators)]
    result = {}
    for name in names:
        rows = torch.tensor([name in ("", own) for own in votes.annotators])
        own, at = [column[rows] for column in columns], prompt[votes.pair[rows]]
        with_reward, with_others, reward_with_others = (
            None if bool(column.isnan().all()) else clustered_share(prompt_means(column, at)) for column in own
        )
        if with_reward is not None:
            pairs = int((~own[0].isnan()).sum())
            result[name] = AnnotatorAgreement(with_reward, with_others, reward_with_others, pairs)
    return result
