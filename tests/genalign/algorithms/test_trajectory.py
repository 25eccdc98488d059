"""Objectives on stored transitions on the tiny pipeline, and PRDP's loss against worked numbers and closed forms."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, Literal, cast

import pytest
import torch
from torch import Tensor

from genalign.algorithms.interfaces import MetricSums, TermCounts, TermScales, UpdateContext
from genalign.algorithms.trajectory import (
    ClippedSurrogate,
    CoupledObjective,
    GuardedSurrogate,
    MaskedSurrogate,
    PolicyGradient,
    PRDPLoss,
)
from genalign.diffusion.rollout import ReplayBatch, ReplayedStep
from genalign.diffusion.transitions import FlowSDE, Transition
from genalign.types import Grid
from pipelines import SD3
from tests.genalign.algorithms.updates import SUMS, flat_gradient, randn, update_batch, update_context

STEPS = (0, 1, 2)


def _gradients(context: UpdateContext) -> list[Tensor]:
    gradients = [parameter.grad.clone() for parameter in context.policy.parameters if parameter.grad is not None]
    for parameter in context.policy.parameters:
        parameter.grad = None
    return gradients


@dataclass(frozen=True)
class Squared:
    """Ties every step of every sample together."""

    clip_range: float | None = None

    def terms(self, credit: Tensor, group: Tensor) -> int:
        return 2

    def used(self, credit: Tensor, group: Tensor) -> Tensor:
        return torch.ones_like(group, dtype=torch.bool)

    def __call__(self, log_ratios: Tensor, old_log_ratios: Tensor, credit: Tensor, group: Tensor) -> Tensor:
        sums = log_ratios.sum(1)
        return ((sums[:, None] - sums[None, :]) - (credit[:, None] - credit[None, :])).square().sum()


@pytest.mark.parametrize("on_policy", [True, False])
def test_two_passes_equal_naive_automatic_differentiation(tiny: SD3, on_policy: bool) -> None:
    context = update_context(tiny, FlowSDE(0.7))
    batch = update_batch(context, STEPS, on_policy)
    CoupledObjective(Squared()).backward(context, batch, TermScales(0.5, 0.0), seed=0)
    ours = _gradients(context)
    ratios = []
    for stored in range(len(STEPS)):
        pairs = ReplayBatch.of_step(stored, len(batch))
        again, base = context.replay(batch, pairs), context.reference_replay(batch, pairs)
        ratios.append(again.new.log_ratio(base.new, again.x_next))
    together = torch.stack(ratios, dim=1)
    (0.5 * Squared()(together, together.detach(), batch.credit, batch.group)).backward()
    naive = _gradients(context)
    scale = max(float(gradient.abs().max()) for gradient in naive)
    assert scale > 0 and len(ours) == len(naive)
    for a, b in zip(ours, naive, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6 * scale)


def test_on_policy_the_first_pass_needs_no_forward_of_the_current_weights(tiny: SD3) -> None:
    context = update_context(tiny, FlowSDE(0.7))
    batch = update_batch(context, STEPS)
    CoupledObjective(Squared()).backward(context, batch, SUMS, 0)
    assert context.pipeline.ledger.nfe == 4 * 3 * 2  # the reference, and the pass with a graph
    assert context.metrics.read().log_ratio_max == 0.0
    CoupledObjective(Squared()).backward(context, replace(batch, on_policy=False), SUMS, 0)
    assert context.pipeline.ledger.nfe == 4 * 3 * (2 + 3)


def test_a_surrogate_counts_samples_with_credit(tiny: SD3) -> None:
    batch, surrogate = update_batch(update_context(tiny, FlowSDE(0.7)), STEPS), PolicyGradient(ClippedSurrogate(1e-3))
    assert surrogate.terms(batch) == TermCounts(9, 9)
    stepwise = torch.tensor([[0.0, 0.5, 1.0]] + [[0.0, 0.0, 0.0]] * 3)
    assert surrogate.terms(replace(batch, credit=stepwise)) == TermCounts(2, 2)


def test_steps_may_have_credit_and_weight_of_their_own(tiny: SD3) -> None:
    context, surrogate = update_context(tiny, FlowSDE(0.7)), PolicyGradient(ClippedSurrogate(1e-3))
    batch = update_batch(context, STEPS)
    late = replace(batch, credit=batch.credit[:, None] * torch.tensor([0.0, 0.0, 1.0]))
    weighted = replace(surrogate, weights=lambda kernel, grid, steps: torch.tensor([0.0, 0.0, 1.0]))
    gradients = []
    for objective, part in (
        (surrogate, batch),
        (surrogate, replace(batch, credit=batch.step_credit)),
        (surrogate, late),
        (weighted, batch),
    ):
        objective.backward(context, part, SUMS, 0)
        gradients.append(flat_gradient(context))
    assert torch.equal(gradients[0], gradients[1]) and not torch.allclose(gradients[0], gradients[2])
    torch.testing.assert_close(gradients[2], gradients[3])


@pytest.mark.parametrize("kl", [0.0, 5.0])
def test_loss_and_penalty_are_means_over_the_transitions_with_credit(tiny: SD3, kl: float) -> None:
    """As the published loop, which drops the samples without advantage and their KL before it takes both means."""
    context, objective = update_context(tiny, FlowSDE(0.7)), PolicyGradient(ClippedSurrogate(1e-3), kl, "no_dt")
    batch = update_batch(context, STEPS)
    half = replace(batch, credit=torch.tensor([1.0, -1.0, 0.0, 0.0]))
    (live, _) = half.split(2)
    gradients = []
    for part in (half, live):
        objective.backward(context, part, TermScales.of_means(objective.terms(part)), 0)
        gradients.append(flat_gradient(context))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-7)


def group_of(size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.long)


# Log-ratios (B, S) to the reference policy, of the current and of the sampling policy
CURRENT = torch.tensor([[0.15, -0.15], [0.05, -0.1], [-0.1, 0.3]], dtype=torch.float64)
OLD = torch.tensor([[0.05, -0.05], [0.1, -0.05], [-0.05, 0.1]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("steps", "clip_range", "expected"),
    [("mean", 0.99, 0.18375), ("mean", 0.02, 0.18855), ("sum", 0.99, 0.26), ("sum", 0.02, 0.2692)],
)
def test_worked_numbers_of_prdp(steps: Literal["mean", "sum"], clip_range: float, expected: float) -> None:
    loss = PRDPLoss(2.0, clip_range, steps)(CURRENT, OLD, torch.tensor([1.0, 0.5, 0.0]), group_of(3))
    assert float(loss) == pytest.approx(expected, abs=1e-9)


def test_ties_are_dropped() -> None:
    loss, ratios = PRDPLoss(2.0, 0.99), CURRENT.clone().requires_grad_()
    tied = loss(ratios, OLD, torch.tensor([1.0, 1.0, 0.0]), group_of(3))
    assert float(tied.detach()) == pytest.approx(0.3753125, abs=1e-9)
    nothing = loss(ratios, OLD, torch.ones(3), group_of(3))
    assert float(nothing.detach()) == 0.0 and not bool(torch.autograd.grad(nothing, ratios)[0].any())
    assert loss.terms(torch.tensor([1.0, 1.0, 2.0, 3.0]), torch.tensor([0, 0, 1, 1])) == 1


def test_the_variance_identity_and_prompts_add_up() -> None:
    ratios, rewards = randn(10, 3, seed=2), randn(10, seed=3)
    group = torch.tensor([0] * 4 + [1] * 6)
    expected = sum(2 * (ratios.mean(1) - rewards / 0.7)[group == key].var() for key in (0, 1))
    assert float(PRDPLoss(0.7, 0.99)(ratios, ratios, rewards, group)) == pytest.approx(float(expected))


def test_the_gradient_of_prdp_is_its_derivative() -> None:
    ratios, old, rewards = randn(5, 3, seed=4).requires_grad_(), randn(5, 3, seed=5), randn(5, seed=6)
    assert torch.autograd.gradcheck(lambda x: PRDPLoss(0.8, 0.4)(x, old, rewards, group_of(5)), ratios)


def test_a_sample_that_failed_altogether_leaves_no_trace() -> None:
    ratios, old = randn(4, 2, seed=0), randn(4, 2, seed=1)
    ratios[1], rewards = math.nan, torch.tensor([1.0, math.nan, 0.5, 0.0])
    keep = [0, 2, 3]
    expected = PRDPLoss(2.0, 0.1)(ratios[keep], old[keep], rewards[keep], group_of(3))
    ratios.requires_grad_(True)
    loss = PRDPLoss(2.0, 0.1)(ratios, old, rewards, group_of(4))
    (slopes,) = torch.autograd.grad(loss, ratios)
    assert float(loss.detach()) == pytest.approx(float(expected)) and bool(slopes.isfinite().all())
    assert not bool(slopes[1].any()) and bool(slopes[keep].any())


def test_prdp_in_float32_with_the_published_coefficients() -> None:
    ratios, old = 1e-4 * randn(8, 5, seed=0), 1e-4 * randn(8, 5, seed=1)
    rewards, group = randn(8, seed=2).float(), torch.tensor([0, 1] * 4)
    loss = PRDPLoss(3e-5, 1e-6)
    exact, rounded = loss(ratios, old, rewards, group), loss(ratios.float(), old.float(), rewards, group)
    assert rounded.dtype == torch.float32
    assert float(rounded) == pytest.approx(float(exact), rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0.0, 0.1), "beta must be positive"), ((1.0, 1.0), "clip_range"), ((1.0, 0.1, "median"), "steps must be")],
)
def test_settings_of_prdp_are_checked(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PRDPLoss(*arguments)
    with pytest.raises(ValueError, match=r"rewards must be \(3,\)"):
        PRDPLoss(1.0, 0.1).used(torch.zeros(3, 2), group_of(3))


def test_a_masked_surrogate_is_the_plain_one_inside_the_trust_region() -> None:
    """With std 1, a mean at d gives log r = d x_next - d^2 / 2, whose slope is x_next - d, and KL = d^2 / 2."""
    x_next, credit = torch.tensor([[2.0], [2.0], [-2.0], [-2.0], [2.0]]), torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    moved = torch.tensor([[0.5], [0.5], [0.5], [0.5], [0.01]], requires_grad=True)
    std = torch.ones(())
    step = Grid(torch.ones(1), torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0]))[torch.zeros(5, dtype=torch.long)]
    replayed = ReplayedStep(Transition(moved, std), Transition(torch.zeros(5, 1), std), x_next, moved, step)
    losses = MaskedSurrogate(limit=0.1)(replayed, credit)
    inside = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0])  # the first and the fourth have moved far, and would move further
    shift = moved.detach()[:, 0]
    ratio = (shift * x_next[:, 0] - shift**2 / 2).exp()
    torch.testing.assert_close(losses, -credit * ratio * inside)
    (slopes,) = torch.autograd.grad(losses.sum(), moved)
    torch.testing.assert_close(slopes[:, 0], -credit * ratio * (x_next[:, 0] - shift) * inside)


def test_a_guarded_surrogate_counts_the_ratios_that_it_clips() -> None:
    """With std 1/2 and a mean at d, log r = 4 (d x_next - d^2 / 2) and KL = 2 d^2: normalized, 2 d x_next."""
    moved, x_next = torch.tensor([[1e-3], [1e-3], [-1e-3], [3e-3]]), torch.tensor([[0.5], [2.0], [2.0], [0.5]])
    std = torch.tensor(0.5)
    step = Grid(torch.ones(1), torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0]))[torch.zeros(4, dtype=torch.long)]
    replayed = ReplayedStep(Transition(moved, std), Transition(torch.zeros(4, 1), std), x_next, moved, step)
    assert float(GuardedSurrogate(2e-3).clip_fraction(replayed)) == 0.75  # 1e-3 alone is within; log r is 2e-3
    assert float(GuardedSurrogate(3.5e-3).clip_fraction(replayed)) == 0.5


def test_worked_numbers_of_the_masked_surrogate() -> None:
    log_ratio = torch.tensor([2e-4, 2e-4, -2e-4, -2e-4, 2e-4], dtype=torch.float64)
    kl = torch.tensor([2e-5, 2e-5, 2e-5, 2e-5, 5e-6], dtype=torch.float64)
    credit = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0], dtype=torch.float64)
    loss, replayed = MaskedSurrogate(1e-5), _replayed(log_ratio, kl)
    expected = [0.0, 1.00020002, -0.99980002, 0.0, -1.00020002]
    assert loss(replayed, credit).tolist() == pytest.approx(expected, abs=1e-8)
    assert float(loss.clip_fraction(replayed)) == pytest.approx(0.8)  # for any credit
    unlimited = MaskedSurrogate(math.inf)
    torch.testing.assert_close(unlimited(replayed, credit), -credit * log_ratio.exp())
    assert float(unlimited.clip_fraction(replayed)) == 0.0
    on_policy = _replayed(torch.zeros(5), torch.zeros(5))
    torch.testing.assert_close(MaskedSurrogate(0.0)(on_policy, credit), -credit)


def test_a_masked_transition_has_a_gradient_of_exactly_zero_whatever_its_ratio() -> None:
    log_ratio = torch.tensor([1e4, -1e4, 1e-4], requires_grad=True)
    credit = torch.tensor([1.0, -1.0, 1.0])
    loss = MaskedSurrogate(1e-5)(_replayed(log_ratio, torch.tensor([1.0, 1.0, 0.0])), credit)
    (slope,) = torch.autograd.grad(loss.sum(), log_ratio)
    assert loss[:2].tolist() == slope[:2].tolist() == [0.0, 0.0] and float(slope[2]) == pytest.approx(-1.0, abs=1e-3)


def _replayed(log_ratio: Tensor, kl: Tensor) -> ReplayedStep:
    """A stand-in for replayed transitions of which only the log-ratio and the KL are read."""
    return cast(ReplayedStep, SimpleNamespace(log_ratio=log_ratio, new=SimpleNamespace(kl=lambda old: kl), old=None))


def test_a_chi_squared_penalty_is_sharper_but_the_metric_stays_the_kl(tiny: SD3) -> None:
    context = update_context(tiny, FlowSDE(0.7))
    batch, gradients, distances = update_batch(context, STEPS), list[Tensor](), list[float]()
    sharpness = 1.0
    for objective in (
        PolicyGradient(ClippedSurrogate(1e-3)),
        PolicyGradient(ClippedSurrogate(1e-3), kl=1.0),
        PolicyGradient(ClippedSurrogate(1e-3), kl=1.0, kl_sharpness=1e-6),
        PolicyGradient(ClippedSurrogate(1e-3), kl=1.0, kl_sharpness=sharpness),
    ):
        context = replace(context, metrics=MetricSums())
        objective.backward(context, batch, SUMS, 0)
        gradients.append(flat_gradient(context))
        distances.append(context.metrics.mean("kl"))
    assert distances[1] == distances[2] == distances[3] > 0
    plain, nearly, sharp = (gradient - gradients[0] for gradient in gradients[1:])
    torch.testing.assert_close(nearly, plain, rtol=1e-3, atol=1e-3 * float(plain.abs().max()))
    assert sharp.norm() > plain.norm() > 0


@pytest.mark.parametrize("sharpness", [-1.0, math.inf, math.nan])
def test_settings_of_a_penalty_and_a_trust_region_are_checked(sharpness: float) -> None:
    with pytest.raises(ValueError, match="kl_sharpness must be at least 0"):
        PolicyGradient(ClippedSurrogate(1e-3), kl=1.0, kl_sharpness=sharpness)
    with pytest.raises(ValueError, match="limit must be a KL divergence of 0 or more"):
        MaskedSurrogate(-1e-5)
