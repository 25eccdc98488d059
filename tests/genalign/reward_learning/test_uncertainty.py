"""The Laplace approximation of a reward's last layer, against NumPy and against truth."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from genalign.reward_learning.uncertainty import (
    LaplacePosterior,
    LastLayerLaplace,
    PairFeatures,
    bradley_terry_hessian,
    fit_laplace,
    log_evidence,
    predictive_probability,
)


def toy(count: int, width: int, precision: float, seed: int) -> tuple[Tensor, PairFeatures]:
    """Weights drawn from the prior, and pairs that they determine."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(width, generator=generator, dtype=torch.float64) / precision**0.5
    differences = torch.randn(count, width, generator=generator, dtype=torch.float64)
    drawn = torch.rand(count, generator=generator, dtype=torch.float64)
    return weights, PairFeatures(differences, (drawn < (differences @ weights).sigmoid()).double())


def maximum(pairs: PairFeatures, precision: float) -> Tensor:
    """The most probable weights, by Newton's method."""
    weights = torch.zeros(pairs.differences.shape[1], dtype=torch.float64)
    eye = torch.eye(len(weights), dtype=torch.float64)
    for _ in range(30):
        residual = (pairs.differences @ weights).sigmoid() - pairs.preferred
        gradient = pairs.differences.T @ residual + precision * weights
        weights = weights - torch.linalg.solve(
            bradley_terry_hessian(weights, pairs.differences) + precision * eye, gradient
        )
    return weights


def test_the_posterior_is_that_of_numpy() -> None:
    _, pairs = toy(60, 4, 1.0, 0)
    weights = maximum(pairs, 2.0)
    posterior = fit_laplace(LastLayerLaplace(2.0), weights, torch.ones(4), pairs, None)
    x, w = pairs.differences.numpy(), weights.numpy()
    p = 1 / (1 + np.exp(-x @ w))
    covariance = np.linalg.inv(x.T @ np.diag(p * (1 - p)) @ x + 2.0 * np.eye(4))
    np.testing.assert_allclose(posterior.covariance.numpy(), covariance, rtol=0, atol=1e-10)
    features = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    offset = features.double().numpy() - 1
    expected = np.sqrt(np.einsum("bi,ij,bj->b", offset, covariance, offset))
    np.testing.assert_allclose(posterior.deviation(features).numpy(), expected, rtol=1e-10)


def test_the_evidence_is_that_of_numpy_and_picks_a_precision_near_the_truth() -> None:
    _, pairs = toy(400, 20, 4.0, 2)
    weights = maximum(pairs, 4.0)
    x, y, w = pairs.differences.numpy(), pairs.preferred.numpy(), weights.numpy()
    p = 1 / (1 + np.exp(-x @ w))
    hessian = x.T @ np.diag(p * (1 - p)) @ x + 4.0 * np.eye(20)
    expected = (y * np.log(p) + (1 - y) * np.log(1 - p)).sum() - 2.0 * w @ w + 10 * np.log(4.0)
    expected -= 0.5 * np.linalg.slogdet(hessian)[1]
    values = torch.linalg.eigvalsh(bradley_terry_hessian(weights, pairs.differences))
    assert log_evidence(weights, pairs, values, 4.0) == pytest.approx(expected, abs=1e-9)
    chosen = fit_laplace(LastLayerLaplace(), weights, torch.zeros(20), pairs, None).precision
    assert 4 / 3 < chosen < 12


def test_held_out_likelihood_distrusts_weights_that_fit_chance() -> None:
    weights, held_out = toy(400, 20, 4.0, 3)
    _, pairs = toy(30, 20, 4.0, 4)  # other weights: what is learned says nothing of the held-out pairs
    wrong = maximum(pairs, 0.1)
    doubted = fit_laplace(LastLayerLaplace("held-out"), wrong, torch.zeros(20), pairs, held_out)
    trusted = fit_laplace(LastLayerLaplace("held-out"), weights, torch.zeros(20), pairs, held_out)
    assert doubted.precision < trusted.precision
    with pytest.raises(ValueError, match="needs held-out pairs"):
        fit_laplace(LastLayerLaplace("held-out"), wrong, torch.zeros(20), pairs, None)


def test_deviations_are_calibrated_where_weights_come_from_the_prior() -> None:
    errors = list[Tensor]()
    for seed in range(40):
        truth, pairs = toy(200, 8, 1.0, seed)
        weights = maximum(pairs, 1.0)
        posterior: LaplacePosterior = fit_laplace(LastLayerLaplace(1.0), weights, torch.zeros(8), pairs, None)
        features = torch.randn(50, 8, generator=torch.Generator().manual_seed(seed + 1000), dtype=torch.float64)
        errors.append(features @ (weights - truth) / posterior.deviation(features))
    z = torch.cat(errors)
    assert float(z.square().mean()) == pytest.approx(1, abs=0.2)
    assert float((z.abs() < 1.96).double().mean()) == pytest.approx(0.95, abs=0.03)


def test_the_predictive_probability_is_the_average_of_the_sigmoid() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(200_000, generator=generator, dtype=torch.float64)
    lead, variance = torch.tensor([0.5, 2.0, -1.0]).double(), torch.tensor([1.0, 4.0, 0.3]).double()
    averages = (lead[:, None] + variance.sqrt()[:, None] * draws).sigmoid().mean(1)
    torch.testing.assert_close(predictive_probability(lead, variance), averages, rtol=0, atol=0.01)
