"""The parts of credits of steps, and the expected gradient of VGPO's anchor; test_credit_properties has the credits."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from genalign.algorithms.interfaces import Credit, RoundScores
from genalign.algorithms.step_credit import RewardGain, TurningPoint, ValueAnchored, discounted, turning_gains
from genalign.diffusion.transitions import Transition

# R_0, ..., R_4 of four samples: the first two turn at step 1, the third at step 0, and the fourth nowhere
TURNS = [[0.3, 0.2, 0.45, 0.4, 0.6], [0.3, 0.5, 0.35, 0.25, 0.2], [0.3, 0.35, 0.4, 0.2, 0.5], [0.3, 0.3, 0.1, 0.4, 0.1]]
AFTER = [[0.2, 0.25, 0.5], [0.3, 0.45, 0.4], [0.1, 0.3, 0.2], [0.25, 0.2, 0.6]]


def round_scores(scores: Tensor, group: list[int] | None = None) -> RoundScores:
    """The scores of a round with one reward, from R_0, ..., R_S (B, S + 1)."""
    groups = torch.tensor(group or [0] * len(scores))
    return RoundScores(scores[:, -1:], (1.0,), groups, stepwise=scores[:, :, None])


def after(scores: list[list[float]]) -> Tensor:
    """R_0, ..., R_S from R_1, ..., R_S, with an R_0 that must not matter."""
    table = torch.tensor(scores)
    return torch.cat([torch.full((len(table), 1), 7.0), table], dim=1)


def drawn(seed: int, samples: int = 8, steps: int = 4) -> Tensor:
    return torch.rand(samples, steps + 1, generator=torch.Generator().manual_seed(seed))


def check(result: Tensor, expected: list[list[float]], tolerance: float = 1e-6) -> None:
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, torch.tensor(expected), rtol=0, atol=tolerance)


def test_worked_numbers_of_turning_points() -> None:
    balanced = [[-0.1, 0.4, -0.05, 0.2], [0.2, -0.3, -0.1, -0.05], [0.05, 0.05, -0.2, 0.3], [0, -0.2, 0.3, -0.3]]
    scores = torch.tensor(TURNS)
    check(turning_gains(scores), balanced)
    check(turning_gains(scores, balanced=False), [*balanced[:2], [0.2, 0.05, -0.2, 0.3], balanced[3]])
    check(turning_gains(scores, bonus=2.0), [[-0.1, 0.8, -0.05, 0.2], [0.2, -0.6, -0.1, -0.05], *balanced[2:]])


@pytest.mark.parametrize("seed", range(8))
def test_turning_gains_have_the_symmetries_of_the_scores(seed: int) -> None:
    scores = drawn(seed).double()
    gains = turning_gains(scores)
    torch.testing.assert_close(turning_gains(scores + 3), gains)
    torch.testing.assert_close(turning_gains(-scores), -gains)
    torch.testing.assert_close(turning_gains(1e6 * scores), 1e6 * gains)
    torch.testing.assert_close(turning_gains(1e-6 * scores), 1e-6 * gains)
    assert torch.equal(gains[:, -1], scores.diff(dim=1)[:, -1].float())  # the last step is no turning point
    doubled, turned = turning_gains(scores, bonus=2.0), gains != scores.diff(dim=1).float()
    torch.testing.assert_close(doubled[turned], 2 * gains[turned])
    total = (scores[:, -1] - scores[:, 0]).sign()[:, None].expand_as(gains)
    assert torch.equal(gains[turned].sign(), total[turned].float())
    ends = scores[:, [0, -1]]
    torch.testing.assert_close(turning_gains(ends), ends.diff(dim=1).float())  # DenseGRPO, for one stored step


def test_balance_takes_the_largest_of_both_kinds_and_the_first_of_equal_ones() -> None:
    rising, falling = [0.0, 0.1, 0.5], [0.0, -0.1, -0.4]
    gains = turning_gains(torch.tensor([rising, [0.0, 0.1, 0.6], falling, [0.0, 0.2, 0.6]]))
    check(gains[:, :1], [[0.1], [0.6], [-0.4], [0.2]])
    check(turning_gains(torch.tensor([rising, rising]))[:, :1], [[0.5], [0.5]])  # none fall: all count


def test_rounding_makes_no_turning_points() -> None:
    scores = torch.tensor([[0.5, 0.5 + 1e-7, 0.9], [0.5, 0.1, 0.2]])
    check(turning_gains(scores, balanced=False), [[0.0, 0.4], [-0.4, 0.1]])


def test_worked_numbers_of_values() -> None:
    rewards = torch.tensor(AFTER, dtype=torch.float64)
    sums = [[0.83, 0.7, 0.5], [1.029, 0.81, 0.4], [0.532, 0.48, 0.2], [0.916, 0.74, 0.6]]
    torch.testing.assert_close(discounted(rewards, 0.9), torch.tensor(sums, dtype=torch.float64), rtol=0, atol=1e-8)
    assert torch.equal(discounted(rewards, 0.0), rewards)


def test_the_anchor_is_that_of_the_first_steps() -> None:
    scores = round_scores(after(AFTER))
    first, plain = ValueAnchored(anchor=0.1, anchored_steps=1)(scores), ValueAnchored()(scores)
    torch.testing.assert_close(first[:, :1], ValueAnchored(anchor=0.1)(scores)[:, :1])
    torch.testing.assert_close(first[:, 1:], plain[:, 1:])
    assert bool((first[:, 0] > plain[:, 0]).all())


def test_the_lowest_value_is_the_least_of_the_scores_that_follow() -> None:
    """Its advantages are those of the sum, without discount, of scores whose sums are these lowest ones."""
    lowest = torch.tensor([[0.2, 0.25, 0.5], [0.3, 0.4, 0.4], [0.1, 0.2, 0.2], [0.2, 0.2, 0.6]])
    own = ValueAnchored(reduction="min")(round_scores(after(AFTER)))
    same = ValueAnchored(discount=0.0)(round_scores(after(lowest.tolist())))
    assert torch.equal(own, same)
    spike = [[0.9, *AFTER[0][1:]], *AFTER[1:]]  # a high score that later ones do not confirm
    unmoved = ValueAnchored(reduction="min")(round_scores(after(spike)))[0, 0]
    assert unmoved < 0.5 < ValueAnchored()(round_scores(after(spike)))[0, 0]


def test_values_of_one_step_are_group_advantages_and_have_no_scale() -> None:
    scores = drawn(0)
    one = ValueAnchored()(round_scores(scores[:, -2:]))
    final = scores[:, -1].double()
    check(one, ((final - final.mean()) / (final.std(correction=0) + 1e-4))[:, None].tolist(), 2e-6)
    whole = ValueAnchored()(round_scores(scores))
    torch.testing.assert_close(ValueAnchored()(round_scores(3 * scores)), whole, rtol=0, atol=3e-3)  # but for 1e-4


def test_a_trajectory_without_any_reward_has_equal_shares() -> None:
    scores = after([[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]])
    credit = ValueAnchored(discount=0.0)(round_scores(scores))
    assert bool(credit.isfinite().all()) and torch.equal(credit[0, :1], credit[0, 1:]) and credit[0, 0] < -1


def _mean_gradient(credit: Callable[[Tensor], Tensor]) -> tuple[float, float]:
    """Mean, over noise, of the credit times the slope of log p(x' | x) for the mean, and its standard error."""
    noise = torch.randn(200_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, std = torch.zeros_like(noise, requires_grad=True), torch.tensor(0.7, dtype=torch.float64)
    move = Transition(mean, std)
    x_next = move.sample(noise).detach()
    log_ratio = move.log_ratio(Transition(mean.detach(), std), x_next)
    (slopes,) = torch.autograd.grad(log_ratio.sum(), mean)
    terms = credit(x_next[:, 0]).double() * slopes[:, 0]
    return float(terms.mean()), float(terms.std()) / math.sqrt(len(terms))


def test_the_anchor_of_values_has_no_expected_gradient() -> None:
    """Where the rewards of a group are equal, the anchored credit does not depend on the noise of the step."""
    scores = round_scores(after([[0.3, 0.3, 0.3]] * 4))
    anchored = ValueAnchored(anchor=0.1)(scores)
    check(anchored, [[0.1178197861, 0.0579144385, 0.0160427807]] * 4)
    assert not ValueAnchored()(scores).any()
    mean, error = _mean_gradient(lambda x_next: anchored[0, 0].expand(len(x_next)))
    assert error > 0 and abs(mean) < 4 * error
    mean, error = _mean_gradient(lambda x_next: x_next)  # what does depend on it has one
    assert mean > 4 * error


@pytest.mark.parametrize("credit", [RewardGain(0.01), TurningPoint(), ValueAnchored(), ValueAnchored(reduction="min")])
def test_credit_that_needs_a_missing_score_is_zero_and_changes_no_other(credit: Credit) -> None:
    """Without R_2 there is no gain of steps 1 and 2, and no trajectory for the credits that need all of it."""
    scores = drawn(3, samples=5)
    scores[4, 2] = math.nan
    values, present = credit(round_scores(scores)), credit(round_scores(scores[:4]))
    assert bool(values.isfinite().all()) and not values[4, 1:3].any()
    torch.testing.assert_close(values[:4, 1:3], present[:, 1:3])
    if not isinstance(credit, RewardGain):
        assert not values[4].any()
        torch.testing.assert_close(values[:4], present)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ValueAnchored(discount=1.5), r"discount must be in \[0, 1\], not 1.5"),
        (lambda: ValueAnchored(anchor=-0.1), "anchor and anchored_steps must be 0 or more"),
        (lambda: ValueAnchored(reduction="mean"), "reduction must be"),  # type: ignore[arg-type]
        (lambda: TurningPoint(bonus=0.0), "bonus must be a positive number, not 0.0"),
        (lambda: turning_gains(torch.zeros(3, 1)), r"scores must be \(B, S \+ 1\)"),
        (lambda: ValueAnchored()(round_scores(drawn(0) - 0.5)), "use rewards of 0 or more with positive weights"),
        (lambda: ValueAnchored()(RoundScores(torch.ones(2, 1), (1.0,), torch.zeros(2).long())), "recipe a completion"),
    ],
)
def test_inputs_are_checked(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
