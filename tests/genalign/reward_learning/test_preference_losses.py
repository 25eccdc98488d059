"""Losses of pairs, ratings and labels, by numbers worked by hand and by closed forms."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from genalign.reward_learning.preference_losses import (
    BradleyTerryLoss,
    CumulativeLogit,
    LabelPool,
    MarginBradleyTerryLoss,
    PairLoss,
    Regression,
    TiedBradleyTerryLoss,
    compared_rows,
    masked_mean,
)

ANY = torch.zeros(1, 1, dtype=torch.float64)


def of_one(loss: PairLoss, lead: float, preferred: float, difference: float = 0.0) -> float:
    values = (torch.tensor([[value]], dtype=torch.float64) for value in (lead, preferred, difference))
    return float(loss.per_pair(*values))


@pytest.mark.parametrize(
    ("lead", "margin", "strict", "tie", "constant"),
    [
        (1.2, 0.5, 0.4031860489, 2.2709720783, 1.7296472237),
        (0.0, 0.5, 0.9740769842, 1.9481539684, 1.4068291137),
        (-0.7, 3.0, 3.7244228459, 6.1199683105, 0.1224501399),
    ],
)
def test_ties_by_rao_and_kupper(lead: float, margin: float, strict: float, tie: float, constant: float) -> None:
    with_constant, without = TiedBradleyTerryLoss(margin), TiedBradleyTerryLoss(margin, constant=False)
    for loss in (with_constant, without):
        assert of_one(loss, lead, 1.0) == pytest.approx(strict, abs=1e-8)
        assert of_one(loss, -lead, 0.0) == pytest.approx(strict, abs=1e-8)
    assert of_one(without, lead, 0.5) == pytest.approx(tie, abs=1e-8)
    assert of_one(with_constant, lead, 0.5) == pytest.approx(constant, abs=1e-8)
    losses = [of_one(with_constant, lead, preferred) for preferred in (1.0, 0.0, 0.5)]
    assert sum(math.exp(-value) for value in losses) == pytest.approx(1, abs=1e-12)


def test_the_margin_of_videoreward_is_log_five_and_a_margin_of_zero_is_bradley_terry() -> None:
    assert TiedBradleyTerryLoss().margin == math.log(5)
    zero = TiedBradleyTerryLoss(0.0, constant=False)
    assert of_one(zero, 0.7, 1.0) == of_one(BradleyTerryLoss(), 0.7, 1.0)
    with pytest.raises(ValueError, match="gives ties no probability"):
        TiedBradleyTerryLoss(0.0)


def test_margins_grow_with_the_difference_and_spare_ties() -> None:
    loss = MarginBradleyTerryLoss(0.5)
    assert of_one(loss, 1.0, 1.0, 3.0) == pytest.approx(math.log1p(math.exp(0.5)))
    assert of_one(loss, 1.0, 0.0, -3.0) == pytest.approx(math.log1p(math.exp(2.5)))
    assert of_one(loss, 1.0, 0.5, 0.0) == of_one(BradleyTerryLoss(), 1.0, 0.5)


def fitted_slope(loss: PairLoss, differences: Tensor, preferred: Tensor) -> float:
    """The slope of a linear scorer with the least loss, by Newton's method in one variable."""
    slope = torch.zeros((), dtype=torch.float64, requires_grad=True)
    for _ in range(30):
        value = loss.per_pair((slope * differences)[:, None], preferred[:, None], 0 * differences[:, None]).mean()
        (gradient,) = torch.autograd.grad(value, slope, create_graph=True)
        (curvature,) = torch.autograd.grad(gradient, slope)
        slope = (slope - gradient / curvature).detach().requires_grad_(True)
    return float(slope.detach())


def test_a_linear_scorer_recovers_its_slope_from_500_pairs_with_ties() -> None:
    """Outcomes are drawn by a sequence of low discrepancy, so that chance has little part in the result."""
    slope, count = 1.5, 500
    loss = TiedBradleyTerryLoss()
    generator = torch.Generator().manual_seed(1)
    differences = 2.2 * torch.randn(count, generator=generator, dtype=torch.float64)
    win = torch.sigmoid(slope * differences - loss.margin)
    tie = 1 - win - torch.sigmoid(-slope * differences - loss.margin)
    order, drawn = differences.argsort(), torch.empty(count, dtype=torch.float64)
    drawn[order] = torch.remainder(torch.arange(count, dtype=torch.float64) * 0.6180339887498949, 1)
    preferred = torch.where(drawn < win, 1.0, torch.where(drawn < win + tie, 0.5, 0.0)).double()
    share = float((preferred == 0.5).double().mean())
    assert 0.25 < share < 0.45
    assert fitted_slope(loss, differences, preferred) == pytest.approx(slope, rel=0.05)
    coin = (torch.rand(count, generator=generator) < 0.5).double()
    guessed = torch.where(preferred == 0.5, coin, preferred)
    assert fitted_slope(BradleyTerryLoss(), differences, guessed) < 0.7 * slope


def test_ordinal_regression_has_the_probabilities_of_the_cumulative_logit() -> None:
    values = torch.tensor([[1.0], [2.0], [2.0], [4.0], [math.nan]])
    objective = CumulativeLogit().prepare(values)
    thresholds = torch.logit((torch.tensor([1.0, 3.0]) + 0.5) / 5)  # of the grades 1, 2 and 4, at the rates
    scores = torch.tensor([[0.3], [-0.2], [1.0], [0.5], [7.0]])
    at_most = torch.sigmoid(thresholds - scores[:4])
    probabilities = torch.stack([at_most[:, 0], at_most[:, 1] - at_most[:, 0], 1 - at_most[:, 1]], dim=1)
    expected = -probabilities[torch.arange(4), torch.tensor([0, 1, 1, 2])].log().mean()
    assert objective(scores, values, torch.zeros(5)).item() == pytest.approx(float(expected), abs=1e-6)
    far = objective(torch.full((5, 1), 200.0, requires_grad=True), values, torch.zeros(5))
    assert math.isfinite(far.item()) and far.item() > 100
    with pytest.raises(ValueError, match="have 30 different values"):
        CumulativeLogit().prepare(torch.arange(30.0)[:, None])


def test_ordinal_thresholds_are_learned_and_stay_in_order() -> None:
    generator = torch.Generator().manual_seed(0)
    quality = torch.randn(400, 1, generator=generator)
    noise = torch.rand(400, 1, generator=generator).logit()
    values = torch.bucketize(2 * quality + noise, torch.tensor([-2.0, 0.0, 3.0])).float()
    objective = CumulativeLogit().prepare(values)
    slope = torch.ones((), requires_grad=True)
    optimizer = torch.optim.LBFGS([slope, *objective.parameters()], max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = objective(slope * quality, values, torch.zeros(400))
        torch.autograd.backward(loss)
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    thresholds = objective.thresholds()[0]  # type: ignore[operator]
    assert slope.item() == pytest.approx(2, rel=0.15)
    torch.testing.assert_close(thresholds.detach(), torch.tensor([-2.0, 0.0, 3.0]), rtol=0, atol=0.4)


def test_regression_is_in_standardized_units_with_pairs_of_one_prompt() -> None:
    values = torch.tensor([[1.0, 5.0], [3.0, math.nan], [5.0, 7.0]])
    prompt = torch.tensor([0, 0, 1])
    scores = torch.tensor([[0.2, 0.0], [0.1, 9.0], [1.0, 0.5]])
    spread = math.sqrt(8 / 3)
    squares = [(0.2 + 2 / spread) ** 2, 0.1**2, (1 - 2 / spread) ** 2, (0.0 + 1) ** 2, (0.5 - 1) ** 2]
    plain = Regression(pairs=0).prepare(values)(scores, values, prompt)
    assert float(plain) == pytest.approx(sum(squares) / 5, abs=1e-6)
    paired = Regression(pairs=2.0).prepare(values)(scores, values, prompt)
    assert float(paired - plain) == pytest.approx(2 * math.log1p(math.exp(0.1)), abs=1e-6)
    with pytest.raises(ValueError, match="all ratings of a dimension are equal"):
        Regression().prepare(torch.ones(3, 1))


def test_labels_pair_good_with_bad_across_prompts() -> None:
    values = torch.tensor([[1.0], [1.0], [0.0], [math.nan]])
    scores = torch.tensor([[2.0], [0.5], [1.0], [9.0]])
    prompt = torch.arange(4)
    quality = (F.softplus(torch.tensor(-2.0)) + F.softplus(torch.tensor(-0.5)) + F.softplus(torch.tensor(1.0))) / 3
    pairs = (F.softplus(torch.tensor(-1.0)) + F.softplus(torch.tensor(0.5))) / 2
    ties = F.softplus(torch.tensor(3 - 1.5)) + F.softplus(torch.tensor(3 + 1.5))
    alone = LabelPool(pairs=0).prepare(values)(scores, values, prompt)
    assert float(alone) == pytest.approx(float(quality), abs=1e-6)
    assert float(LabelPool().prepare(values)(scores, values, prompt) - alone) == pytest.approx(float(pairs), abs=1e-6)
    tied = LabelPool(quality=0, ties=1.0, margin=3.0).prepare(values)(scores, values, prompt)
    strict = (F.softplus(torch.tensor(3 - 1.0)) + F.softplus(torch.tensor(3 + 0.5))) / 2
    assert float(tied) == pytest.approx(float(strict + ties), abs=1e-5)
    with pytest.raises(ValueError, match="all good or all bad"):
        LabelPool().prepare(torch.ones(3, 1))


@pytest.mark.parametrize("loss", [Regression(2.0), LabelPool(ties=0.5, margin=1.0)])
def test_losses_of_compared_items_by_blocks_are_those_at_once(
    loss: Regression | LabelPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 2 if isinstance(loss, LabelPool) else 5, (40, 2), generator=generator).float()
    values[::9, 0] = math.nan
    prompt, scores = torch.randint(0, 6, (40,), generator=generator), torch.randn(40, 2, generator=generator)
    objective, results = loss.prepare(values), list[tuple[Tensor, Tensor]]()
    for rows in (256, 7):
        monkeypatch.setattr("genalign.reward_learning.preference_losses._ROWS", rows)
        leaf = scores.clone().requires_grad_(True)
        value = objective(leaf, values, prompt)
        results.append((value, torch.autograd.grad(value, leaf)[0]))
    torch.testing.assert_close(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])


def test_rows_are_compared_with_all_of_their_group_in_small_blocks() -> None:
    group = torch.randint(0, 2000, (4000,), generator=torch.Generator().manual_seed(0))
    largest, seen = int(torch.bincount(group).max()), list[int]()
    for rows, others in compared_rows(group):
        assert len(rows) <= 256 and len(others) <= len(rows) + 2 * largest
        assert set(others.tolist()) >= set(torch.isin(group, group[rows]).nonzero()[:, 0].tolist())
        seen += rows.tolist()
    assert sorted(seen) == list(range(4000))
    sizes = [(len(rows), len(others)) for rows, others in compared_rows(torch.zeros(600))]
    assert sizes == [(256, 600), (256, 600), (88, 600)]


def test_an_empty_mask_costs_nothing() -> None:
    values = torch.tensor([1.0, 2.0], requires_grad=True)
    mean = masked_mean(values, torch.tensor([False, False]))
    torch.autograd.backward(mean)
    assert mean.item() == 0 and values.grad is not None and values.grad.eq(0).all()
