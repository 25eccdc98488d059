"""Credits of steps: worked numbers, invariances, what is missing, and the expected gradient of VGPO's anchor."""

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

CREDITS: dict[str, Credit] = {
    "gain": RewardGain(0.01),
    "turning point": TurningPoint(),
    "turning point, unbalanced": TurningPoint(balanced=False),
    "value": ValueAnchored(),
    "lowest value": ValueAnchored(reduction="min"),
    "anchored value": ValueAnchored(anchor=0.1),
}
COUPLED = ("turning point",)  # by its balance
BY_SPREAD = ("gain", "turning point", "turning point, unbalanced")  # whose floor is a fraction of the round's spread


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
    expected = [
        [-1.2689983418, 1.5264927829, -0.1990113227, 0.6975769821],
        [1.499725313, -1.0639192123, -0.464359753, -0.375618375],
        [0.1153634856, 0.2312867853, -0.9950566136, 1.1268551249],
        [-0.3460904568, -0.6938603558, 1.6584276893, -1.448813732],
    ]
    check(TurningPoint(floor=0.0)(round_scores(scores)), expected, 5e-6)


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
    anchored = [
        [0.1234349214, 0.2190428072, 0.4113915719],
        [1.654672246, 1.2086913326, -0.0690933323],
        [-2.0356348076, -1.8916636721, -0.7426979119],
        [0.7013650463, 0.531109098, 0.9912897584],
    ]
    check(ValueAnchored(anchor=0.1)(round_scores(after(AFTER))), anchored, 2e-6)
    plain = ValueAnchored()(round_scores(after(AFTER)))
    check(plain[:1], [[0.0216270396, 0.1466290141, 0.3744457591]], 2e-6)
    first = ValueAnchored(anchor=0.1, anchored_steps=1)(round_scores(after(AFTER)))
    torch.testing.assert_close(first[:, 1:], plain[:, 1:])
    check(first[:, :1], [row[:1] for row in anchored], 2e-6)


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


@pytest.mark.parametrize("name", CREDITS)
def test_properties_of_every_credit(name: str) -> None:
    credit, scores, group = CREDITS[name], drawn(1), [5, 5, 5, 5, 2, 2, 2, 2]
    result = credit(round_scores(scores, group))
    assert result.shape == (8, 4) and result.dtype == torch.float32 and bool(result.any())
    order = torch.randperm(8, generator=torch.Generator().manual_seed(2))
    permuted = credit(round_scores(scores[order], [group[i] for i in order.tolist()]))
    torch.testing.assert_close(permuted, result[order])
    torch.testing.assert_close(credit(round_scores(scores, [9 - key for key in group])), result)
    if name not in COUPLED:
        alone = credit(round_scores(scores[:4]))
        torch.testing.assert_close(alone, result[:4], rtol=2e-2, atol=1e-2 if name in BY_SPREAD else 1e-6)
    flat = scores.clone()
    flat[:4] = 0.4
    dull = credit(round_scores(flat, group))[:4]
    assert torch.equal(dull, dull[:1].expand(4, -1)) and (name == "anchored value" or not dull.any())
    for factor in (1e6, 1e-6):
        assert bool(credit(round_scores(factor * scores, group)).isfinite().all())


@pytest.mark.parametrize("name", CREDITS)
def test_a_missing_score_gets_exactly_zero_and_leaves_the_others_as_if_it_were_absent(name: str) -> None:
    credit, scores = CREDITS[name], drawn(3, samples=5)
    present = credit(round_scores(scores[:4]))
    scores[4] = math.nan
    joined = credit(round_scores(scores))
    torch.testing.assert_close(joined[:4], present)
    assert not joined[4].any()
    scores[4] = 0.5
    scores[4, 2] = math.nan
    partial = credit(round_scores(scores))
    assert bool(partial.isfinite().all()) and not partial[4, 1].any()
    assert not credit(round_scores(torch.full((4, 3), math.nan))).any()


@pytest.mark.parametrize("name", CREDITS)
def test_groups_of_two_are_finite_and_single_samples_get_zero(name: str) -> None:
    scores = drawn(4, samples=5)
    result = CREDITS[name](round_scores(scores, [0, 0, 1, 1, 2]))
    assert bool(result.isfinite().all()) and bool(result[:2].any())
    assert name == "anchored value" or not result[4].any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ValueAnchored(discount=1.5), r"discount must be in \[0, 1\], not 1.5"),
        (lambda: ValueAnchored(anchor=-0.1), "anchor and anchored_steps must be 0 or more"),
        (lambda: ValueAnchored(reduction="mean"), "reduction must be"),
        (lambda: TurningPoint(bonus=0.0), "bonus must be a positive number, not 0.0"),
        (lambda: turning_gains(torch.zeros(3, 1)), r"scores must be \(B, S \+ 1\)"),
        (lambda: ValueAnchored()(round_scores(drawn(0) - 0.5)), "use rewards of 0 or more with positive weights"),
        (lambda: ValueAnchored()(RoundScores(torch.ones(2, 1), (1.0,), torch.zeros(2).long())), "recipe a completion"),
    ],
)
def test_inputs_are_checked(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
