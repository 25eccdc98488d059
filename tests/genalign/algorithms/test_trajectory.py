"""Objectives on stored transitions, on the tiny pipeline."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from genalign.algorithms.coupled import CoupledObjective
from genalign.algorithms.interfaces import UpdateBatch, UpdateContext
from genalign.algorithms.trajectory import ClippedSurrogate, PolicyGradient
from genalign.diffusion.rollout import ReplayBatch
from genalign.diffusion.transitions import FlowSDE
from pipelines import SD3
from tests.genalign.algorithms.updates import update_batch, update_context

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
    CoupledObjective(Squared()).backward(context, batch, scale=0.5, seed=0)
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
    CoupledObjective(Squared()).backward(context, batch, 1.0, 0)
    assert context.pipeline.ledger.nfe == 4 * 3 * 2  # the reference, and the pass with a graph
    assert context.metrics.log_ratio_max == 0.0
    CoupledObjective(Squared()).backward(context, UpdateBatch(batch.rollout, batch.credit, batch.group, False), 1.0, 0)
    assert context.pipeline.ledger.nfe == 4 * 3 * (2 + 3)


def test_a_surrogate_counts_samples_with_credit(tiny: SD3) -> None:
    batch = update_batch(update_context(tiny, FlowSDE(0.7)), STEPS)
    assert PolicyGradient(ClippedSurrogate(1e-3)).terms(batch) == 3 * 3
    stepwise = torch.tensor([[0.0, 0.5, 1.0]] + [[0.0, 0.0, 0.0]] * 3)
    assert PolicyGradient(ClippedSurrogate(1e-3)).terms(UpdateBatch(batch.rollout, stepwise, batch.group, True)) == 2


def test_steps_may_have_credit_and_weight_of_their_own(tiny: SD3) -> None:
    context = update_context(tiny, FlowSDE(0.7))
    batch = update_batch(context, STEPS)
    same = batch.credit[:, None].expand(-1, 3)
    surrogate = PolicyGradient(ClippedSurrogate(1e-3))
    surrogate.backward(context, batch, 1.0, 0)
    expected = _gradients(context)
    surrogate.backward(context, UpdateBatch(batch.rollout, same, batch.group, True), 1.0, 0)
    for a, b in zip(_gradients(context), expected, strict=True):
        assert torch.equal(a, b)
    late = torch.zeros(4, 3)
    late[:, 2] = batch.credit
    surrogate.backward(context, UpdateBatch(batch.rollout, late, batch.group, True), 1.0, 0)
    alone = _gradients(context)
    weighted = PolicyGradient(ClippedSurrogate(1e-3), weights=lambda kernel, grid, steps: torch.tensor([0.0, 0.0, 1.0]))
    weighted.backward(context, batch, 1.0, 0)
    for a, b in zip(_gradients(context), alone, strict=True):
        torch.testing.assert_close(a, b)
