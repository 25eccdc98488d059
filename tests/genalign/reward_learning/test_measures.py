"""Best of n by enumeration, ranks by scipy, STARC's invariances, and nuisances that were planted."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from scipy.stats import kendalltau

from genalign.reward_learning.measures import (
    UnmeasurableError,
    best_of_n,
    correlation_within_prompts,
    expected_best,
    nuisance_report,
    rank_agreement,
    starc_distance,
)

REPEATS = 100


def _drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scores", [[0.3, -1.0, 2.0, 0.7, 0.1], [1.0, 0.0, 1.0, 1.0, 0.0], [0.0] * 5])
def test_the_best_of_n_is_the_mean_over_all_subsets(scores: list[float]) -> None:
    """Of samples with the same highest score in a subset, each is the best equally often."""
    truth = [0.2, 0.9, 0.4, -0.3, 0.5]
    expected = []
    for n in range(1, 6):
        of_subsets = []
        for subset in itertools.combinations(range(5), n):
            top = max(scores[i] for i in subset)
            best = [truth[i] for i in subset if scores[i] == top]
            of_subsets.append(sum(best) / len(best))
        expected.append(sum(of_subsets) / len(of_subsets))
    computed = expected_best(torch.tensor(scores), torch.tensor(truth), 5)
    assert computed.tolist() == pytest.approx(expected, abs=1e-7)


def test_a_curve_of_the_best_of_n_by_hand() -> None:
    """Prompt 0: 1 / 2, (1 + 0.5 + 0.5) / 3 and 1 / 2. Prompt 1: 1, (0 + 2 + 2) / 3 and 2. A third has fewer samples."""
    scores = torch.tensor([1.0, 2.0, 3.0, 5.0, 6.0, 7.0, 9.0, 1.0, math.nan])
    truth = torch.tensor([0.0, 1.0, 0.5, 1.0, 0.0, 2.0, math.nan, 4.0, 8.0])
    curve = best_of_n(scores, truth, torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2]))
    assert len(curve) == 3 and curve.left_out == 1
    assert [one.mean for one in curve.truth] == pytest.approx([0.75, (2 / 3 + 4 / 3) / 2, 1.25])
    assert [one.mean for one in curve.gain] == pytest.approx([0.0, 0.25, 0.5])
    assert curve.scores[2].mean == pytest.approx(5.0) and curve.truth[0].n == 2
    assert curve.kl == pytest.approx((0.0, math.log(2) - 0.5, math.log(3) - 2 / 3))
    assert len(best_of_n(scores, truth, torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2]), largest=2)) == 2
    with pytest.raises(UnmeasurableError, match="two or more"):
        best_of_n(scores, truth, torch.arange(9))


def test_ranks_within_prompts() -> None:
    """The third prompt's scores are equal, the fourth's truth is, and the fifth has one sample."""
    prompt = torch.tensor([0] * 5 + [1] * 4 + [2, 2, 3, 3, 4])
    scores = torch.cat([_drawn(0, 5), torch.tensor([1.0, 1.0, 2.0, 0.0]), torch.tensor([1.0, 1.0, 1.0, 2.0, 0.0])])
    truth = torch.cat([_drawn(1, 5), torch.tensor([0.0, 1.0, 1.0, 0.0]), torch.tensor([0.0, 1.0, 3.0, 3.0, 0.0])])
    result = rank_agreement(scores, truth, prompt)
    taus = [kendalltau(scores[prompt == k].numpy(), truth[prompt == k].numpy()).statistic for k in (0, 1)]
    assert result.tau.mean == pytest.approx((taus[0] + taus[1] + 0) / 3) and result.left_out == 2
    first = float(scores[:5].argmax() == truth[:5].argmax())
    assert result.best_found.mean == pytest.approx((first + 1 + 0.5) / 3)
    assert result.by_chance == pytest.approx((1 / 5 + 2 / 4 + 1 / 2) / 3)
    with pytest.raises(UnmeasurableError, match="different truth"):
        rank_agreement(scores, torch.ones(14), prompt)


def test_the_distance_ignores_what_no_order_depends_on() -> None:
    prompt = torch.arange(12).repeat_interleave(3)
    scores, other, shift = _drawn(2, 36), _drawn(3, 36), 10 * _drawn(4, 12)[prompt]
    assert starc_distance(scores, 7 * scores + shift, prompt).mean == pytest.approx(0, abs=1e-7)
    assert starc_distance(scores, shift - 0.1 * scores, prompt).mean == pytest.approx(1)
    distance = starc_distance(scores, other, prompt)
    assert distance.low < distance.mean < distance.high <= 1 and distance.n == 12
    assert starc_distance(other, 3 * scores + shift, prompt).mean == pytest.approx(distance.mean)
    centered = [(x - torch.stack([x[prompt == k].mean() for k in range(12)])[prompt]) for x in (scores, other)]
    first, second = (x / x.norm() for x in centered)
    assert distance.mean == pytest.approx(float((first - second).norm()) / 2)


def test_a_reward_that_is_constant_within_prompts_stays_at_zero() -> None:
    prompt = torch.arange(4).repeat_interleave(3)
    constant = torch.tensor([0.1, 0.7, 0.3, 0.9])[prompt]
    assert starc_distance(_drawn(0, 12), constant, prompt).mean == 0.5
    assert starc_distance(constant, 2 * constant, prompt).mean == 0
    with pytest.raises(UnmeasurableError, match="no prompt has two scored samples"):
        starc_distance(_drawn(0, 4), _drawn(1, 4), torch.arange(4))


def test_a_planted_nuisance_is_found() -> None:
    """Half of the variance within prompts is brightness, a sixth is size, and a third is neither."""
    prompt = torch.arange(300).repeat_interleave(4)
    bright, size, rest = _drawn(5, 1200), 100 * _drawn(6, 1200), _drawn(7, 1200)
    scores = 5 * _drawn(8, 300)[prompt] + 3**0.5 * bright + size / 100 + 2**0.5 * rest
    scores[7] = math.nan
    nuisances = {"bright": bright + 9, "size": size, "other": _drawn(9, 1200), "pixels": torch.full((1200,), 64.0)}
    report = nuisance_report(scores, nuisances, prompt)
    assert report.constant == ("pixels",) and set(report.correlations) == {"bright", "size", "other"}
    for name, truth in (("bright", 0.5**0.5), ("size", (1 / 6) ** 0.5), ("other", 0.0)):
        value = report.correlations[name]
        assert value.low <= truth <= value.high and value.high - value.low < 0.2
    assert report.explained.low <= 2 / 3 <= report.explained.high and report.explained.high - report.explained.low < 0.1
    twice = nuisance_report(scores, {"bright": bright, "again": 2 * bright}, prompt)
    alone = nuisance_report(scores, {"bright": bright}, prompt)
    assert twice.explained.mean == pytest.approx(alone.explained.mean, abs=1e-9)
    with pytest.raises(UnmeasurableError, match="score alike"):
        nuisance_report(torch.ones(1200), nuisances, prompt)
    with pytest.raises(UnmeasurableError, match="need more samples"):
        nuisance_report(scores[:6], {"a": bright[:6], "b": size[:6], "c": rest[:6]}, torch.arange(3).repeat(2))


@pytest.mark.parametrize(("prompts", "samples", "rho"), [(10, 4, 0.0), (20, 2, 0.6), (30, 6, 0.9)])
def test_intervals_of_correlations_cover_the_truth(prompts: int, samples: int, rho: float) -> None:
    """Prompts differ in spread, so that they do not count the same."""
    prompt, hits = torch.arange(prompts).repeat_interleave(samples), 0
    for seed in range(REPEATS):
        first, noise = _drawn(2 * seed, prompts * samples), _drawn(2 * seed + 1, prompts * samples)
        spread = (0.5 + torch.rand(prompts, generator=torch.Generator().manual_seed(7000 + seed)))[prompt]
        second = rho * first + (1 - rho**2) ** 0.5 * noise
        value = correlation_within_prompts(spread * first, spread * second, prompt)
        hits += value.low <= rho <= value.high
    assert hits / REPEATS >= 0.88  # two and a half deviations below 0.94


@pytest.mark.slow
@pytest.mark.parametrize("explained", [0.0, 0.3])
def test_intervals_of_the_explained_share_cover_the_truth(explained: float) -> None:
    """Three nuisances and 80 samples: without the adjustment the share of pure noise would be 0.05."""
    prompt, hits = torch.arange(20).repeat_interleave(4), 0
    for seed in range(REPEATS):
        columns = _drawn(seed, 4, 80)
        scores = explained**0.5 * columns[0] + (1 - explained) ** 0.5 * columns[3]
        value = nuisance_report(scores, {str(k): columns[k] for k in range(3)}, prompt).explained
        hits += value.low <= explained <= value.high
    assert hits / REPEATS >= 0.88
