"""Rewards of whole sets of samples, from features."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from genalign.metrics.frechet import Gaussian, frechet_distance
from genalign.metrics.vendi import vendi_score
from rewards.set_rewards import CMMDReward, FrechetReward, KIDReward, VendiReward, per_sample_frechet


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


REFERENCE, FIRST = drawn(50, 6, seed=0), drawn(16, 6, seed=1) + 0.5


def test_higher_is_better() -> None:
    assert FrechetReward(REFERENCE)(FIRST) == -frechet_distance(FIRST, REFERENCE)
    assert VendiReward()(FIRST) == vendi_score(FIRST)
    for reward in (FrechetReward(REFERENCE), KIDReward(REFERENCE), CMMDReward(REFERENCE)):
        assert reward(REFERENCE) > reward(FIRST) > reward(FIRST + 1)
    assert VendiReward()(FIRST) > VendiReward()(FIRST + 10)


def test_cmmd_is_the_published_estimate() -> None:
    """1000 times the mean of every entry, the diagonal too, of exp(-|x - y|^2 / 200), written out."""

    def mean(x: Tensor, y: Tensor) -> float:
        return float(torch.exp(-torch.cdist(x.double(), y.double()).square() / (2 * 10.0**2)).mean())

    expected = 1000 * (mean(FIRST, FIRST) + mean(REFERENCE, REFERENCE) - 2 * mean(FIRST, REFERENCE))
    assert CMMDReward(REFERENCE)(FIRST) == pytest.approx(-expected, rel=1e-9)
    assert CMMDReward(REFERENCE)(REFERENCE) == pytest.approx(0, abs=1e-9)
    two, one = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    apart = math.exp(-2 / 200)  # k_xx = k_xy = (1 + apart) / 2, k_yy = 1
    assert CMMDReward(one)(two) == pytest.approx(-1000 * (1 - (1 + apart) / 2))


def test_sets_without_a_covariance_are_refused() -> None:
    for reward in (FrechetReward, KIDReward, CMMDReward):
        with pytest.raises(ValueError, match="at least 2 samples, got 1"):
            reward(REFERENCE[:1])
        with pytest.raises(ValueError, match="at least 2 samples, got 1"):
            reward(REFERENCE)(FIRST[:1])


def test_each_sample_has_its_own_distance() -> None:
    tokens = drawn(4, 9, 6, seed=3) + torch.arange(4.0)[:, None, None]
    tokens[2, 0, 0] = math.nan
    reward = per_sample_frechet(tokens, Gaussian.fit(REFERENCE))
    assert reward.dtype == torch.float32
    assert reward.isnan().tolist() == [False, False, True, False]
    for i in (0, 1, 3):
        assert float(reward[i]) == pytest.approx(-frechet_distance(tokens[i], REFERENCE), rel=1e-6)
    assert reward[0] > reward[1] > reward[3]


def test_samples_of_one_token_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 frames of each sample, got 1"):
        per_sample_frechet(torch.zeros(3, 1, 6), Gaussian.fit(REFERENCE))
    with pytest.raises(ValueError, match=r"tokens must be \(B, n, d\)"):
        per_sample_frechet(torch.zeros(3, 6), Gaussian.fit(REFERENCE))
