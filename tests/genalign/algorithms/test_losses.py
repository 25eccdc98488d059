"""Losses against numbers worked by hand, closed forms and identities."""

import math

import pytest
import torch
from torch import Tensor

from genalign.algorithms.losses import (
    KLForm,
    awm_log_probability,
    clip_fraction,
    clipped_surrogate,
    dpo_loss,
    dppo_mask,
    guarded_log_ratio,
    kl_penalty,
    kto_loss,
    nft_loss,
    noise_weights,
    prdp_loss,
    untied_groups,
)
from genalign.diffusion.paths import FlowPath
from genalign.diffusion.transitions import CPS, ODE, DanceSDE, FlowSDE, Kernel, Transition, transition
from genalign.types import NoiseStep


def gradient(loss: Tensor, of: Tensor) -> Tensor:
    return torch.autograd.grad(loss.sum(), of)[0]


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


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


def test_a_step_down_the_surrogate_raises_what_was_better() -> None:
    x, v, step = randn(2, 5, seed=0), randn(2, 5, seed=1), two_steps()
    old = transition(FlowPath(), FlowSDE(0.7), x, v, step)
    x_next, advantages = old.sample(randn(2, 5, seed=2)), torch.tensor([1.0, -1.0]).double()
    current = v.clone().requires_grad_()
    move = transition(FlowPath(), FlowSDE(0.7), x, current, step)
    ascent = gradient(clipped_surrogate(move.log_ratio(old, x_next), advantages, 1e-2), current)
    updated = transition(FlowPath(), FlowSDE(0.7), x, v - 1e-3 * ascent, step)
    change = updated.log_ratio(old, x_next)
    assert change[0].item() > 0 > change[1].item()


def penalty(form: KLForm, kernel: Kernel, v: Tensor, v_ref: Tensor) -> Tensor:
    x, step = randn(2, 3, 4, seed=0), two_steps()
    current, reference = (transition(FlowPath(), kernel, x, prediction, step) for prediction in (v, v_ref))
    return kl_penalty(form, current, reference, v, v_ref, step)


@pytest.mark.parametrize("kernel", [FlowSDE(0.7), DanceSDE(0.3)])
def test_forms_of_the_penalty_are_multiples_of_the_distance_of_velocities(kernel: Kernel) -> None:
    v, v_ref, step = randn(2, 3, 4, seed=1), randn(2, 3, 4, seed=2), two_steps()
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
        torch.testing.assert_close(penalty(form, kernel, v, v_ref), value, rtol=1e-10, atol=1e-12)


def test_worked_penalty() -> None:
    mean = torch.tensor([[0.01, -0.02, 0.005, 0.015]], dtype=torch.float64)
    std, step = torch.tensor(0.2, dtype=torch.float64), two_steps()
    alone = NoiseStep(*(field[:1] for field in vars(step).values()))
    move, reference = Transition(mean, std), Transition(torch.zeros_like(mean), std)
    assert kl_penalty("exact", move, reference, mean, mean, alone).item() == pytest.approx(0.00234375, abs=1e-12)
    assert kl_penalty("no_dt", move, reference, mean, mean, alone).item() == pytest.approx(0.00046875, abs=1e-12)
    assert kl_penalty("x", move, reference, mean, mean, alone).item() == pytest.approx(0.0001875, abs=1e-12)
    assert kl_penalty("v", move, reference, mean, mean, alone).item() == 0.0


@pytest.mark.parametrize("form", ["exact", "no_dt", "x", "v"])
def test_every_form_pulls_towards_the_reference(form: KLForm) -> None:
    v_ref = randn(2, 3, 4, seed=2)
    v = randn(2, 3, 4, seed=1).requires_grad_()
    slope = gradient(penalty(form, CPS(0.8), v, v_ref), v)
    assert bool((slope * (v - v_ref) > 0).all())
    assert torch.equal(penalty(form, CPS(0.8), v_ref, v_ref), torch.zeros(2, dtype=torch.float64))


def test_a_deterministic_step_has_only_the_distances() -> None:
    v, v_ref = randn(2, 3, 4, seed=1), randn(2, 3, 4, seed=2)
    densities: tuple[KLForm, ...] = ("exact", "no_dt")
    for form in densities:
        with pytest.raises(ValueError, match="train only stochastic steps"):
            penalty(form, ODE(), v, v_ref)
    assert bool((penalty("x", ODE(), v, v_ref) > 0).all())
    assert penalty("v", ODE(), v.bfloat16(), v_ref.bfloat16()).dtype == torch.float32


def test_inputs_are_checked() -> None:
    with pytest.raises(ValueError, match="must both be"):
        clipped_surrogate(torch.zeros(3), torch.zeros(3, 1), 0.2)
    for clip_range in (0.0, 1.0, -0.1):
        with pytest.raises(ValueError, match="clip_range"):
            clip_fraction(torch.zeros(3), clip_range)
    with pytest.raises(ValueError, match="form must be"):
        penalty("k3", ODE(), torch.zeros(2, 3, 4), torch.zeros(2, 3, 4))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="equal shapes"):
        kl_penalty(
            "v",
            Transition(torch.zeros(2, 3), torch.ones(())),
            Transition(torch.zeros(2, 3), torch.ones(())),
            torch.zeros(2, 3),
            torch.zeros(2, 1),
            two_steps(),
        )


def test_worked_numbers_of_the_guard() -> None:
    noise = torch.tensor([[0.5, -1.0, 0.25, 2.0]], dtype=torch.float64)
    moved = torch.tensor([[0.01, -0.02, 0.005, 0.015]], dtype=torch.float64)
    old = Transition(torch.zeros_like(noise), torch.tensor(0.2, dtype=torch.float64))
    new = Transition(moved, old.std)
    x_next = old.sample(noise)
    assert float(new.log_ratio(old, x_next)) == pytest.approx(0.06796875, abs=1e-9)
    assert float(new.kl(old)) == pytest.approx(0.00234375, abs=1e-9)
    assert float(guarded_log_ratio(new, old, x_next)) == pytest.approx(0.0140625, abs=1e-9)


def test_the_guard_is_of_each_sample_and_of_one_scale_at_all_steps() -> None:
    noise, moved = randn(3, 2, 5, seed=0), 1e-3 * randn(3, 2, 5, seed=1)
    std = torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64).view(3, 1, 1)
    old = Transition(torch.zeros_like(noise), std)
    ratio = guarded_log_ratio(Transition(moved, std), old, old.sample(noise))
    torch.testing.assert_close(ratio, (noise * moved).mean((1, 2)))
    assert torch.equal(guarded_log_ratio(old, old, old.sample(noise)), torch.zeros(3, dtype=torch.float64))


def test_the_mask_drops_only_what_moves_further_away() -> None:
    log_ratio = torch.tensor([0.1, 0.1, -0.1, -0.1, 0.1])
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    kl = torch.tensor([1.0, 1.0, 1.0, 1.0, 1e-6])
    assert dppo_mask(log_ratio, kl, advantages, 1e-5).tolist() == [False, True, True, False, True]


def test_noise_weights_are_those_of_the_published_grid() -> None:
    sigmas = [1.0, 0.96013, 0.91335, 0.85769, 0.79037, 0.70728, 0.60215, 0.46488, 0.27805, 0.00893]
    sigma = torch.tensor(sigmas, dtype=torch.float64)
    step = NoiseStep(sigma[:-1], 1 - sigma[:-1], sigma[:-1], torch.arange(9), 1 - sigma[1:], sigma[1:])
    weights = noise_weights(FlowSDE(0.7)(step).s)
    expected = [1.577, 1.673, 1.208, 1.004, 0.882, 0.795, 0.719, 0.635, 0.508]
    assert weights.tolist() == pytest.approx(expected, abs=2e-3)
    assert float(weights.mean()) == pytest.approx(1.0)
    torch.testing.assert_close(weights, 2.25 * FlowSDE(0.7)(step).s, rtol=2e-3, atol=0.0)  # the published constant
    for std in (torch.tensor([0.7, 0.0]), torch.ones(2, 1)):
        with pytest.raises(ValueError, match=r"std must be \(S,\) and positive"):
            noise_weights(std)


def test_the_guarded_ratio_is_symmetric_where_the_plain_one_leans_to_below_zero() -> None:
    noise, moved = randn(4000, 4, seed=0), 0.3 * randn(4000, 4, seed=1)
    std = torch.tensor(0.5, dtype=torch.float64)
    old, new = Transition(torch.zeros_like(moved), std), Transition(moved, std)
    x_next = old.sample(noise)
    plain, guarded = new.log_ratio(old, x_next), guarded_log_ratio(new, old, x_next)
    error = float(guarded.std()) / math.sqrt(4000)
    assert abs(float(guarded.mean())) < 4 * error
    assert float(plain.mean()) == pytest.approx(-(0.3**2) / (2 * 0.5**2), abs=4 * float(plain.std()) / math.sqrt(4000))


def test_the_mask_wants_one_entry_per_sample() -> None:
    for kl, advantages in ((torch.zeros(3, 1), torch.zeros(3)), (torch.zeros(3), torch.zeros(1))):
        with pytest.raises(ValueError, match="must both be"):
            dppo_mask(torch.zeros(3), kl, advantages, 1e-5)
    tiny = torch.full((1,), 1e-30)
    assert dppo_mask(tiny, torch.ones(1), tiny, 1e-5).tolist() == [False]  # their product is 0 in float32


# PRDP and the matching losses

ONE = torch.zeros(3, dtype=torch.long)


def table(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


CURRENT = table([0.10, -0.20], [0.05, 0.0], [-0.30, 0.40])
OLD = table([0.0, -0.10], [0.10, 0.05], [-0.25, 0.20])
REFERENCE = table([-0.05, -0.05], [0.0, 0.10], [-0.20, 0.10])
REWARDS = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("steps", "clip_range", "expected"),
    [
        ("mean", 1e9, 0.18375),
        ("mean", 0.1, 0.18375),
        ("mean", 0.02, 0.18855),
        ("sum", 1e9, 0.26),
        ("sum", 0.02, 0.2692),
    ],
)
def test_worked_numbers_of_prdp(steps: str, clip_range: float, expected: float) -> None:
    loss = prdp_loss(CURRENT - REFERENCE, OLD - REFERENCE, REWARDS, ONE, 2.0, clip_range, steps)  # type: ignore[arg-type]
    assert float(loss) == pytest.approx(expected, abs=1e-9)


def test_ties_are_dropped() -> None:
    ratios, old = CURRENT - REFERENCE, OLD - REFERENCE
    tied = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    assert float(prdp_loss(ratios, old, tied, ONE, 2.0, 1e9)) == pytest.approx(0.3753125, abs=1e-9)
    ratios.requires_grad_(True)
    nothing = prdp_loss(ratios, old, torch.ones(3), ONE, 2.0, 1e9)
    assert float(nothing.detach()) == 0.0 and not bool(torch.autograd.grad(nothing, ratios)[0].any())
    assert untied_groups(torch.tensor([1.0, 1.0, 2.0, 3.0]), torch.tensor([0, 0, 1, 1])) == 1


def test_missing_rewards_are_dropped() -> None:
    ratios, old = randn(4, 2, seed=0), randn(4, 2, seed=1)
    rewards = torch.tensor([1.0, math.nan, 0.5, 0.0], dtype=torch.float64)
    group = torch.zeros(4, dtype=torch.long)
    keep = [0, 2, 3]
    expected = prdp_loss(ratios[keep], old[keep], rewards[keep], ONE, 2.0, 0.1)
    assert float(prdp_loss(ratios, old, rewards, group, 2.0, 0.1)) == pytest.approx(float(expected))


def test_the_variance_identity_and_prompts_add_up() -> None:
    ratios, rewards = randn(10, 3, seed=2), randn(10, seed=3)
    group = torch.tensor([0] * 4 + [1] * 6)
    expected = sum(2 * (ratios.mean(1) - rewards / 0.7)[group == key].var() for key in (0, 1))
    assert float(prdp_loss(ratios, ratios, rewards, group, 0.7, 1e9)) == pytest.approx(float(expected))


def test_the_gradient_is_the_closed_form() -> None:
    ratios, old, rewards = randn(5, 3, seed=4).requires_grad_(True), randn(5, 3, seed=5), randn(5, seed=6)
    beta, clip = 0.8, 0.4
    group = torch.zeros(5, dtype=torch.long)
    (slopes,) = torch.autograd.grad(prdp_loss(ratios, old, rewards, group, beta, clip), ratios)
    with torch.no_grad():
        held = torch.clamp(ratios, old - clip, old + clip)
        inside = ((ratios - old).abs() <= clip).double()
        expected = torch.zeros(5, 3, dtype=torch.float64)
        pairs = [(a, b) for a in range(5) for b in range(5) if rewards[a] > rewards[b]]
        for a, b in pairs:
            target = (rewards[a] - rewards[b]) / beta
            plain = ratios[a].mean() - ratios[b].mean() - target
            clipped = held[a].mean() - held[b].mean() - target
            free = bool(plain**2 >= clipped**2)
            for row, sign in ((a, 1), (b, -1)):
                pull = 2 * (plain if free else clipped) / len(pairs) / 3 * sign
                expected[row] += pull * (1.0 if free else inside[row])
    torch.testing.assert_close(slopes, expected, rtol=0, atol=1e-10)


def test_prdp_on_policy_is_policy_gradient_with_a_baseline() -> None:
    rewards, beta = randn(6, seed=0), 0.5
    ratios = torch.zeros(6, 4, dtype=torch.float64, requires_grad=True)
    loss = prdp_loss(ratios, ratios.detach(), rewards, torch.zeros(6, dtype=torch.long), beta, 1e-6)
    target = (rewards[:, None] - rewards[None, :]) / beta
    assert float(loss.detach()) == pytest.approx(float(target.square().sum() / 30))
    (slopes,) = torch.autograd.grad(loss, ratios)
    expected = -4 / (beta * 5) * (rewards - rewards.mean())
    torch.testing.assert_close(slopes.sum(1), expected)


def test_clipping_takes_away_the_incentive_to_go_further() -> None:
    old, rewards = torch.zeros(2, 1, dtype=torch.float64), torch.tensor([1.0, 0.0])
    group = torch.zeros(2, dtype=torch.long)
    further = torch.tensor([[0.2], [-0.2]], dtype=torch.float64, requires_grad=True)
    (slopes,) = torch.autograd.grad(prdp_loss(further, old, rewards, group, 1.0, 0.1), further)
    assert torch.equal(slopes, torch.zeros(2, 1, dtype=torch.float64))
    astray = torch.tensor([[-0.2], [0.2]], dtype=torch.float64, requires_grad=True)
    (slopes,) = torch.autograd.grad(prdp_loss(astray, old, rewards, group, 1.0, 0.1), astray)
    assert slopes.flatten().tolist() == pytest.approx([-2.8, 2.8])


def test_a_sample_that_failed_altogether_leaves_no_trace() -> None:
    ratios, old = randn(4, 2, seed=0), randn(4, 2, seed=1)
    ratios[1], rewards = math.nan, torch.tensor([1.0, math.nan, 0.5, 0.0])
    group = torch.zeros(4, dtype=torch.long)
    ratios.requires_grad_(True)
    loss = prdp_loss(ratios, old, rewards, group, 2.0, 0.1)
    (slopes,) = torch.autograd.grad(loss, ratios)
    assert bool(loss.isfinite()) and bool(slopes.isfinite().all())
    assert not bool(slopes[1].any()) and bool(slopes[[0, 2, 3]].any())


def test_prdp_in_float32_with_the_published_coefficients() -> None:
    ratios, old = 1e-4 * randn(8, 5, seed=0), 1e-4 * randn(8, 5, seed=1)
    rewards, group = randn(8, seed=2).float(), torch.tensor([0, 1] * 4)
    exact = prdp_loss(ratios, old, rewards, group, 3e-5, 1e-6)
    rounded = prdp_loss(ratios.float(), old.float(), rewards, group, 3e-5, 1e-6)
    assert rounded.dtype == torch.float32
    assert float(rounded) == pytest.approx(float(exact), rel=1e-5)


def test_dpo_at_the_reference_and_swapped() -> None:
    errors, other = randn(6, seed=0).abs().requires_grad_(True), randn(6, seed=1).abs()
    loss = dpo_loss(errors, errors.detach(), other, other, beta=50.0)
    assert loss.tolist() == pytest.approx([math.log(2)] * 6)
    slope = torch.autograd.grad(loss.sum(), errors)[0]
    assert slope.tolist() == pytest.approx([50.0 / 4] * 6)  # beta / 2 times sigmoid(0): the loss falls with the error
    moved = dpo_loss(errors + 0.01, errors, other, other, 50.0)
    swapped = dpo_loss(other, other, errors + 0.01, errors, 50.0)
    torch.testing.assert_close(torch.exp(-moved) + torch.exp(-swapped), torch.ones(6, dtype=torch.float64))
    improved = dpo_loss(errors - 0.01, errors, other, other, 50.0)
    assert bool((improved < math.log(2)).all()) and bool((moved > math.log(2)).all())


def test_kto_at_the_reference_and_of_one_kind() -> None:
    errors = randn(4, seed=0).abs().requires_grad_(True)
    for desirable, sign in ((True, 1.0), (False, -1.0)):
        loss = kto_loss(errors, errors.detach(), torch.full((4,), desirable), beta=8.0)
        assert loss.tolist() == pytest.approx([0.5] * 4)
        assert torch.autograd.grad(loss.sum(), errors)[0].tolist() == pytest.approx([sign * 8.0 / 4] * 4)


def test_kto_by_hand() -> None:
    reference = torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64)
    errors = torch.tensor([0.9, 1.0, 0.8], dtype=torch.float64, requires_grad=True)
    desirable = torch.tensor([True, True, False])
    loss = kto_loss(errors, reference, desirable, beta=10.0)
    z = 0.1  # the mean of 0.1, 0 and 0.2
    signed = (0.1 - z, 0.0 - z, -(0.2 - z))
    assert loss.tolist() == pytest.approx([1 - 1 / (1 + math.exp(-10 * value)) for value in signed])
    slopes = torch.autograd.grad(loss.sum(), errors)[0]
    assert bool((slopes[:2] > 0).all()) and float(slopes[2]) < 0  # the baseline carries no gradient
    assert float(kto_loss(errors.detach() + 1, reference, desirable, 10.0)[0]) == pytest.approx(
        1 - 1 / (1 + math.exp(9.0))
    )


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_nft_on_policy_is_advantage_weighted_matching(beta: float) -> None:
    x0, eps, old = randn(4, 2, 3, seed=0), randn(4, 2, 3, seed=1), randn(4, 2, 3, seed=2)
    sigma = torch.tensor([0.2, 0.5, 0.7, 0.9], dtype=torch.float64)
    wide = sigma.view(-1, 1, 1)
    x = (1 - wide) * x0 + wide * eps
    optimality = torch.tensor([0.0, 0.3, 0.5, 1.0], dtype=torch.float64)
    velocity = old.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(nft_loss(x - wide * velocity, x - wide * old, x0, optimality, beta).sum(), velocity)
    matching = old.clone().requires_grad_(True)
    difference = x - wide * matching - x0
    weighted = difference.square().mean((1, 2)) / difference.detach().abs().mean((1, 2))
    advantage = 2 * optimality - 1
    (expected,) = torch.autograd.grad((advantage * weighted).sum(), matching)
    torch.testing.assert_close(slope, expected)


def test_nft_without_advantage_holds_the_old_policy() -> None:
    x0, eps, old = randn(3, 5, seed=0), randn(3, 5, seed=1), randn(3, 5, seed=2)
    sigma = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    x = (1 - sigma[:, None]) * x0 + sigma[:, None] * eps
    half = torch.full((3,), 0.5, dtype=torch.float64)
    velocity = old.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(
        nft_loss(x - sigma[:, None] * velocity, x - sigma[:, None] * old, x0, half, 1.0).sum(), velocity
    )
    torch.testing.assert_close(slope, torch.zeros_like(slope))


def test_nft_matches_clean_samples_by_the_velocity() -> None:
    x0, eps, v = randn(3, 5, seed=0), randn(3, 5, seed=1), randn(3, 5, seed=2)
    sigma = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    x = (1 - sigma[:, None]) * x0 + sigma[:, None] * eps
    miss = sigma[:, None] * (v - (eps - x0))  # the distance of the clean sample that v points to
    loss = nft_loss(x - sigma[:, None] * v, x, x0, torch.ones(3, dtype=torch.float64), 1.0)
    torch.testing.assert_close(loss, miss.square().mean(1) / miss.abs().mean(1))
    exact = nft_loss(x - sigma[:, None] * (eps - x0), x0, x0, torch.ones(3, dtype=torch.float64), 1.0)
    assert exact.tolist() == pytest.approx([0.0] * 3, abs=1e-20)


def test_awm_on_policy_is_advantage_weighted_matching() -> None:
    target, sigma = randn(4, 5, seed=0), torch.tensor([0.2, 0.5, 0.7, 0.9], dtype=torch.float64)
    advantages = randn(4, seed=1)
    prediction = randn(4, 5, seed=2).requires_grad_(True)
    errors = (prediction - target).square().mean(1)
    likelihood = awm_log_probability(errors, sigma)
    surrogate = -(advantages * (likelihood - likelihood.detach()).exp()).sum()
    (slope,) = torch.autograd.grad(surrogate, prediction, retain_graph=True)
    weight = sigma * (errors.detach() + 1e-10) ** -0.75
    (expected,) = torch.autograd.grad((advantages * weight * errors).sum(), prediction)
    torch.testing.assert_close(slope, expected)


def test_inputs_of_regression_losses_are_checked() -> None:
    three, table_32, group = torch.zeros(3), torch.zeros(3, 2), torch.zeros(3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"must both be \(B, S\)"):
        prdp_loss(table_32, table_32[:2], three, group, 1.0, 0.1)
    with pytest.raises(ValueError, match=r"rewards must be \(3,\)"):
        prdp_loss(table_32, table_32, three[:2], group, 1.0, 0.1)
    with pytest.raises(ValueError, match="beta and clip_range must be positive"):
        prdp_loss(table_32, table_32, three, group, 0.0, 0.1)
    with pytest.raises(ValueError, match="steps must be"):
        prdp_loss(table_32, table_32, three, group, 1.0, 0.1, "median")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"worse must be \(3,\)"):
        dpo_loss(three, three, three[:1], three, 1.0)
    with pytest.raises(ValueError, match=r"reference_errors must be \(3,\)"):
        kto_loss(three, table_32, three.bool(), 1.0)
    with pytest.raises(TypeError, match="compare the credit with a threshold"):
        kto_loss(three, three, three, 1.0)
    with pytest.raises(ValueError, match="must have one shape"):
        nft_loss(table_32, table_32, torch.zeros(3, 1), three, 1.0)
    with pytest.raises(ValueError, match="beta must be positive"):
        nft_loss(table_32, table_32, table_32, three, 0.0)
    with pytest.raises(ValueError, match=r"sigma must be \(3,\)"):
        awm_log_probability(three, torch.tensor(0.5))


def test_awm_falls_with_the_error_and_is_zero_without() -> None:
    errors = torch.tensor([0.0, 0.1, 1.0], dtype=torch.float64, requires_grad=True)
    value = awm_log_probability(errors, torch.full((3,), 0.5))
    assert value.tolist() == pytest.approx([0.0, -2 * (0.1**0.25 - 10**-2.5), -2 * (1 - 10**-2.5)], abs=1e-6)
    slopes = torch.autograd.grad(value.sum(), errors)[0]
    assert slopes[1:].tolist() == pytest.approx([-0.5 * 0.1**-0.75, -0.5], rel=1e-6)
