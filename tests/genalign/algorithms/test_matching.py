"""Losses of the matching family against closed forms and identities, and their objective on the tiny pipeline."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from genalign.algorithms.interfaces import TermScales, UpdateBatch
from genalign.algorithms.matching import MatchingLoss, MatchingObjective, NoisedSamples
from genalign.algorithms.matching_losses import (
    AlphaLink,
    AWMLoss,
    ChiSquaredLink,
    DPOLoss,
    KTOLoss,
    Link,
    NFTLoss,
    awm_log_probability,
    dpo_loss,
    kto_loss,
    nft_loss,
)
from genalign.diffusion.paths import FlowPath
from genalign.diffusion.policy import WeightSnapshot
from genalign.diffusion.transitions import ODE
from genalign.types import NoiseLevel
from pipelines import SD3
from tests.genalign.algorithms.updates import SUMS, flat_gradient, randn, update_batch, update_context


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
    MatchingObjective(loss, draws=2).backward(context, update_batch(context), SUMS, seed=3)
    first, second = loss.noised_batches
    for noised in loss.noised_batches:
        sigma = noised.level.sigma
        assert sigma[0] == sigma[1] != sigma[2] == sigma[3]
        eps = (noised.x - noised.level.alpha.view(-1, 1, 1, 1) * noised.x0) / sigma.view(-1, 1, 1, 1)
        torch.testing.assert_close(eps[0], eps[1], rtol=0, atol=1e-4)
        assert not torch.allclose(eps[0].float(), eps[2].float(), atol=0.1)
        torch.testing.assert_close(noised.target, (eps - noised.x0).float(), rtol=0, atol=1e-4)
    middle = 3 * 0.5 / (1 + 2 * 0.5)  # of the range, as the scheduler shifts it
    assert bool((first.level.sigma < middle).all()) and bool((second.level.sigma > middle).all())


def test_only_the_current_prediction_carries_a_gradient(tiny: SD3) -> None:
    context, loss = update_context(tiny, ODE(), lagging=True), RecordingLoss()
    batch = update_batch(context)
    MatchingObjective(loss, draws=1, old="sampling").backward(context, batch, SUMS, seed=3)
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
        MatchingObjective(loss, draws=1).backward(context, batch, SUMS, seed)
    a, b, c = (noised.x for noised in loss.noised_batches)
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_samples_without_credit_cost_nothing(tiny: SD3) -> None:
    context = update_context(tiny, ODE())
    batch = update_batch(context)
    MatchingObjective(KTOLoss(100.0), draws=2).backward(context, batch, SUMS, 0)
    assert context.pipeline.ledger.nfe == 2 * 2 * 3  # draws, policy and reference, samples with credit
    nothing = replace(batch, credit=torch.zeros(4))
    MatchingObjective(DPOLoss(100.0), draws=2).backward(context, nothing, SUMS, 0)
    assert context.pipeline.ledger.nfe == 2 * 2 * 3


@pytest.mark.parametrize("loss", [AWMLoss(), DPOLoss(100.0), KTOLoss(100.0), NFTLoss()])
def test_the_anchor_is_a_mean_over_all_samples(tiny: SD3, loss: MatchingLoss) -> None:
    context = update_context(tiny, ODE())
    batch = replace(update_batch(context), credit=torch.tensor([1.0, -1.0, 0.0, 0.0]))

    def gradient(objective: MatchingObjective, part: UpdateBatch) -> Tensor:
        objective.backward(context, part, TermScales.of_means(objective.terms(part)), seed=1)
        return flat_gradient(context)

    anchored, plain = (gradient(MatchingObjective(loss, anchor=anchor), batch) for anchor in (3.0, 0.0))
    no_loss = replace(batch, credit=torch.zeros(4))
    anchor_alone = gradient(MatchingObjective(RecordingLoss(), anchor=3.0), no_loss)
    assert float(anchor_alone.norm()) > 0
    torch.testing.assert_close(anchored - plain, anchor_alone, rtol=1e-3, atol=1e-5 * float(anchored.abs().max()))


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
        objective.backward(context, batch, SUMS, 0)
        return flat_gradient(context)

    together = gradient()
    assert sizes == [4, 4, 2, 2]  # reference and policy, two draws and one
    context.policy.sharded = True  # whose ranks take the draws one by one
    alone = gradient()
    assert sizes == [2] * 6
    assert float((together - alone).norm()) < 1e-5 * float(alone.norm())


def test_an_old_policy_must_exist_and_credit_be_per_sample(tiny: SD3) -> None:
    context = update_context(tiny, ODE())
    batch = update_batch(context)
    with pytest.raises(ValueError, match="compares with earlier weights: give the recipe a lag"):
        MatchingObjective(RecordingLoss(), old="sampling").backward(context, batch, SUMS, 0)
    with pytest.raises(ValueError, match=r"credit must be \(4,\), one entry per sample"):
        MatchingObjective(RecordingLoss()).terms(replace(batch, credit=torch.zeros(4, 3)))


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="draws must be at least 1"):
        MatchingObjective(RecordingLoss(), draws=0)
    with pytest.raises(ValueError, match="ascending fractions"):
        MatchingObjective(RecordingLoss(), low=0.9, high=0.1)


# Losses


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


@pytest.mark.parametrize(
    ("link", "inside"),
    [
        (None, 2.5),
        (ChiSquaredLink(1e-9), 2.5),
        (ChiSquaredLink(10.0), 2.4514613437),
        (ChiSquaredLink(50.0), 2.4975758342),
        (AlphaLink(1e-9), 2.5),
        (AlphaLink(5.0), 50 * (0.0190325164 + 0.0323668485)),
    ],
)
def test_worked_numbers_of_links(link: Link | None, inside: float) -> None:
    reference = torch.tensor([0.5], dtype=torch.float64)
    loss = dpo_loss(reference - 0.02, reference, reference + 0.03, reference, 100.0, link)
    assert float(loss) == pytest.approx(math.log1p(math.exp(-inside)), rel=1e-6)
    tied = dpo_loss(reference - 0.02, reference, reference - 0.02, reference, 100.0, link)
    assert float(tied) == pytest.approx(math.log(2))


@pytest.mark.parametrize("link", [ChiSquaredLink(30.0), AlphaLink(30.0)])
def test_a_link_increases_from_0_with_slope_1_and_never_overflows(link: Link) -> None:
    gains = torch.cat([torch.linspace(-0.4, 0.4, 401), torch.tensor([-1e3, 1e3, 0.0])]).requires_grad_(True)
    values = link(gains)
    (slopes,) = torch.autograd.grad(values.sum(), gains)
    assert bool((values[:401].diff() > 0).all()) and bool((slopes >= 0).all()) and bool(slopes.isfinite().all())
    assert float(values[-1].detach()) == 0.0 and float(slopes[-1]) == pytest.approx(1.0)
    loss = dpo_loss(gains.detach(), torch.zeros(404), -gains.detach(), torch.zeros(404), 100.0, link)
    assert bool(loss.isfinite().all())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ChiSquaredLink(0.0), "sharpness must be a positive number, not 0.0"),
        (lambda: AlphaLink(-1.0), "alpha must be a positive number, not -1.0"),
    ],
)
def test_settings_of_links_are_checked(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


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


def test_awm_falls_with_the_error_and_is_zero_without() -> None:
    errors = torch.tensor([0.0, 0.1, 1.0], dtype=torch.float64, requires_grad=True)
    value = awm_log_probability(errors, torch.full((3,), 0.5))
    assert value.tolist() == pytest.approx([0.0, -2 * (0.1**0.25 - 10**-2.5), -2 * (1 - 10**-2.5)], abs=1e-6)
    slopes = torch.autograd.grad(value.sum(), errors)[0]
    assert slopes[1:].tolist() == pytest.approx([-0.5 * 0.1**-0.75, -0.5], rel=1e-6)


def test_all_winners_meet_all_losers_by_the_weight_of_the_pair() -> None:
    """Two winners and two losers are four pairs, each times half the difference of its credits; by hand (F23)."""
    errors, reference = torch.tensor([0.30, 0.5, 0.41, 0.6]), torch.tensor([0.32, 0.5, 0.40, 0.6])
    credit, group = torch.tensor([1.4, 1.0, -1.0, -0.6]), torch.zeros(4, dtype=torch.long)
    zero = torch.zeros(4, 1)
    level = NoiseLevel(*[torch.full((4,), 0.5, dtype=torch.float64)] * 3)
    parts = zero, errors.sqrt()[:, None], reference.sqrt()[:, None], zero
    noised = NoisedSamples(FlowPath(), zero, zero, level, *parts)
    loss = DPOLoss(100.0, pairs="all", weighted=True, sft=0.5)
    assert loss.terms(credit, group) == 4
    plain = dpo_loss(
        *(values[rows] for rows in ([0, 0, 1, 1], [2, 3, 2, 3]) for values in (errors, reference)), beta=100.0
    )
    weights, winners = torch.tensor([1.2, 1.0, 1.0, 0.8]), errors[[0, 0, 1, 1]]
    torch.testing.assert_close(loss(noised, credit, group), weights * plain + 0.5 * winners)
    torch.testing.assert_close(1.2 * plain[0], torch.tensor(0.241695933579), rtol=1e-4, atol=0)


def test_an_anchor_weighs_good_samples_more_and_a_trail_holds_to_the_memory(tiny: SD3) -> None:
    context = update_context(tiny, ODE())
    batch = update_batch(context)
    memory = WeightSnapshot(context.policy.parameters)
    for tensor in memory.tensors:
        tensor.mul_(0.5)
    remembered = replace(context, memory=memory)

    def gradient(**options: Any) -> Tensor:
        MatchingObjective(RecordingLoss(), draws=1, **options).backward(remembered, batch, SUMS, 0)
        return flat_gradient(context)

    plain = gradient()
    anchored, half = gradient(anchor=1.0) - plain, gradient(anchor=1.0, anchor_least=0.5) - plain
    best = replace(batch, credit=torch.full((4,), 5.0))
    assert 0 < float(half.norm()) < float(anchored.norm())
    MatchingObjective(RecordingLoss(), draws=1, anchor=1.0, anchor_least=0.5).backward(remembered, best, SUMS, 0)
    top = flat_gradient(context)
    MatchingObjective(RecordingLoss(), draws=1, anchor=1.0).backward(remembered, best, SUMS, 0)
    torch.testing.assert_close(top, flat_gradient(context))  # of the best credit all have weight 1
    guided = gradient(anchor=1.0, anchor_guidance=4.0) - plain
    assert float((guided - anchored).norm()) > 1e-3 * float(anchored.norm())
    trailing = gradient(trail=1.0) - plain
    assert float(trailing.norm()) > 0 and remembered.metrics.mean("trail") > 0
    with pytest.raises(ValueError, match="compares with earlier weights: give the recipe a memory"):
        MatchingObjective(RecordingLoss(), trail=1.0).backward(context, batch, SUMS, 0)
