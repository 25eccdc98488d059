"""Parameters of credits over several rewards, and nuisances; test_credit_properties has what all credits owe."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from genalign.algorithms.advantages import log_tamed
from genalign.algorithms.credit import GroupRelative, PlainReward
from genalign.algorithms.interfaces import RoundScores
from genalign.algorithms.multi_reward_credit import (
    AmongCorrect,
    CorrelationWeighted,
    Decorrelated,
    GatedBySuccess,
    LogTamed,
    decorrelated,
)

FIRST, SECOND, THIRD = [1.0, 2.0, 3.0, 6.0], [2.0, 4.0, 6.0, 12.0], [3.0, 1.0, 2.0, 0.0]
TAMABLE = [0.1, 0.1, 0.1, 0.3]
CMO = [1.3277746197, -0.8192174925, 0.5932419209, -1.1017990482]
NAMES = ("rule", "style", "nuisance")


def round_scores(*columns: Sequence[float], weights: Sequence[float] | None = None, groups: int = 1) -> RoundScores:
    table = torch.tensor(columns).T
    group = torch.arange(len(table)) // (len(table) // groups)
    return RoundScores(table, tuple(weights or [1.0] * len(columns)), group, names=NAMES[: len(columns)])


def near(values: Sequence[float], tolerance: float = 1e-6) -> object:
    return pytest.approx(list(values), abs=tolerance)


def test_a_single_reward_is_only_normalized() -> None:
    z = [-1.0690449676, -0.5345224838, 0.0, 1.6035674515]
    assert CorrelationWeighted()(round_scores(FIRST)).tolist() == near(z)


def test_own_weights_multiply_and_turn_rewards_around() -> None:
    """A reward of weight -1 is the same as its negative of weight 1."""
    turned = CorrelationWeighted()(round_scores(FIRST, SECOND, [-x for x in THIRD], weights=[1.0, 1.0, -1.0]))
    assert turned.tolist() == near(CMO)
    heavy = CorrelationWeighted(temperature=1e6)(round_scores(FIRST, THIRD, weights=[3.0, 1.0]))
    z = [torch.tensor(x, dtype=torch.float64) for x in (FIRST, THIRD)]
    z = [(x - x.mean()) / x.std(correction=0) for x in z]
    expected = 3 * z[0] + z[1]
    assert heavy.tolist() == near((expected / expected.std(correction=0)).tolist(), 1e-4)


def test_a_reward_of_large_relative_spread_is_tamed() -> None:
    expected = [-1.200905225, -0.4375127518, 0.1041228276, 1.5342951493]
    for threshold in ("median", 0.6):
        assert LogTamed(threshold)(round_scores(FIRST, TAMABLE)).tolist() == near(expected)
    untamed, plain = LogTamed(9.0)(round_scores(FIRST, TAMABLE)), GroupRelative()(round_scores(FIRST, TAMABLE))
    assert torch.equal(untamed, plain)
    with pytest.raises(ValueError, match='threshold must be "mean", "median" or a number'):
        log_tamed(torch.rand(4, 2), "largest")  # type: ignore[arg-type]


RULE, STYLE = [1.0, 1, 0, 1, 0, 0, 1, 0], [0.2, 0.6, 0.9, 0.4, 0.1, 0.5, 0.4, 0.3]


def test_right_samples_compete_in_style() -> None:
    strong = AmongCorrect("rule", weight=5.0)(round_scores(RULE, STYLE))
    assert strong[0] == 0.0 and strong[1] == 5.0  # never against being right, and clipped
    partial = AmongCorrect("rule", threshold=2.0)(round_scores(RULE, STYLE))
    assert torch.equal(partial, GroupRelative()(round_scores(RULE)))  # none is right


def test_other_rewards_count_where_a_group_succeeds() -> None:
    scores = round_scores([1.0, 1, 0, 0, 1, 0, 0, 0], STYLE, groups=2)
    gated = GatedBySuccess("rule", rate=0.5)(scores)
    both, alone = GroupRelative()(scores), GroupRelative()(round_scores([1.0, 1, 0, 0, 1, 0, 0, 0], groups=2))
    assert torch.equal(gated[:4], both[:4]) and torch.equal(gated[4:], alone[4:])
    assert torch.equal(GatedBySuccess("rule", rate=0.25)(scores), both)
    assert torch.equal(GatedBySuccess("rule", rate=0.51)(scores), alone)
    with pytest.raises(ValueError, match=r"rate is a fraction of a group's samples, in \(0, 1\], not 0"):
        GatedBySuccess("rule", rate=0.0)


CREDIT, NUISANCE = [1.0, -1, 0.5, -0.5, 0.8, -0.2, -0.9, 0.3], [0.3, 0.1, 0.25, 0.05, 0.4, 0.35, 0.2, 0.3]
RESIDUAL = [0.1067961165, -0.4640776699, -0.0359223301, 0.3932038835]
RESIDUAL += [0.1747572816, -0.467961165, -0.0961165049, 0.3893203883]
PAIR = torch.arange(8) // 4


def residual(*nuisances: Tensor, credit: Sequence[float] = CREDIT, counted: Tensor | None = None) -> Tensor:
    rows = torch.ones(8, dtype=torch.bool) if counted is None else counted
    return decorrelated(torch.tensor(credit, dtype=torch.float64), torch.stack(nuisances, 1), PAIR, rows)


def test_a_nuisance_is_taken_from_the_credit() -> None:
    nuisance = torch.tensor(NUISANCE, dtype=torch.float64)
    assert residual(nuisance).tolist() == near(RESIDUAL, 1e-8)
    assert residual(-0.01 * nuisance + 7).tolist() == near(RESIDUAL, 1e-8)  # units and level do not matter
    assert residual(nuisance, 2 * nuisance + 1).tolist() == near(RESIDUAL, 1e-8)  # twins count as one
    centered = (nuisance.view(2, 4) - nuisance.view(2, 4).mean(1, keepdim=True)).flatten()
    assert abs(float(residual(nuisance) @ centered)) < 1e-12


def test_a_nuisance_that_is_constant_in_every_group_changes_nothing() -> None:
    per_prompt = torch.tensor([0.1, 0.7]).double().repeat_interleave(4)
    expected = torch.tensor(CREDIT, dtype=torch.float64)  # the first group is centered, the second is not
    expected = (expected.view(2, 4) - expected.view(2, 4).mean(1, keepdim=True)).flatten()
    assert residual(per_prompt).tolist() == near(expected.tolist(), 1e-12)


def test_an_unrelated_nuisance_hardly_changes_the_credit() -> None:
    generator = torch.Generator().manual_seed(0)
    credit, nuisance = torch.randn(4096, generator=generator), torch.randn(4096, 1, generator=generator)
    group, everything = torch.arange(4096) // 8, torch.ones(4096, dtype=torch.bool)
    credit = credit - credit.view(-1, 8).mean(1).repeat_interleave(8)
    changed = (decorrelated(credit, nuisance, group, everything) - credit).square().mean().sqrt()
    assert 0 < changed < 0.05


def test_a_group_without_credit_gets_none_and_moves_no_slope() -> None:
    nuisance = torch.tensor(NUISANCE, dtype=torch.float64)
    silent = residual(nuisance, credit=[*CREDIT[:4], 0, 0, 0, 0])
    assert torch.equal(silent[4:], torch.zeros(4, dtype=torch.float64))
    own = decorrelated(
        torch.tensor(CREDIT[:4], dtype=torch.float64), nuisance[:4, None], PAIR[:4], torch.ones(4, dtype=torch.bool)
    )
    torch.testing.assert_close(silent[:4], own)


def test_credit_of_steps_is_decorrelated_step_by_step() -> None:
    credit = torch.tensor([CREDIT, CREDIT[::-1]]).T
    scores = round_scores(CREDIT, NUISANCE, NUISANCE, weights=[1.0, 0.0, 0.0], groups=2)
    steps = Decorrelated(lambda _: credit, ["nuisance"])(scores)
    assert steps.shape == (8, 2) and steps[:, 0].tolist() == near(RESIDUAL)
    assert torch.equal(steps[:, 1], Decorrelated(lambda _: credit[:, 1], ["nuisance"])(scores))
    whole = Decorrelated(PlainReward(), ["style", "nuisance"])(scores)
    assert whole.tolist() == near(RESIDUAL)


def test_samples_without_a_nuisance_are_left_out() -> None:
    broken = [math.nan, *NUISANCE[1:]]
    scores = round_scores(CREDIT, broken, weights=[1.0, 0.0], groups=2)
    credit = Decorrelated(PlainReward(), ["style"])(scores)
    without = RoundScores(scores.scores[1:], scores.weights, scores.group[1:], names=scores.names)
    assert credit[0] == 0.0
    torch.testing.assert_close(credit[1:], Decorrelated(PlainReward(), ["style"])(without))


def random_scores() -> RoundScores:
    table = torch.rand(12, 3, generator=torch.Generator().manual_seed(3))
    return RoundScores(table, (1.0, 0.5, 0.0), torch.tensor([5] * 4 + [0] * 4 + [9] * 4), names=NAMES)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Decorrelated(PlainReward(), ["size"])(random_scores()),
         "the credit names the reward 'size', but the rewards are rule, style, nuisance"),
        (lambda: Decorrelated(PlainReward(), ["style"])(random_scores()),
         "the nuisance 'style' has weight 0.5, so the credit contains it: give it weight 0"),
        (lambda: Decorrelated(PlainReward(), "style"), "nuisances must be a list of names"),
        (lambda: AmongCorrect("strict")(random_scores()), "the credit names the reward 'strict'"),
        (lambda: GatedBySuccess("strict")(RoundScores(torch.rand(4, 1), (1.0,), torch.zeros(4).long())),
         "the credit names the reward 'strict', but the rewards have no names"),
        (lambda: CorrelationWeighted(0.0), "temperature must be positive, not 0"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
