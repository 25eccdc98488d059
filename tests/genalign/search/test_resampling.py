import math

import pytest
import torch
from torch import Tensor

from genalign.search.resampling import (
    RESAMPLERS,
    Resampler,
    effective_size,
    multinomial,
    normalized_weights,
    residual,
    ssp,
    stratified,
    systematic,
)

EVERY = pytest.mark.parametrize("resampler", RESAMPLERS.values(), ids=RESAMPLERS)
# With a weight of 0, one above 1 / K, one of exactly 2 / K and one that is nearly nothing.
WEIGHTS = [0.31, 0.0, 0.25, 0.2, 0.13, 0.0699, 0.04, 0.0001]
DRAWS = 10_000


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weights_of(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def offspring(resampler: Resampler, weights: Tensor, draws: int) -> Tensor:
    """How often each particle was drawn, (draws, K) float64."""
    source = generator()
    counts = [torch.bincount(resampler(weights, source), minlength=len(weights)) for _ in range(draws)]
    return torch.stack(counts).double()


@EVERY
def test_offspring_are_unbiased(resampler: Resampler) -> None:
    # Five standard errors: the 40 means of the five schemes pass by chance with probability 1 - 2e-5. A particle that
    # is hardly ever drawn has no usable spread of its own, so the variance is not taken below that of a rounding.
    weights = weights_of(WEIGHTS)
    counts = offspring(resampler, weights, DRAWS)
    expected = len(weights) * weights
    rounding = (expected % 1) * (1 - expected % 1)
    error = (torch.maximum(counts.var(0), rounding) / DRAWS).sqrt()
    assert bool(((counts.mean(0) - expected).abs() <= 5 * error + 1e-12).all())
    assert bool((counts.sum(1) == len(weights)).all())


@pytest.mark.parametrize("resampler", [systematic, ssp])
@pytest.mark.parametrize("size", [2, 3, 8, 1001])
def test_systematic_and_ssp_round_up_or_down(resampler: Resampler, size: int) -> None:
    weights = normalized_weights(2 * torch.randn(size, generator=generator(1)))
    counts, expected = offspring(resampler, weights, 200), size * weights
    assert bool(((counts == expected.floor()) | (counts == expected.ceil())).all())


def test_residual_keeps_integer_part() -> None:
    weights = weights_of(WEIGHTS)
    assert bool((offspring(residual, weights, 200) >= (8 * weights).floor()).all())


def test_variance_order_of_resamplers() -> None:
    weights = weights_of([0.4, 0.3, 0.2, 0.1])
    place = torch.arange(4).double()
    noise = [float((offspring(scheme, weights, 1000) @ place).var()) for scheme in (multinomial, residual, systematic)]
    assert noise[0] > 1.5 * noise[1] > 1.5 * noise[2]
    for scheme in (stratified, ssp):
        assert float((offspring(scheme, weights, 1000) @ place).var()) < noise[0] / 1.5


def test_ssp_offspring_are_negatively_correlated() -> None:
    # The first two meet first, so that the sum of their offspring, 0.6 + 1.4, never varies.
    counts = offspring(ssp, weights_of([0.15, 0.35, 0.3, 0.2]), 1000)
    covariance = torch.cov(counts.T)
    assert bool((covariance - covariance.diagonal().diag() < 0.03).all())
    assert set((counts[:, 0] + counts[:, 1]).tolist()) == {2.0}


@EVERY
def test_single_positive_weight_takes_all(resampler: Resampler) -> None:
    for place in (0, 3, 6):
        weights = torch.zeros(7, dtype=torch.float64)
        weights[place] = 1.0
        assert resampler(weights, generator()).tolist() == [place] * 7
    assert resampler(weights_of([1.0]), generator()).tolist() == [0]


@pytest.mark.parametrize("resampler", [stratified, systematic, residual, ssp])
@pytest.mark.parametrize("size", [3, 49, 1000])
def test_equal_weights_keep_all(resampler: Resampler, size: int) -> None:
    # 49 x (1 / 49) is below 1 in float64.
    equal = torch.full((size,), 1 / size, dtype=torch.float64)
    assert torch.equal(resampler(equal, generator()), torch.arange(size))


@EVERY
def test_seed_determines_ancestors(resampler: Resampler) -> None:
    weights = weights_of(WEIGHTS)
    assert torch.equal(resampler(weights, generator(3)), resampler(weights, generator(3)))
    ancestors = resampler(weights, generator(3))
    assert ancestors.shape == (8,) and ancestors.dtype == torch.long


@EVERY
def test_extreme_log_weights(resampler: Resampler) -> None:
    weights = normalized_weights(torch.tensor([-1e4, 0.0, -1e4, -5000.0, 0.0, -math.inf]))
    assert weights.tolist() == [0.0, 0.5, 0.0, 0.0, 0.5, 0.0]
    assert set(resampler(weights, generator()).tolist()) <= {1, 4}
    assert set(resampler(normalized_weights(torch.linspace(-1e4, 0, 100)), generator()).tolist()) == {99}


def test_normalized_weights_values() -> None:
    weights = normalized_weights(torch.tensor([0.0, math.log(3.0)]))
    assert weights.tolist() == pytest.approx([0.25, 0.75]) and weights.dtype == torch.float64
    far = normalized_weights(torch.tensor([-1e4, -1e4 + 1.0], dtype=torch.float64))
    assert far.tolist() == pytest.approx([1 / (1 + math.e), math.e / (1 + math.e)])


def test_normalized_weights_of_nan_and_inf() -> None:
    assert normalized_weights(torch.tensor([math.nan, 0.0, -math.inf])).tolist() == [0.0, 1.0, 0.0]
    for nothing in ([-math.inf] * 4, [math.nan] * 4, [-math.inf, math.nan] * 2):
        assert normalized_weights(torch.tensor(nothing)).tolist() == [0.25] * 4
    with pytest.raises(ValueError, match=r"\+inf"):
        normalized_weights(torch.tensor([0.0, math.inf]))


def test_effective_size_values() -> None:
    assert effective_size(torch.full((5,), -1e4)) == pytest.approx(5.0)
    assert effective_size(torch.tensor([0.0, -1e4, -math.inf])) == pytest.approx(1.0)
    assert effective_size(torch.tensor([0.0, math.log(3.0)])) == pytest.approx(1.6)
    assert effective_size(torch.tensor([-math.inf] * 3)) == pytest.approx(3.0)
