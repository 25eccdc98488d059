"""Losses of transitions against worked numbers, closed forms and identities."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from genalign.algorithms.losses import (
    KLForm,
    chi_squared,
    clip_fraction,
    clipped_surrogate,
    dppo_mask,
    guarded_log_ratio,
    kl_penalty,
)
from genalign.algorithms.trajectory import noise_weighted
from genalign.diffusion.paths import FlowPath
from genalign.diffusion.transitions import ODE, DanceSDE, FlowSDE, Kernel, Transition, trainable_steps, transition
from genalign.types import Grid, NoiseStep
from tests.genalign.algorithms.updates import randn


def gradient(loss: Tensor, of: Tensor) -> Tensor:
    return torch.autograd.grad(loss.sum(), of)[0]


def two_steps() -> NoiseStep:
    sigma, sigma_next = torch.tensor([[0.8, 0.5], [0.6, 0.4]], dtype=torch.float64)
    return NoiseStep(sigma, 1 - sigma, sigma, torch.tensor([0, 1]), 1 - sigma_next, sigma_next)


@pytest.mark.parametrize("clip_range", [0.2, 1e-3])
def test_surrogate_is_the_published_loss(clip_range: float) -> None:
    advantages = 3 * randn(200, seed=0)
    log_ratio = 2 * clip_range * randn(200, seed=1)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    expected = torch.maximum(-advantages * ratio, -advantages * clipped)
    torch.testing.assert_close(clipped_surrogate(log_ratio, advantages, clip_range), expected, rtol=1e-12, atol=1e-12)


def test_gradient_is_the_advantage_on_policy_and_zero_beyond_the_range() -> None:
    advantages = torch.tensor([2.0, -2.0, 2.0, -2.0, 2.0, -2.0])
    log_ratio = torch.tensor([0.0, 0.0, 0.5, 0.5, -0.5, -0.5], requires_grad=True)
    slope = gradient(clipped_surrogate(log_ratio, advantages, 0.2), log_ratio)
    up, down = math.exp(0.5), math.exp(-0.5)
    assert slope.tolist() == pytest.approx([-2.0, 2.0, 0.0, 2 * up, -2 * down, 0.0])


def test_a_range_may_have_two_sides() -> None:
    log_ratio = torch.tensor([-0.9e-3, -0.7e-3, 1.1e-3, 1.3e-3], requires_grad=True)
    for advantage, moves in ((1.0, [True, True, True, False]), (-1.0, [False, True, True, True])):
        loss = clipped_surrogate(log_ratio, torch.full((4,), advantage), (0.8e-3, 1.2e-3))
        assert (gradient(loss, log_ratio) != 0).tolist() == moves
    loss = clipped_surrogate(log_ratio.detach(), torch.tensor([-1.0, -1.0, 1.0, 1.0]), (0.8e-3, 1.2e-3))
    assert loss[0].item() == pytest.approx(math.exp(-0.0008003202)) and loss[3].item() == pytest.approx(-1.0012)
    assert clip_fraction(log_ratio.detach(), (0.8e-3, 1.2e-3)).item() == 0.5
    assert clip_fraction(log_ratio.detach(), (0.95e-3, 1.2e-3)).item() == 0.25


def test_ranges_near_the_resolution_of_float32() -> None:
    log_ratio = torch.tensor([0.9e-7, 1.1e-7], requires_grad=True)
    slope = gradient(clipped_surrogate(log_ratio, torch.ones(2), 1e-7), log_ratio)
    assert slope.tolist() == pytest.approx([-1.0, 0.0], abs=1e-6)
    assert clip_fraction(log_ratio.detach(), 1e-7).item() == 0.5


def test_no_advantage_means_no_loss_whatever_the_ratio() -> None:
    log_ratio = torch.tensor([0.0, 1e3, -1e3], requires_grad=True)
    loss = clipped_surrogate(log_ratio, torch.zeros(3), 1e-4)
    assert torch.equal(loss, torch.zeros(3))
    assert torch.equal(gradient(loss, log_ratio), torch.zeros(3))


def test_clip_fraction_counts_both_sides() -> None:
    log_ratio = torch.tensor([0.0, 0.19, -0.19, 0.17, -0.23])
    assert clip_fraction(log_ratio, 0.2).item() == pytest.approx(0.4)


def penalty(form: KLForm, kernel: Kernel, v: Tensor, v_ref: Tensor) -> Tensor:
    x, step = randn(2, 3, 4, seed=0), two_steps()
    current, reference = (transition(FlowPath(), kernel, x, prediction, step) for prediction in (v, v_ref))
    return kl_penalty(form, current, reference, v, v_ref, step)


@pytest.mark.parametrize("kernel", [FlowSDE(0.7), DanceSDE(0.3)])
def test_forms_of_the_penalty_are_multiples_of_the_distance_of_velocities(kernel: Kernel) -> None:
    v, v_ref, step = randn(2, 3, 4, seed=1).requires_grad_(), randn(2, 3, 4, seed=2), two_steps()
    drop = step.sigma - step.sigma_next
    rate = 0.7 * (step.sigma / (1 - step.sigma)).sqrt() if kernel == FlowSDE(0.7) else torch.full_like(drop, 0.3)
    c_v = drop * (1 + rate**2 * (1 - step.sigma) / (2 * step.sigma))
    of_v = (v - v_ref).square().mean((1, 2))
    of_mean = c_v**2 * of_v
    expected: dict[KLForm, Tensor] = {
        "v": of_v,
        "x": of_mean,
        "no_dt": of_mean / (2 * rate**2),
        "exact": of_mean / (2 * rate**2 * drop),
    }
    for form, value in expected.items():
        distance = penalty(form, kernel, v, v_ref)
        torch.testing.assert_close(distance, value, rtol=1e-10, atol=1e-12)
        assert bool((gradient(distance, v) * (v - v_ref) > 0).all())  # it pulls towards the reference


def test_a_deterministic_step_has_only_the_distances() -> None:
    v, v_ref = randn(2, 3, 4, seed=1), randn(2, 3, 4, seed=2)
    densities: tuple[KLForm, ...] = ("exact", "no_dt")
    for form in densities:
        with pytest.raises(ValueError, match="train only stochastic steps"):
            penalty(form, ODE(), v, v_ref)
    assert bool((penalty("x", ODE(), v, v_ref) > 0).all())
    assert penalty("v", ODE(), v.bfloat16(), v_ref.bfloat16()).dtype == torch.float32


def test_inputs_are_checked() -> None:
    with pytest.raises(ValueError, match="one entry per sample"):
        clipped_surrogate(torch.zeros(3), torch.zeros(3, 1), 0.2)
    for clip_range in (0.0, 1.0, -0.1, (0.1, 1.0), (0.0, 0.1)):
        with pytest.raises(ValueError, match="clip_range"):
            clip_fraction(torch.zeros(3), clip_range)
    with pytest.raises(ValueError, match="form must be"):
        penalty("k3", ODE(), torch.zeros(2, 3, 4), torch.zeros(2, 3, 4))
    move = Transition(torch.zeros(2, 3), torch.ones(()))
    with pytest.raises(ValueError, match="equal shapes"):
        kl_penalty("v", move, move, torch.zeros(2, 3), torch.zeros(2, 1), two_steps())
    for kl, advantages in ((torch.zeros(3, 1), torch.zeros(3)), (torch.zeros(3), torch.zeros(1))):
        with pytest.raises(ValueError, match="one entry per sample"):
            dppo_mask(torch.zeros(3), kl, advantages, 1e-5)


def test_the_guard_is_of_each_sample_and_of_one_scale_at_all_steps() -> None:
    noise, moved = randn(3, 2, 5, seed=0), 1e-3 * randn(3, 2, 5, seed=1)
    std = torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64)
    old = Transition(torch.zeros_like(noise), std)
    ratio = guarded_log_ratio(Transition(moved, std), old, old.sample(noise))
    torch.testing.assert_close(ratio, (noise * moved).mean((1, 2)))
    assert torch.equal(guarded_log_ratio(old, old, old.sample(noise)), torch.zeros(3, dtype=torch.float64))


def test_the_mask_drops_only_what_moves_further_away() -> None:
    log_ratio = torch.tensor([0.1, 0.1, -0.1, -0.1, 0.1])
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    kl = torch.tensor([1.0, 1.0, 1.0, 1.0, 1e-6])
    assert dppo_mask(log_ratio, kl, advantages, 1e-5).tolist() == [False, True, True, False, True]
    tiny = torch.full((1,), 1e-30)
    assert dppo_mask(tiny, torch.ones(1), tiny, 1e-5).tolist() == [False]  # their product is 0 in float32


def test_noise_weights_are_those_of_the_published_grid() -> None:
    sigmas = [1.0, 0.96013, 0.91335, 0.85769, 0.79037, 0.70728, 0.60215, 0.46488, 0.27805, 0.00893]
    sigma = torch.tensor(sigmas, dtype=torch.float64)
    grid = Grid(sigma[:-1], 1 - sigma, sigma)
    weights = noise_weighted(FlowSDE(0.7), grid, range(9))
    weights = weights / weights.mean()  # the published mean is over all nine, of which eight are trainable here
    expected = [1.577, 1.673, 1.208, 1.004, 0.882, 0.795, 0.719, 0.635, 0.508]
    assert weights.tolist() == pytest.approx(expected, abs=2e-3)
    torch.testing.assert_close(
        weights, 2.25 * FlowSDE(0.7)(grid[torch.arange(9)]).s, rtol=2e-3, atol=0.0
    )  # the published constant


def test_noise_weights_have_mean_1_over_the_trainable_steps_whichever_are_trained() -> None:
    sigma = torch.arange(8, -1, -1, dtype=torch.float64) / 8
    grid, kernel = Grid(sigma[:-1], 1 - sigma, sigma), FlowSDE(0.9)
    steps = trainable_steps(kernel, grid)
    weights = noise_weighted(kernel, grid, steps)
    expected = [1.8249311904, 1.7070668172, 1.117537558, 0.8329633157, 0.64521061, 0.4997779894, 0.3725125193]
    assert weights.tolist() == pytest.approx(expected, abs=1e-8) and float(weights.mean()) == pytest.approx(1.0)
    for step in steps:
        assert torch.equal(noise_weighted(kernel, grid, (step,)), weights[step : step + 1])


def test_worked_numbers_of_the_chi_squared_penalty() -> None:
    kl = torch.tensor([0.0, 3.5e-4, 2e-3], dtype=torch.float64)
    assert torch.equal(chi_squared(kl, 0.0), kl)
    assert chi_squared(kl, 1024.0).tolist() == pytest.approx([0.0, 0.000511655, 0.0288571331], rel=1e-6)
    # Two Gaussians in one dimension, where chi^2 is 3.770733182 by quadrature
    means, std = torch.tensor([0.3, -0.2], dtype=torch.float64), torch.tensor(0.4, dtype=torch.float64)
    divergence = Transition(means[:1, None], std).kl(Transition(means[1:, None], std))
    assert float(2 * chi_squared(divergence, 1.0)) == pytest.approx(3.770733182, abs=1e-8)


def test_a_sharper_penalty_is_larger_and_never_overflows() -> None:
    kl = torch.linspace(0, 100, 1001).requires_grad_(True)
    penalties = [chi_squared(kl, sharpness) for sharpness in (0.0, 0.1, 1.0, 1e3, 1e5)]
    for milder, sharper in itertools.pairwise(penalties):
        assert bool((sharper[1:] > milder[1:]).all())
    for penalty in penalties:
        slope = gradient(penalty, kl)
        assert float(slope[0]) == pytest.approx(1.0) and bool(slope.isfinite().all())
        assert bool((slope.diff() >= -1e-6 * slope.max()).all())  # also beyond the cap it pulls back
