"""Corrections of label noise, against planted flips."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from genalign.reward_learning.examples import Item, Pairs
from genalign.reward_learning.label_noise import (
    EnsembleVote,
    FlipRobust,
    NoiseCorrection,
    Smoothing,
    apply_votes,
    changed_lines,
    count_votes,
)
from genalign.reward_learning.preference_losses import BradleyTerryLoss, TiedBradleyTerryLoss
from genalign.reward_learning.preferences import JudgedSample
from genalign.types import Prompt


def pairs(preferred: list[float]) -> Pairs:
    target = torch.tensor(preferred)[:, None]
    rows = torch.arange(2 * len(preferred)).view(-1, 2)
    return Pairs(rows, target, 2 * target - 1, ("ada",) * len(preferred))


def test_the_robust_loss_is_unbiased_under_flips() -> None:
    lead = torch.tensor([[0.7], [-1.3]], dtype=torch.float64)
    right = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    for loss in (BradleyTerryLoss(), TiedBradleyTerryLoss()):
        robust = FlipRobust(0.3)
        kept, flipped = (robust.per_pair(loss, lead, label, 2 * label - 1) for label in (right, 1 - right))
        torch.testing.assert_close(0.7 * kept + 0.3 * flipped, loss.per_pair(lead, right, 2 * right - 1))


def test_smoothing_moves_the_optimum_to_the_log_odds_of_a_flip() -> None:
    lead = torch.tensor([[math.log(0.9 / 0.1)]], dtype=torch.float64, requires_grad=True)
    one = torch.ones(1, 1, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(Smoothing(0.1).per_pair(BradleyTerryLoss(), lead, one, one).sum(), lead)
    assert float(gradient) == pytest.approx(0, abs=1e-12)
    assert torch.equal(
        Smoothing(0.0).per_pair(BradleyTerryLoss(), lead, one, one), BradleyTerryLoss().per_pair(lead, one, one)
    )


def slope_of(noise: NoiseCorrection | None, x: Tensor, preferred: Tensor) -> float:
    """The slope of the linear scorer with the least loss, by a fine grid."""
    slopes = torch.linspace(0, 6, 601, dtype=torch.float64)
    lead = (x[:, None] * slopes)[..., None]
    target, loss = preferred[:, None, None].expand_as(lead), BradleyTerryLoss()
    values = (
        loss.per_pair(lead, target, target) if noise is None else noise.per_pair(loss, lead, target, 2 * target - 1)
    )
    return float(slopes[values.mean(0).squeeze(-1).argmin()])


def test_planted_flips_flatten_a_scorer_and_the_robust_loss_recovers_it() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, generator=generator, dtype=torch.float64)
    right = (torch.rand(4000, generator=generator) < torch.sigmoid(2 * x)).double()
    flips = torch.rand(4000, generator=generator) < 0.2
    noisy = torch.where(flips, 1 - right, right)
    assert slope_of(None, x, noisy) < 1.3
    assert slope_of(FlipRobust(0.2), x, noisy) == pytest.approx(2, rel=0.15)
    assert slope_of(Smoothing(0.2), x, noisy) < slope_of(None, x, noisy)


def test_votes_are_counted_for_the_preferred_item() -> None:
    nan = math.nan
    leads = torch.tensor([[1.0, 2.0, 1.0, nan], [nan, 4.0, -3.0, nan]])[..., None]
    votes = count_votes(leads, pairs([1.0, 0.0, 0.5, 1.0]))
    torch.testing.assert_close(votes.mean[:2, 0], torch.tensor([1.0, -3.0]))
    assert votes.mean[2:].isnan().all()  # a tie, and a pair without a vote
    torch.testing.assert_close(votes.deviation[:2, 0], torch.tensor([0.0, 1.0]))
    assert votes.voters.tolist() == [1, 2, 2, 0]


def test_the_least_share_is_changed_where_the_ensemble_votes_against_it() -> None:
    labeled = pairs([1.0, 0.0, 1.0, 0.0])
    votes = count_votes(torch.tensor([[-2.0, -1.0, 3.0, 0.5]])[..., None], labeled)  # favored: -2, 1, 3, -0.5
    dropped, changed = apply_votes(labeled, votes, EnsembleVote(share=0.25))
    assert changed.squeeze(1).tolist() == [True, False, False, False]
    assert dropped.preferred.isnan().squeeze(1).tolist() == [True, False, False, False]
    flipped, changed = apply_votes(labeled, votes, EnsembleVote(share=0.75, change="flip"))
    assert changed.squeeze(1).tolist() == [True, False, False, True]  # the third least agrees with its label
    assert flipped.preferred.squeeze(1).tolist() == [0.0, 0.0, 1.0, 1.0]
    assert flipped.difference.squeeze(1).tolist() == [-1.0, -1.0, 1.0, 1.0]
    softened, _ = apply_votes(labeled, votes, EnsembleVote(share=0.25, change="soften"))
    assert float(softened.preferred[0]) == pytest.approx(1 / (1 + math.exp(2)))
    margins, _ = apply_votes(labeled, votes, EnsembleVote(share=0.0, adaptive_margin=True))
    assert margins.difference.squeeze(1).tolist() == [0.0, -1.0, 3.0, 0.0]


def test_changed_pairs_are_listed() -> None:
    labeled = pairs([1.0, 0.0])
    votes = count_votes(torch.tensor([[-2.0, -1.0]])[..., None], labeled)
    _, changed = apply_votes(labeled, votes, EnsembleVote(share=0.5))
    items = [Item(Prompt("a cube"), JudgedSample(b""), str(number)) for number in range(4)]
    (line,) = changed_lines(labeled, votes, changed, items, ["overall"])
    assert line["digests"] == ["0", "1"] and line["mean"] == -2.0 and line["annotator"] == "ada"


def test_wrong_settings_are_named() -> None:
    for kind in (Smoothing, FlipRobust):
        with pytest.raises(ValueError, match=r"below 0\.5"):
            kind(0.5)
    with pytest.raises(ValueError, match="2 or more members"):
        EnsembleVote(members=1)
