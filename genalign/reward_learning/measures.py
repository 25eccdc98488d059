"""How well scores order the samples of a prompt, from tensors alone.

The functions take the scores, the truth and the number of the prompt of n samples, each (n,); the truth is higher for
better samples: ratings, or another reward such as a verifier. A sample with a NaN among what a measure takes is left
out of it. Intervals are over prompts.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import scipy
import torch
from torch import Tensor

from genalign.metrics.intervals import Estimate, clustered_share, jackknife, mean_over_tasks

_ROUNDING = 1e-13  # of the mean square: a variance within prompts that is no more is that of float32


class UnmeasurableError(ValueError):
    """The data do not allow a measure; the message says why."""


def by_prompt(prompt: Tensor, *columns: Tensor) -> list[tuple[Tensor, ...]]:
    """Split columns (n,) into those of each prompt in float64, without the rows in which a column is NaN."""
    values = [column.detach().double().cpu() for column in columns]
    complete = ~torch.stack(values).isnan().any(0)
    finite = [column[complete] for column in values]
    order = torch.argsort(prompt.cpu()[complete], stable=True)
    sizes = torch.unique(prompt.cpu()[complete], return_counts=True)[1].tolist()
    return list(zip(*(torch.split(column[order], sizes) for column in finite), strict=True)) if sizes else []


def prompt_means(values: Tensor, prompt: Tensor) -> list[float]:
    """Average values (n,) within each prompt; NaN is left out. Raises UnmeasurableError where nothing is left."""
    means = [float(own.mean()) for (own,) in by_prompt(prompt, values)]
    if not means:
        raise UnmeasurableError("nothing could be scored")
    return means


def _score_estimate(values: list[float]) -> Estimate:
    return mean_over_tasks({"all": values}, "score")


# Best of n


@dataclass(frozen=True)
class BestOfNCurve:
    """The truth of the sample with the highest score among n, for n = 1..N.

    Attributes:
        kl: Upper bound log n - (n - 1) / n of the KL divergence (nats) of the best of n from a single sample; exact if
            no two samples score alike (Beirami et al., arXiv 2401.01879).
        truth: The expected truth of the best of n.
        gain: The truth above that of a single sample, paired by prompt.
        scores: The expected score of the best of n, by the reward itself.
        left_out: Number of prompts with fewer than N samples.
    """

    kl: tuple[float, ...]
    truth: tuple[Estimate, ...]
    gain: tuple[Estimate, ...]
    scores: tuple[Estimate, ...]
    left_out: int

    def __len__(self) -> int:
        return len(self.kl)


@functools.lru_cache(maxsize=64)
def _weights_of_best(count: int, largest: int) -> Tensor:
    """The probability (largest, count) that the i-th lowest of ``count`` is the best of n drawn without replacement."""
    rows = [[math.comb(place, n - 1) / math.comb(count, n) for place in range(count)] for n in range(1, largest + 1)]
    return torch.tensor(rows, dtype=torch.float64)


def expected_best(scores: Tensor, values: Tensor, largest: int) -> Tensor:
    """Compute the expected value (largest,) float64 of the sample with the highest score among n, for n = 1..largest.

    The mean over all subsets of n of the N samples, sum_i C(i - 1, n - 1) / C(N, n) v_(i) in the order of the scores,
    is an unbiased estimate for n independent samples. Samples that score alike are drawn by lot.

    Args:
        scores: Scores (N,) that choose.
        values: What the chosen sample is worth (N,).
        largest: Largest n, at most N.
    """
    order = torch.argsort(scores)
    _, level, sizes = torch.unique(scores[order], return_inverse=True, return_counts=True)
    totals = torch.zeros(len(sizes), dtype=torch.float64).index_add_(0, level, values[order].double())
    expected: Tensor = _weights_of_best(len(scores), largest) @ (totals / sizes)[level]
    return expected


def best_of_n(scores: Tensor, truth: Tensor, prompt: Tensor, largest: int | None = None) -> BestOfNCurve:
    """Estimate the truth of the best of n samples by the scores, for n = 1..N, without drawing any again.

    Args:
        scores: Scores (n,) of the reward.
        truth: The truth (n,).
        prompt: The number (n,) of the prompt.
        largest: N; None takes the (lower) median number of samples of a prompt. Prompts with fewer are left out.

    Raises:
        UnmeasurableError: No prompt has as many samples, or N is 1.
    """
    groups = by_prompt(prompt, scores, truth)
    if largest is None:
        sizes = sorted(len(own) for own, _ in groups)
        largest = sizes[(len(sizes) - 1) // 2] if sizes else 0
    usable = [group for group in groups if len(group[0]) >= largest]
    if largest < 2 or not usable:
        raise UnmeasurableError("no prompt has as many scored samples as the best is taken of, two or more")
    truths = torch.stack([expected_best(own, worth, largest) for own, worth in usable])  # (P, N)
    scored = torch.stack([expected_best(own, own, largest) for own, _ in usable])
    return BestOfNCurve(
        tuple(math.log(n) - (n - 1) / n for n in range(1, largest + 1)),
        tuple(_score_estimate(column) for column in truths.T.tolist()),
        tuple(_score_estimate(column) for column in (truths - truths[:, :1]).T.tolist()),
        tuple(_score_estimate(column) for column in scored.T.tolist()),
        len(groups) - len(usable),
    )


# Orders within a prompt


@dataclass(frozen=True)
class RankAgreement:
    """How far scores order the samples of a prompt as the truth does.

    Attributes:
        tau: Kendall's tau-b, a mean over prompts; 0 for a prompt whose samples score alike.
        best_found: How often the sample with the highest score is one with the highest truth.
        by_chance: How often a sample drawn at random is.
        left_out: Number of prompts with one sample, or whose samples are all equally good.
    """

    tau: Estimate
    best_found: Estimate
    by_chance: float
    left_out: int


def rank_agreement(scores: Tensor, truth: Tensor, prompt: Tensor) -> RankAgreement:
    """Compare the order by scores (n,) with the order by truth (n,) within each prompt (n,).

    Raises UnmeasurableError where no prompt has two samples of different truth.
    """
    groups = by_prompt(prompt, scores, truth)
    usable = [(own, worth) for own, worth in groups if bool((worth != worth[0]).any())]
    if not usable:
        raise UnmeasurableError("no prompt has two scored samples of different truth")
    taus, hits, chance = list[float](), list[float](), list[float]()
    for own, worth in usable:
        tau = float(scipy.stats.kendalltau(own.numpy(), worth.numpy()).statistic)
        taus.append(0.0 if math.isnan(tau) else tau)
        best = (worth == worth.max()).double()
        hits.append(float(best[own == own.max()].mean()))  # by lot among those that score alike
        chance.append(float(best.mean()))
    by_chance = math.fsum(chance) / len(chance)
    return RankAgreement(_score_estimate(taus), clustered_share(hits), by_chance, len(groups) - len(usable))


# Variation within prompts


@dataclass(frozen=True)
class _Moments:
    """Sums of products within prompts, (P, c, c), of c columns less their means within the prompt.

    ``freedom`` (P,) are the numbers of samples less one, and a column that does not vary within prompts has zeros.
    """

    products: Tensor
    freedom: Tensor

    @property
    def total(self) -> Tensor:
        """The sums over all prompts, (c, c)."""
        return self.products.sum(0)

    @property
    def left_out(self) -> Tensor:
        """The sums over all prompts but one, (P, c, c)."""
        return self.total - self.products


def _moments(prompt: Tensor, *columns: Tensor) -> _Moments:
    """Sum the products within prompts. Raises UnmeasurableError where no prompt has two complete samples."""
    groups = [torch.stack(group, dim=1) for group in by_prompt(prompt, *columns) if len(group[0]) > 1]
    if not groups:
        raise UnmeasurableError("no prompt has two scored samples")
    centered = [group - group.mean(0) for group in groups]
    products = torch.stack([group.T @ group for group in centered])
    squares = torch.stack([group.square().sum(0) for group in groups]).sum(0)
    constant = products.sum(0).diagonal() <= _ROUNDING * squares
    products[:, constant, :] = 0
    products[:, :, constant] = 0
    return _Moments(products, torch.tensor([len(group) - 1.0 for group in groups], dtype=torch.float64))


def _correlation(products: Tensor) -> Tensor:
    """Compute correlations (...) from the sums of products (..., 2, 2); NaN without variation."""
    spread = (products[..., 0, 0] * products[..., 1, 1]).sqrt()
    return (products[..., 0, 1] / spread).clamp(-1, 1)


def _correlation_estimate(moments: _Moments) -> Estimate:
    """Estimate a correlation with the jackknife's interval on Fisher's scale, atanh."""
    whole, left_out = float(_correlation(moments.total)), _correlation(moments.left_out)
    if abs(whole) > 1 - 1e-12:
        return Estimate(whole, whole, whole, len(left_out))
    scaled = jackknife(math.atanh(whole), left_out.atanh().tolist())
    return Estimate(whole, math.tanh(scaled.low), math.tanh(scaled.high), scaled.n)


def correlation_within_prompts(first: Tensor, second: Tensor, prompt: Tensor) -> Estimate:
    """Estimate the correlation of two columns (n,) less their means within each prompt (n,).

    Raises UnmeasurableError where one of them does not vary within prompts.
    """
    moments = _moments(prompt, first, second)
    if bool((moments.total.diagonal() == 0).any()):
        raise UnmeasurableError("it is the same for all samples of a prompt")
    return _correlation_estimate(moments)


def starc_distance(first: Tensor, second: Tensor, prompt: Tensor) -> Estimate:
    """Estimate the STARC distance of two rewards from their scores (n,) of the samples of prompts (n,), in [0, 1].

    A STARC metric (Skalse et al., arXiv 2309.15257) is the distance of standardized rewards: canonicalized, which
    removes all that no policy's order depends on, and divided by their norm. A generator makes one sample from a prompt
    and the episode ends, a bandit without dynamics, so the value-adjusted levelling of the paper, R(s, a) - V(s)
    of the uniform policy, is a score less the mean of its prompt. With Euclidean norms, over samples, and half the
    Euclidean distance this is sqrt((1 - rho) / 2) of their correlation within prompts: 0 for rewards that differ by a
    positive factor and a constant for each prompt, 1 for opposite ones. A reward that is constant within prompts
    stays zero, as in the paper: at 1/2 from any other, and at 0 from another such one.

    Raises UnmeasurableError where no prompt has two samples with both scores.
    """
    moments = _moments(prompt, first, second)
    varies = (moments.total.diagonal() > 0).tolist()
    if not all(varies):
        distance = 0.5 if any(varies) else 0.0
        return Estimate(distance, distance, distance, len(moments.products))
    rho = _correlation_estimate(moments)
    nearest, mean, farthest = (math.sqrt((1 - value) / 2) for value in (rho.high, rho.mean, rho.low))
    return Estimate(mean, nearest, farthest, rho.n)


@dataclass(frozen=True)
class NuisanceReport:
    """How far scores follow nuisances within prompts.

    Attributes:
        correlations: The correlation with each nuisance within prompts.
        explained: The share of the variance within prompts that a linear function of all of them explains, adjusted
            for their number; at least 0.
        constant: The names of those that do not vary within prompts.
    """

    correlations: Mapping[str, Estimate]
    explained: Estimate
    constant: tuple[str, ...]


def nuisance_report(scores: Tensor, nuisances: Mapping[str, Tensor], prompt: Tensor) -> NuisanceReport:
    """Correlate scores (n,) with named nuisances (n,) within each prompt (n,).

    Raises UnmeasurableError where the scores or all nuisances are constant within prompts, or there are not more
    samples than prompts and nuisances.
    """
    correlations = dict[str, Estimate]()
    for name, values in nuisances.items():
        moments = _moments(prompt, scores, values)
        scores_vary, varies = (moments.total.diagonal() > 0).tolist()
        if not scores_vary:
            raise UnmeasurableError("the samples of each prompt score alike")
        if varies:
            correlations[name] = _correlation_estimate(moments)
    if not correlations:
        raise UnmeasurableError("no nuisance varies within prompts")
    moments = _moments(prompt, scores, *(nuisances[name] for name in correlations))
    freedom = moments.freedom.sum()
    if float(freedom) <= len(correlations) + 1:
        raise UnmeasurableError(f"{len(correlations)} nuisances need more samples of a prompt")
    whole = float(_explained(moments.total, freedom))
    scaled = jackknife(whole, _explained(moments.left_out, freedom - moments.freedom).tolist())
    mean, low, high = (float(np.clip(value, 0, 1)) for value in (whole, scaled.low, scaled.high))
    explained = Estimate(mean, low, high, scaled.n)
    constant = tuple(name for name in nuisances if name not in correlations)
    return NuisanceReport(correlations, explained, constant)


def _explained(products: Tensor, freedom: Tensor) -> Tensor:
    """Compute the adjusted share (...) that the other columns explain of the first, from sums (..., c, c)."""
    scale = products.diagonal(dim1=-2, dim2=-1).sqrt().clamp(min=1e-300)
    matrix = products / scale[..., :, None] / scale[..., None, :]
    others, target = matrix[..., 1:, 1:], matrix[..., 1:, :1]
    inverse = torch.linalg.pinv(others, hermitian=True, rtol=1e-9)
    share = (target.mT @ inverse @ target)[..., 0, 0]
    rank = torch.linalg.matrix_rank(others, hermitian=True, rtol=1e-9)
    adjusted: Tensor = 1 - (1 - share) * freedom / (freedom - rank)
    return adjusted
