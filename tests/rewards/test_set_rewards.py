import math

import pytest
import torch
from torch import Tensor

from genalign.algorithms.credit import SetContrast
from genalign.algorithms.interfaces import RoundScores
from genalign.algorithms.preference_pairs import greedy_swap
from genalign.metrics.frechet import Gaussian, frechet_distance, vendi
from genalign.metrics.mmd import kid
from genalign.metrics.set_metric import IncrementalReward, Rescored
from genalign.metrics.set_mixture import WeightedSum, standardised, with_quality
from genalign.types import SetReward
from rewards.set_rewards import CMMDTo, FrechetTo, KIDTo, Vendi, per_sample_frechet


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


REFERENCE, FIRST, SECOND = drawn(50, 6, seed=0), drawn(16, 6, seed=1) + 0.5, drawn(16, 6, seed=2) + 0.5


def test_higher_is_better() -> None:
    assert FrechetTo(REFERENCE)(FIRST) == -frechet_distance(FIRST, REFERENCE)
    assert KIDTo(REFERENCE)(FIRST) == pytest.approx(-kid(FIRST, REFERENCE))
    assert Vendi(2.0)(FIRST) == vendi(FIRST, 2.0)
    for reward in (FrechetTo(REFERENCE), KIDTo(REFERENCE), CMMDTo(REFERENCE)):
        assert reward(REFERENCE) > reward(FIRST) > reward(FIRST + 1)
    assert Vendi()(FIRST) > Vendi()(FIRST + 10)


def test_cmmd_is_the_published_estimate() -> None:
    """1000 times the mean of every entry, the diagonal too, of exp(-|x - y|^2 / 200), written out."""

    def mean(x: Tensor, y: Tensor) -> float:
        return float(torch.exp(-torch.cdist(x.double(), y.double()).square() / (2 * 10.0**2)).mean())

    expected = 1000 * (mean(FIRST, FIRST) + mean(REFERENCE, REFERENCE) - 2 * mean(FIRST, REFERENCE))
    assert CMMDTo(REFERENCE)(FIRST) == pytest.approx(-expected, rel=1e-9)
    assert CMMDTo(REFERENCE)(REFERENCE) == pytest.approx(0, abs=1e-9)
    two, one = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    apart = math.exp(-2 / 200)  # k_xx = k_xy = (1 + apart) / 2, k_yy = 1
    assert CMMDTo(one)(two) == pytest.approx(-1000 * (1 - (1 + apart) / 2))


@pytest.mark.parametrize(
    "reward",
    [
        FrechetTo(REFERENCE),
        KIDTo(REFERENCE),
        CMMDTo(REFERENCE),
        Vendi(),
        Vendi(math.inf),
        WeightedSum((FrechetTo(REFERENCE), Vendi(), lambda features: float(features.std())), (0.5, -1.0, 2.0)),
    ],
)
def test_a_statistic_gives_the_reward_of_the_changed_set(reward: IncrementalReward) -> None:
    assert isinstance(reward, IncrementalReward)
    features = FIRST.double()
    statistic = reward.statistic(features)
    for index in (3, 0, 3, 9):
        tried = statistic.swapped(index, SECOND[index].double())
        statistic.swap(index, SECOND[index].double())
        features[index] = SECOND[index]
        assert tried == pytest.approx(reward(features), rel=1e-6)
        assert statistic.value == pytest.approx(reward(features), rel=1e-6)
        assert 0 < statistic.resolution < 1e-3
    statistic.settle()
    assert statistic.value == pytest.approx(reward(features), rel=1e-6)


def test_other_orders_of_vendi_are_scored_anew() -> None:
    assert isinstance(Vendi(2.0).statistic(FIRST), Rescored)
    assert not isinstance(Vendi().statistic(FIRST), Rescored)


def test_sets_without_a_covariance_are_refused() -> None:
    for make in (FrechetTo, KIDTo, CMMDTo):
        with pytest.raises(ValueError, match="at least 2 samples, got 1"):
            make(REFERENCE[:1])
        with pytest.raises(ValueError, match="at least 2 samples, got 1"):
            make(REFERENCE)(FIRST[:1])
    with pytest.raises(ValueError, match="order"):
        Vendi(-1.0)


def test_weights_do_not_depend_on_units() -> None:
    """With its spread taken out, a reward in other units makes the same mix."""
    frechet, diversity = FrechetTo(REFERENCE), Vendi()

    def scaled(features: Tensor) -> float:
        return 1000 * frechet(features) - 7

    plain = standardised([frechet, diversity], [1.0, 2.0], FIRST, SECOND)
    other = standardised([scaled, diversity], [1.0, 2.0], FIRST, SECOND)
    assert other.coefficients[0] == pytest.approx(plain.coefficients[0] / 1000)
    assert other.coefficients[1] == plain.coefficients[1]
    split, same = (greedy_swap(FIRST, SECOND, mix).from_second for mix in (plain, other))
    assert torch.equal(split, same)


def test_the_spread_is_that_of_random_choices() -> None:
    first, second = torch.zeros(4000, 1), torch.ones(4000, 1)

    def total(features: Tensor) -> float:
        return float(features.sum())

    mix = standardised([total], [3.0], first, second, draws=200)
    assert 3.0 / mix.coefficients[0] == pytest.approx(math.sqrt(4000 / 4), rel=0.15)  # binomial
    assert mix.coefficients == standardised([total], [3.0], first, second, draws=200).coefficients
    assert mix.coefficients != standardised([total], [3.0], first, second, draws=200, seed=1).coefficients


def test_a_reward_without_spread_is_left_out() -> None:
    def constant(features: Tensor) -> float:
        return 0.1

    rewards: list[SetReward] = [constant, Vendi()]
    assert standardised(rewards, [1.0, 1.0], FIRST, SECOND).coefficients[0] == 0.0
    assert standardised([Vendi()], [1.0], FIRST, FIRST.clone()).coefficients == (0.0,)


def test_mixes_are_checked() -> None:
    with pytest.raises(ValueError, match="one weight per reward, got 2 for 1"):
        standardised([Vendi()], [1.0, 2.0], FIRST, SECOND)
    with pytest.raises(ValueError, match="one weight per reward, got 0 for 0"):
        WeightedSum((), ())
    with pytest.raises(ValueError, match="weights must be finite"):
        WeightedSum((Vendi(),), (math.nan,))
    with pytest.raises(ValueError, match="draws"):
        standardised([Vendi()], [1.0], FIRST, SECOND, draws=1)
    with pytest.raises(ValueError, match="paired samples"):
        standardised([Vendi()], [1.0], FIRST, SECOND[:3])
    with pytest.raises(ValueError, match="not finite on some"):
        standardised([lambda features: math.nan], [1.0], FIRST, SECOND)


def test_each_sample_has_its_own_distance() -> None:
    tokens = drawn(4, 9, 6, seed=3) + torch.arange(4.0)[:, None, None]
    tokens[2, 0, 0] = math.nan
    reward = per_sample_frechet(tokens, Gaussian.of(REFERENCE))
    assert reward.dtype == torch.float32
    assert reward.isnan().tolist() == [False, False, True, False]
    for i in (0, 1, 3):
        assert float(reward[i]) == pytest.approx(-frechet_distance(tokens[i], REFERENCE), rel=1e-6)
    assert reward[0] > reward[1] > reward[3]


def test_samples_of_one_token_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        per_sample_frechet(torch.zeros(3, 1, 6), Gaussian.of(REFERENCE))
    with pytest.raises(ValueError, match=r"tokens must be \(B, n, d\)"):
        per_sample_frechet(torch.zeros(3, 6), Gaussian.of(REFERENCE))


def test_quality_stands_beside_a_set_reward_in_units_of_choice() -> None:
    own = torch.linspace(0, 1, len(FIRST)), torch.linspace(1, 0, len(SECOND))
    reward, first, second = with_quality(Vendi(), 2.0, FIRST, SECOND, *own)
    assert isinstance(reward, WeightedSum) and first.shape == second.shape == (len(FIRST), FIRST.shape[1] + 1)
    diversity, quality = reward.coefficients
    assert reward(first) == pytest.approx(diversity * Vendi()(FIRST) + quality * float(own[0].mean()))
    swapped = first.double()
    statistic = reward.statistic(swapped)
    expected = swapped.clone()
    expected[3] = second[3]
    assert statistic.swapped(3, second[3].double()) == pytest.approx(reward(expected))


def test_a_failed_sample_is_no_demonstration() -> None:
    features = torch.cat([FIRST, SECOND])
    features[0] = torch.nan
    count = len(FIRST)
    group = torch.arange(count).repeat(2)
    own = torch.rand(2 * count, 1)
    own[5] = torch.nan
    outcome = RoundScores(own, (1.0,), group, features=features)
    for quality, left_out in ((0.0, {0, count}), (1.0, {0, count, 5, count + 5})):
        credit = SetContrast(Vendi(), quality=quality)(outcome)
        assert set((credit == 0).nonzero()[:, 0].tolist()) == left_out
        assert float(credit.sum()) == 0.0
