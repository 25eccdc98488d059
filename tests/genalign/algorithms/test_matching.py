"""Objectives on freshly noised samples, on the tiny pipeline."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from genalign.algorithms.matching import MatchingObjective, NoisedSamples
from genalign.algorithms.matching_losses import DPOLoss, KTOLoss
from genalign.diffusion.transitions import ODE
from pipelines import SD3
from tests.genalign.algorithms.updates import update_batch, update_context


@dataclass(frozen=True)
class RecordingLoss:
    """Weighted matching that records its noised samples."""

    noised_batches: list[NoisedSamples] = field(default_factory=list)

    def used(self, credit: Tensor) -> Tensor:
        return torch.ones_like(credit, dtype=torch.bool)

    def terms(self, credit: Tensor, group: Tensor) -> int:
        return len(credit)

    def __call__(self, noised: NoisedSamples, credit: Tensor, group: Tensor) -> Tensor:
        self.noised_batches.append(noised)
        return credit * noised.error


def test_a_group_shares_level_and_noise(tiny: SD3) -> None:
    context, loss = update_context(tiny, ODE()), RecordingLoss()
    MatchingObjective(loss, draws=2).backward(context, update_batch(context), 1.0, seed=3)
    first, second = loss.noised_batches
    for noised in loss.noised_batches:
        sigma = noised.level.sigma
        assert sigma[0] == sigma[1] != sigma[2] == sigma[3]
        eps = (noised.x - noised.level.alpha.view(-1, 1, 1, 1) * noised.x0) / sigma.view(-1, 1, 1, 1)
        torch.testing.assert_close(eps[0], eps[1], rtol=0, atol=1e-4)
        assert not torch.allclose(eps[0].float(), eps[2].float(), atol=0.1)
        torch.testing.assert_close(noised.target, (eps - noised.x0).float(), rtol=0, atol=1e-4)
    assert bool((first.level.sigma < 0.5).all()) and bool((second.level.sigma > 0.5).all())


def test_only_the_current_prediction_carries_a_gradient(tiny: SD3) -> None:
    context, loss = update_context(tiny, ODE(), lagging=True), RecordingLoss()
    batch = update_batch(context)
    MatchingObjective(loss, draws=1, old=True).backward(context, batch, 1.0, seed=3)
    (noised,) = loss.noised_batches
    assert noised.prediction.requires_grad and not noised.reference.requires_grad and not noised.old.requires_grad
    torch.testing.assert_close(noised.old, noised.reference)  # the old policy is the one that training started from
    assert not torch.allclose(noised.old, noised.prediction.detach())
    assert context.pipeline.ledger.nfe == 3 * 4
    assert context.metrics.mean("kl") > 0


def test_the_same_seed_draws_the_same(tiny: SD3) -> None:
    context, loss = update_context(tiny, ODE()), RecordingLoss()
    batch = update_batch(context)
    for seed in (3, 3, 4):
        MatchingObjective(loss, draws=1).backward(context, batch, 1.0, seed)
    a, b, c = (noised.x for noised in loss.noised_batches)
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_samples_without_credit_cost_nothing(tiny: SD3) -> None:
    context = update_context(tiny, ODE())
    batch = update_batch(context)
    MatchingObjective(KTOLoss(100.0), draws=2).backward(context, batch, 1.0, 0)
    assert context.pipeline.ledger.nfe == 2 * 2 * 3  # draws, policy and reference, samples with credit
    nothing = replace(batch, credit=torch.zeros(4))
    MatchingObjective(DPOLoss(100.0), draws=2).backward(context, nothing, 1.0, 0)
    assert context.pipeline.ledger.nfe == 2 * 2 * 3


def test_draws_of_few_samples_go_through_the_network_together(tiny: SD3, monkeypatch: pytest.MonkeyPatch) -> None:
    context = update_context(tiny, ODE())
    batch = replace(update_batch(context), credit=torch.tensor([1.0, -1.0, 0.0, 0.0]))
    sizes: list[int] = []
    predict = context.pipeline.predict

    def watched(x: Tensor, *arguments: Any) -> Tensor:
        sizes.append(len(x))
        return predict(x, *arguments)

    monkeypatch.setattr(context.pipeline, "predict", watched)
    objective = MatchingObjective(DPOLoss(100.0), draws=3, anchor=0.0)

    def gradient() -> Tensor:
        sizes.clear()
        objective.backward(context, batch, 1.0, 0)
        gradient_vector = torch.cat([p.grad.flatten() for p in context.policy.parameters if p.grad is not None])
        for parameter in context.policy.parameters:
            parameter.grad = None
        return gradient_vector

    together = gradient()
    assert sizes == [4, 4, 2, 2]  # reference and policy, two draws and one
    context.policy.sharded = True  # whose ranks take the draws one by one
    alone = gradient()
    assert sizes == [2] * 6
    assert float((together - alone).norm()) < 1e-5 * float(alone.norm())


def test_an_old_policy_must_exist_and_credit_be_per_sample(tiny: SD3) -> None:
    context = update_context(tiny, ODE())
    batch = update_batch(context)
    with pytest.raises(ValueError, match="needs the lagging sampling weights: give the recipe a lag"):
        MatchingObjective(RecordingLoss(), old=True).backward(context, batch, 1.0, 0)
    with pytest.raises(ValueError, match=r"credit must be \(4,\), one entry per sample"):
        MatchingObjective(RecordingLoss()).terms(replace(batch, credit=torch.zeros(4, 3)))


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="draws must be at least 1"):
        MatchingObjective(RecordingLoss(), draws=0)
    with pytest.raises(ValueError, match="ascending fractions"):
        MatchingObjective(RecordingLoss(), low=0.9, high=0.1)
