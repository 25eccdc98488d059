import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from genalign.diffusion.paths import EDMPath, FlowPath, GaussianPath, VPPath, expand
from genalign.diffusion.transitions import (
    CPS,
    DDIM,
    DPMSDE,
    ODE,
    DanceSDE,
    FlowSDE,
    Kernel,
    Transition,
    leftover_noise,
    trainable_steps,
    transition,
)
from genalign.types import Grid, NoiseStep

# Columns: sigma, s, c_x, c_v, std of FlowSDE(.7), CPS(.8) and DanceSDE(.3), noise that FlowSDE leaves in x_next.
SD3_TABLE = [
    (1.00000, 3.50567, 0.75500, -0.03987, 0.70000, 0.91314, 0.05990, 1.00070),
    (0.96013, 3.43507, 0.71254, -0.05824, 0.74296, 0.86865, 0.06489, 0.97146),
    (0.91335, 2.27263, 0.84263, -0.06929, 0.53615, 0.81571, 0.07077, 0.88200),
    (0.85769, 1.71850, 0.88409, -0.08382, 0.44590, 0.75168, 0.07784, 0.80853),
    (0.79037, 1.35920, 0.90289, -0.10345, 0.39179, 0.67266, 0.08648, 0.72513),
    (0.70728, 1.08809, 0.91201, -0.13088, 0.35280, 0.57268, 0.09727, 0.62356),
    (0.60215, 0.86117, 0.91546, -0.17091, 0.31907, 0.44212, 0.11115, 0.49645),
    (0.46488, 0.65244, 0.91446, -0.23260, 0.28201, 0.26444, 0.12967, 0.34145),
    (0.27805, 0.43441, 0.90867, -0.33505, 0.22536, 0.00849, 0.15563, 0.23995),
    (0.00893, 0.06644, 0.99779, -0.01112, 0.00628, 0.00000, 0.02835, 0.00666),
]
STOCHASTIC = [FlowSDE(0.7), DanceSDE(0.3), CPS(0.8), DPMSDE(), DDIM(0.5)]
KERNELS = [ODE(), *STOCHASTIC]


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def step_between(here: tuple[float, float], there: tuple[float, float]) -> NoiseStep:
    alpha, sigma, alpha_next, sigma_next = map(scalar, (*here, *there))
    return NoiseStep(sigma, alpha, sigma, torch.tensor(0), alpha_next, sigma_next)


def flow_step(sigma: float, sigma_next: float) -> NoiseStep:
    return step_between((1 - sigma, sigma), (1 - sigma_next, sigma_next))


def flow_grid(sigma: Tensor) -> Grid:
    return Grid(timestep=sigma[:-1], alpha=1 - sigma, sigma=sigma)


def linear_grid(steps: int) -> Grid:
    return flow_grid(torch.linspace(1, 0, steps + 1, dtype=torch.float64))


def euler_grid(steps: int, shift: float) -> Grid:
    """The sigmas of diffusers' FlowMatchEulerDiscreteScheduler, which shifts twice."""

    def shifted(sigma: Tensor) -> Tensor:
        return shift * sigma / (1 + (shift - 1) * sigma)

    first, last = shifted(scalar(1.0)), shifted(scalar(0.001))
    sigma = shifted(torch.linspace(first.item(), last.item(), steps, dtype=torch.float64))
    return flow_grid(torch.cat([sigma, sigma.new_zeros(1)]))


def full(value: float) -> Tensor:
    return torch.full((1, 1), value, dtype=torch.float64)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


X, V = randn(2, 3), randn(2, 3, seed=1)
VP_STEP = step_between((0.3**0.5, 0.7**0.5), (0.6**0.5, 0.4**0.5))
FLOW_STEP = flow_step(0.8, 0.6)
EDM_STEP = step_between((1.0, 500.0), (1.0, 78.254))
EDM_12 = step_between((1.0, 2.0), (1.0, 1.0))
FIXTURES = [
    pytest.param(FlowPath(), FlowSDE(0.7), FLOW_STEP, 0.5, -0.3, 0.4522, 0.6260990337, id="flow"),
    pytest.param(FlowPath(), FlowSDE(0.7), euler_grid(10, 3.0)[0], 0.5, -0.3, 0.3894612069, 0.7, id="first step"),
    pytest.param(FlowPath(), CPS(0.8), FLOW_STEP, 0.5, -0.3, 0.3775804865, 0.5706339098, id="cps"),
    pytest.param(FlowPath(), DanceSDE(0.3), FLOW_STEP, 0.5, -0.3, 0.55505, 0.1341640786, id="dance"),
    pytest.param(FlowPath(), DPMSDE(), FLOW_STEP, 0.5, -0.3, 0.395, 0.5562148865, id="dpm"),
    pytest.param(VPPath("epsilon"), DDIM(1.0), VP_STEP, 0.5, -0.3, 0.9606530576, 0.5345224838, id="ddim-epsilon"),
    pytest.param(VPPath("v_prediction"), DDIM(1.0), VP_STEP, 0.5, -0.3, 0.4924264056, 0.5345224838, id="ddim-v"),
    pytest.param(EDMPath(), DPMSDE(), EDM_12, 1.5, 0.3, 0.3987538820, 0.8660254038, id="edm"),
]


@pytest.mark.parametrize(("path", "kernel", "step", "x", "v", "mean", "std"), FIXTURES)
def test_worked_numbers(
    path: GaussianPath, kernel: Kernel, step: NoiseStep, x: float, v: float, mean: float, std: float
) -> None:
    move = transition(path, kernel, full(x), full(v), step)
    assert (move.mean.item(), move.std.item()) == pytest.approx((mean, std), abs=1e-9)


@pytest.mark.parametrize("index", range(10))
def test_sd3_table(index: int) -> None:
    step = euler_grid(10, 3.0)[index]
    of_x = transition(FlowPath(), FlowSDE(0.7), full(1.0), full(0.0), step)
    of_v = transition(FlowPath(), FlowSDE(0.7), full(0.0), full(1.0), step)
    rate, scalars = of_x.std / (step.sigma - step.sigma_next).sqrt(), FlowSDE(0.7)(step)
    others, content = (CPS(0.8)(step).s, DanceSDE(0.3)(step).s), torch.hypot(scalars.c, scalars.s)
    row = (step.sigma, rate, of_x.mean, of_v.mean, of_x.std, *others, content)
    assert tuple(float(value) for value in row) == pytest.approx(SD3_TABLE[index], abs=1e-5)


@pytest.mark.parametrize("sigmas", [(1.0, 0.9), (0.9, 0.7), (0.3, 0.02), (0.1, 0.0)])
def test_flow_sde_is_the_published_update(sigmas: tuple[float, float]) -> None:
    step, (x, v) = flow_step(*sigmas), (randn(2, 3, 4), randn(2, 3, 4, seed=1))
    sigma, dt = sigmas[0], sigmas[1] - sigmas[0]
    s = 0.7 * math.sqrt(sigma / (1 - (sigmas[1] if sigma == 1 else sigma)))
    mean = x * (1 + s**2 / (2 * sigma) * dt) + v * (1 + s**2 * (1 - sigma) / (2 * sigma)) * dt
    move = transition(FlowPath(), FlowSDE(0.7), x, v, step)
    torch.testing.assert_close(move.mean, mean, rtol=1e-12, atol=1e-12)
    assert move.std.item() == pytest.approx(s * math.sqrt(-dt), rel=1e-12)


def test_dance_sde_is_the_published_update() -> None:
    sigma, dt, eta = 0.8, -0.2, 0.3
    score = -(X - (1 - sigma) * (X - sigma * V)) / sigma**2
    move = transition(FlowPath(), DanceSDE(eta), X, V, FLOW_STEP)
    torch.testing.assert_close(move.mean, X + V * dt - 0.5 * eta**2 * score * dt, rtol=1e-12, atol=1e-12)


def test_ode_is_euler_and_ddim_without_noise() -> None:
    move = transition(FlowPath(), ODE(), X, V, FLOW_STEP)
    torch.testing.assert_close(move.mean, X + V * (0.6 - 0.8), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(move.mean, transition(FlowPath(), DDIM(0.0), X, V, FLOW_STEP).mean)
    assert torch.equal(move.sample(randn(2, 3, seed=2)), move.mean)


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("steps", [flow_step(1.0, 0.96), flow_step(0.3, 0.001), flow_step(0.1, 0.0), VP_STEP, EDM_STEP])
def test_cps_and_ddim_preserve_the_noise_level(eta: float, steps: NoiseStep) -> None:
    for kernel in (CPS(eta), DDIM(eta), DPMSDE()):
        scalars = kernel(steps)
        content = torch.hypot(scalars.c, scalars.s)
        torch.testing.assert_close(content, steps.sigma_next, rtol=1e-12, atol=1e-15)


def test_std_of_the_last_step() -> None:
    last = flow_step(0.2, 0.0)
    assert FlowSDE(0.7)(last).s.item() == pytest.approx(0.7 * math.sqrt(0.2 / 0.8) * math.sqrt(0.2), rel=1e-12)
    assert DanceSDE(0.3)(last).s.item() == pytest.approx(0.3 * math.sqrt(0.2), rel=1e-12)
    for kernel in (ODE(), CPS(), DPMSDE(), DDIM()):
        assert kernel(last).s.item() == kernel(last).c.item() == 0.0


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_batch_of_mixed_steps_is_bitwise_its_samples(kernel: Kernel, dtype: torch.dtype) -> None:
    grid, index = euler_grid(10, 3.0), torch.tensor([0, 9, 3, 8, 1])
    x, v, noise = (randn(5, 3, 7, seed=seed).to(dtype) for seed in range(3))
    batch = transition(FlowPath(), kernel, x, v, grid[index])
    for row, step in enumerate(index.tolist()):
        one = slice(row, row + 1)
        alone = transition(FlowPath(), kernel, x[one], v[one], grid[step])
        assert torch.equal(batch.mean[one], alone.mean)
        assert torch.equal(batch.sample(noise)[one], alone.sample(noise[one]))
        assert batch.mean.dtype == batch.sample(noise).dtype == dtype


# Densities


def moves() -> tuple[Transition, Transition, Tensor]:
    """A current and an old transition of one kernel on a batch of steps, and a sample of the old one."""
    step = linear_grid(10)[torch.tensor([1, 4, 8])]
    x, v = randn(3, 4, 2), randn(3, 4, 2, seed=1)
    old = transition(FlowPath(), FlowSDE(0.7), x, v, step)
    new = transition(FlowPath(), FlowSDE(0.7), x, v + 0.1 * randn(3, 4, 2, seed=2), step)
    return new, old, old.sample(randn(3, 4, 2, seed=3))


def as_normal(move: Transition) -> Normal:
    return Normal(move.mean, expand(move.std, move.mean).expand_as(move.mean))


def test_densities_agree_with_torch_distributions() -> None:
    new, old, x_next = moves()
    difference: Tensor = as_normal(new).log_prob(x_next) - as_normal(old).log_prob(x_next)
    torch.testing.assert_close(new.log_ratio(old, x_next), difference.mean((1, 2)), rtol=1e-9, atol=1e-12)
    kl = kl_divergence(as_normal(new), as_normal(old)).mean((1, 2))
    torch.testing.assert_close(new.kl(old), kl, rtol=1e-12, atol=1e-12)


def test_log_ratio_of_equal_means_is_exactly_zero_and_small_ones_keep_their_precision() -> None:
    _, old, x_next = moves()
    assert torch.equal(old.log_ratio(old, x_next), torch.zeros(3, dtype=torch.float64))
    exact = Transition(old.mean + 1e-4, old.std).log_ratio(old, x_next)
    single = Transition(old.mean.float(), old.std.float())
    nudged = Transition((old.mean.float() + 1e-4), old.std.float())
    torch.testing.assert_close(nudged.log_ratio(single, x_next.float()).double(), exact, rtol=2e-2, atol=0)


def test_the_gradient_moves_the_mean_towards_the_sample() -> None:
    v, x_next = V.clone().requires_grad_(), randn(2, 3, seed=2)
    move = transition(FlowPath(), FlowSDE(0.7), X, v, FLOW_STEP)
    old = Transition(move.mean.detach(), move.std)
    (ascent,) = torch.autograd.grad(move.log_ratio(old, x_next).sum(), v, retain_graph=True)
    torch.testing.assert_close(ascent, torch.autograd.grad(as_normal(move).log_prob(x_next).mean(1).sum(), v)[0])
    moved = transition(FlowPath(), FlowSDE(0.7), X, V + 1e-3 * ascent, FLOW_STEP)
    assert bool(((moved.mean - x_next).abs() < (move.mean - x_next).abs()).all())


@pytest.mark.parametrize(
    ("kernel", "step"),
    [(ODE(), FLOW_STEP), (CPS(0.0), FLOW_STEP), (DDIM(0.0), FLOW_STEP), (CPS(), linear_grid(10)[torch.tensor([2, 9])])],
)
def test_a_deterministic_step_of_a_sample_has_no_density(kernel: Kernel, step: NoiseStep) -> None:
    move = transition(FlowPath(), kernel, X, V, step)
    for density in (lambda: move.kl(move), lambda: move.log_ratio(move, X)):
        with pytest.raises(ValueError, match="train only stochastic steps"):
            density()


def test_invalid_questions_are_errors() -> None:
    new, old, x_next = moves()
    with pytest.raises(ValueError, match="different std"):
        new.log_ratio(Transition(old.mean, 2 * old.std), x_next)
    with pytest.raises(ValueError, match="expected a tensor of shape"):
        new.log_ratio(old, x_next[:1])
    with pytest.raises(ValueError, match="std must be"):
        Transition(torch.zeros(3, 4), torch.ones(2))


# What kernels refuse


@pytest.mark.parametrize("kernel", [FlowSDE(), DanceSDE()])
def test_flow_kernels_refuse_other_paths_and_levels(kernel: Kernel) -> None:
    for step in (VP_STEP, EDM_12):
        with pytest.raises(ValueError, match="alpha = 1 - sigma"):
            kernel(step)
    for sigmas in ((0.5, 0.6), (0.5, 0.5), (1.2, 0.9), (0.1, -0.1)):
        with pytest.raises(ValueError, match="falls"):
            kernel(flow_step(*sigmas))


@pytest.mark.parametrize("kernel", [DDIM(), DPMSDE()])
def test_first_order_kernels_refuse_undefined_ratios(kernel: Kernel) -> None:
    with pytest.raises(ValueError, match="sigma > 0"):
        kernel(flow_step(0.0, 0.0))
    with pytest.raises(ValueError, match="alpha_next > 0"):
        kernel(flow_step(1.0, 1.0))
    with pytest.raises(ValueError, match="falls"):
        kernel(flow_step(0.5, 0.6))
    stays = kernel(flow_step(0.5, 0.5))
    assert (float(stays.c), float(stays.s)) == (0.5, 0.0)


@pytest.mark.parametrize(("make", "limit"), [(CPS, 1.1), (DDIM, 1.1), (FlowSDE, 0.0), (DanceSDE, 0.0)])
def test_shares_of_noise_are_in_the_unit_interval_and_rates_positive(
    make: Callable[[float], Kernel], limit: float
) -> None:
    for wrong in (-0.1, math.nan, limit):
        with pytest.raises(ValueError, match=r"(eta|noise_level) must be"):
            make(wrong)


# Which steps can be trained


def test_leftover_noise() -> None:
    grid = euler_grid(10, 3.0)
    leftover = leftover_noise(FlowSDE(0.7), grid)
    expected = [row[7] / following[0] for row, following in pairwise(SD3_TABLE)]
    assert leftover[:8].tolist() == pytest.approx(expected[:8], abs=2e-4)
    assert leftover[8].item() == pytest.approx(26.9, abs=0.1)
    assert leftover[9].item() == math.inf
    torch.testing.assert_close(leftover_noise(CPS(), grid), torch.ones(10, dtype=torch.float64))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_trainable_steps_of_the_default_grids(shift: float) -> None:
    grid = euler_grid(10, shift)
    assert trainable_steps(FlowSDE(0.7), grid) == tuple(range(8))
    assert trainable_steps(DanceSDE(0.3), grid) == tuple(range(8))
    assert trainable_steps(CPS(0.8), grid) == trainable_steps(DPMSDE(), grid) == tuple(range(9))
    assert trainable_steps(FlowSDE(0.7), grid, limit=30.0 if shift == 3.0 else 1e3) == tuple(range(9))
    for kernel in (ODE(), CPS(0.0), DDIM(0.0)):
        assert trainable_steps(kernel, grid) == ()


@pytest.mark.parametrize("kernel", [ODE(), DPMSDE()])
def test_edm_is_vp_in_other_units(kernel: Kernel) -> None:
    """With sigma_data = 1: x / r and F are x and v there, r^2 = sigma^2 + 1."""
    x_next = randn(2, 3, seed=2)
    r, r_next = (1 + 4.0) ** 0.5, (1 + 1.0) ** 0.5
    scaled = step_between((1 / r, 2 / r), (1 / r_next, 1 / r_next))
    theirs = transition(VPPath("v_prediction"), kernel, X / r, V, scaled)
    ours = transition(EDMPath(), kernel, X, V, EDM_12)
    torch.testing.assert_close(ours.mean, theirs.mean * r_next)
    if kernel == DPMSDE():
        shifted = Transition(ours.mean + 0.01, ours.std), Transition(theirs.mean + 0.01 / r_next, theirs.std)
        ratios = shifted[0].log_ratio(ours, x_next), shifted[1].log_ratio(theirs, x_next / r_next)
        torch.testing.assert_close(*ratios)


# Marginals. For data N(2, .5^2) the exact velocity is affine in x, so is every move, and the law of the last sample
# is a Gaussian whose mean and std follow from each step's slope, intercept and noise: no sampling is needed.

DATA_MEAN, DATA_STD = 2.0, 0.5
# Final std by number of steps, from an independent simulation of 4e5 samples.
FINAL_STD = {
    ODE(): {10: 0.431, 50: 0.486, 200: 0.497},
    FlowSDE(0.7): {10: 0.479, 50: 0.498, 200: 0.501},
    DanceSDE(0.3): {10: 0.440, 50: 0.488, 200: 0.497},
    CPS(0.3): {10: 0.420, 50: 0.471, 200: 0.481},
    CPS(0.8): {10: 0.352, 50: 0.389, 200: 0.398},
    DPMSDE(): {10: 0.387, 50: 0.469, 200: 0.492},
}


def exact_velocity(x: Tensor, step: NoiseStep) -> Tensor:
    alpha, sigma = step.alpha, step.sigma
    variance = (alpha * DATA_STD) ** 2 + sigma**2
    centered = (x - alpha * DATA_MEAN) / variance
    return sigma * centered - (DATA_MEAN + alpha * DATA_STD**2 * centered)


def final_law(kernel: Kernel, steps: int) -> tuple[float, float]:
    """Mean and std of the last sample, starting from N(0, 1)."""
    mean, variance, grid = 0.0, 1.0, linear_grid(steps)
    for index in range(steps):
        x, step = torch.tensor([[mean], [mean + 1]], dtype=torch.float64), grid[index]
        used = ODE() if step.sigma_next == 0 else kernel
        move = transition(FlowPath(), used, x, exact_velocity(x, step), step)
        slope = (move.mean[1] - move.mean[0]).item()
        mean, variance = move.mean[0].item(), slope**2 * variance + move.std.item() ** 2
    return mean, math.sqrt(variance)


@pytest.mark.parametrize("kernel", FINAL_STD)
@pytest.mark.parametrize("steps", [10, 50, 200])
def test_spread_of_gaussian_data(kernel: Kernel, steps: int) -> None:
    mean, std = final_law(kernel, steps)
    assert std == pytest.approx(FINAL_STD[kernel][steps], abs=0.003)
    assert mean == pytest.approx(DATA_MEAN, abs=1e-6)
