"""A set reward next to the samples' own scores, as DRAGON's credit uses it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from genalign.algorithms.credit import SetContrast
from genalign.algorithms.interfaces import RoundScores
from genalign.algorithms.preference_pairs import greedy_swap
from genalign.metrics.set_metric import with_quality
from genalign.metrics.vendi import vendi_score


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


FIRST, SECOND = drawn(16, 7, seed=1) + 0.5, drawn(16, 7, seed=2) + 0.5  # 6 features and a quality


def test_units_of_the_set_reward_do_not_matter() -> None:
    plain = with_quality(vendi_score, 2.0, FIRST, SECOND)
    other = with_quality(lambda features: 1000 * vendi_score(features) - 7, 2.0, FIRST, SECOND)
    assert other(FIRST) - other(SECOND) == pytest.approx(plain(FIRST) - plain(SECOND), rel=1e-4)
    splits = [greedy_swap(FIRST, SECOND, reward) for reward in (plain, other)]
    assert torch.equal(*splits)


def test_weights_are_relative_to_the_spread_of_random_sets() -> None:
    first, second = torch.zeros(4000, 2), torch.ones(4000, 2)
    reward = with_quality(lambda features: float(features.sum()), 3.0, first, second)
    features_alone = reward(torch.cat([second[:, :1], first[:, :1]], 1))
    assert features_alone == pytest.approx(4000 / math.sqrt(4000 / 4), rel=0.4)  # binomial, of 16 draws
    assert reward(second) == pytest.approx((1 + 3.0) * features_alone, rel=1e-5)
    assert with_quality(lambda features: 0.1, 1.0, FIRST, SECOND)(torch.zeros(4, 7)) == 0.0


def test_weights_and_rewards_must_be_finite() -> None:
    with pytest.raises(ValueError, match="weight of the samples' quality must be finite"):
        with_quality(vendi_score, math.nan, FIRST, SECOND)
    with pytest.raises(ValueError, match="not finite on random sets"):
        with_quality(lambda features: math.nan, 1.0, FIRST, SECOND)


def test_failed_samples_get_no_credit() -> None:
    features = torch.cat([FIRST, SECOND])
    features[0] = torch.nan
    count = len(FIRST)
    scores = torch.rand(2 * count, 1)
    scores[5] = torch.nan
    outcome = RoundScores(scores, (1.0,), torch.arange(count).repeat(2), features=features)
    for quality, left_out in ((0.0, {0, count}), (1.0, {0, count, 5, count + 5})):
        credit = SetContrast(vendi_score, quality=quality)(outcome)
        assert set((credit == 0).nonzero()[:, 0].tolist()) == left_out
        assert float(credit.sum()) == 0.0
