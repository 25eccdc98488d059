import math
from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor

from genalign.algorithms.advantages import (
    correlation_weighted,
    gdpo,
    group_advantages,
    leave_one_out,
    log_tamed,
    ngrpo,
    stepwise_advantages,
    zero_std_share,
)
from genalign.scoring.score import combine

FIRST, SECOND = [1.0, 2.0, 3.0, 6.0], [0.1, 0.1, 0.1, 0.3]
GRPO = [-1.06898783, -0.53449391, 0.0, 1.60348174]


STD: tuple[Literal["group", "global"], ...] = ("group", "global")


def one_group(size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.long)


def test_worked_numbers() -> None:
    plain = group_advantages(torch.tensor(FIRST), one_group(4))
    assert plain.tolist() == pytest.approx(GRPO, abs=1e-6)
    sample = group_advantages(torch.tensor(FIRST), one_group(4), epsilon=1e-8, ddof=1)
    assert sample.tolist() == pytest.approx([-0.92582010, -0.46291005, 0.0, 1.38873014], abs=1e-6)
    scores, group = torch.tensor(FIRST + SECOND), torch.tensor([0] * 4 + [1] * 4)
    expected = [-1.02804136, -0.51402068, 0.0, 1.54206205, -0.02570103, -0.02570103, -0.02570103, 0.0771031]
    assert group_advantages(scores, group, std="global").tolist() == pytest.approx(expected, abs=1e-6)


def test_groups_of_any_order_size_and_key() -> None:
    generator = torch.Generator().manual_seed(0)
    group = torch.tensor([7] * 5 + [2] * 3 + [40] * 9)
    scores = torch.randn(17, generator=generator)
    parts = scores[:5], scores[5:8], scores[8:]
    by_hand = torch.cat([(part - part.mean()) / (part.std(correction=0) + 1e-4) for part in parts])
    order = torch.randperm(17, generator=generator)
    torch.testing.assert_close(group_advantages(scores[order], group[order]), by_hand[order], rtol=1e-5, atol=1e-5)


def test_a_missing_score_gets_zero_and_counts_for_nothing() -> None:
    scores = torch.tensor([math.nan, *FIRST, math.nan])
    for std in STD:
        advantages = group_advantages(scores, one_group(6), std=std)
        assert advantages.tolist() == pytest.approx([0.0, *GRPO, 0.0], abs=1e-6)
        assert torch.equal(group_advantages(torch.full((3,), math.nan), one_group(3), std=std), torch.zeros(3))


@pytest.mark.parametrize("std", STD)
@pytest.mark.parametrize("ddof", [0, 1])
def test_a_group_that_teaches_nothing_gets_exactly_zero(std: Literal["group", "global"], ddof: int) -> None:
    scores = torch.tensor([0.1] * 3 + [5.0, math.nan] + [math.nan] * 2 + [0.3, 0.30000001] + FIRST)
    group = torch.tensor([0] * 3 + [1] * 2 + [2] * 2 + [3] * 2 + [4] * 4)
    advantages = group_advantages(scores, group, ddof=ddof, std=std)
    assert advantages.shape == scores.shape
    assert torch.equal(advantages[:9], torch.zeros(9))
    assert bool((advantages[[9, 12]] != 0).all())
    assert zero_std_share(scores, group) == pytest.approx(0.8)


def test_small_differences_of_large_scores_still_count() -> None:
    scores = torch.tensor([1000.0, 1001.0, 1002.0])
    assert zero_std_share(scores, one_group(3)) == 0.0
    torch.testing.assert_close(group_advantages(scores, one_group(3)), group_advantages(scores - 1000, one_group(3)))


def test_advantages_are_clipped_symmetrically_and_only_if_asked() -> None:
    scores = torch.zeros(101)
    scores[0], scores[1] = 1.0, -1.0
    advantages = group_advantages(scores, one_group(101))
    assert (advantages[0].item(), advantages[1].item()) == (5.0, -5.0)
    unclipped = group_advantages(scores, one_group(101), clip=None)
    assert unclipped[0].item() == pytest.approx(1 / (math.sqrt(2 / 101) + 1e-4), rel=1e-6)


def test_advantages_do_not_depend_on_the_scale_of_scores() -> None:
    scores = torch.tensor(FIRST)
    scaled = group_advantages(100 * scores + 7, one_group(4), epsilon=0.0)
    torch.testing.assert_close(scaled, group_advantages(scores, one_group(4), epsilon=0.0))
    assert scaled.dtype == torch.float32


def test_combine() -> None:
    scores = torch.tensor([[1.0, 10.0, math.nan], [2.0, math.nan, 0.0], [math.nan, 30.0, 0.0]])
    combined = combine(scores, [2.0, 0.0, 1.0])
    assert combined[1].item() == 4.0
    assert combined.isnan().tolist() == [True, False, True]
    assert combine(scores, [0.0, 0.1, 0.0])[[0, 2]].tolist() == pytest.approx([1.0, 3.0])
    assert combine(scores, (0.0, 0.1, 0.0)).dtype == torch.float32


def columns(*rewards: list[float]) -> Tensor:
    return torch.tensor(rewards).T


ONE, RISING = one_group(4), columns(FIRST, [2.0, 4.0, 6.0, 12.0], [3.0, 1.0, 2.0, 0.0])
WORKED = {
    "gdpo": (gdpo(columns(FIRST, SECOND), ONE, [1, 1], 1e-6), [-0.83890298, -0.56654175, -0.29418052, 1.69962525]),
    "ngrpo, none good": (ngrpo(torch.zeros(4), ONE), [-0.4472126] * 4),
    "ngrpo, one good": (ngrpo(torch.eye(4)[0], ONE), [1.09544312, -0.73029541, -0.73029541, -0.73029541]),
    "ngrpo, all good": (ngrpo(torch.ones(4), ONE), [0.0] * 4),
    "correlation": (correlation_weighted(RISING, ONE), [0.75903594, -0.46831406, 0.33913281, -0.62985469]),
    "correlation of one": (correlation_weighted(RISING[:, :1], ONE), [-1.06904497, -0.53452248, 0.0, 1.60356745]),
    "leave one out": (
        leave_one_out(torch.tensor([1.0, 2.0, 6.0, math.nan, 5.0]), torch.tensor([0, 0, 0, 0, 1])),
        [1 - 4.0, 2 - 3.5, 6 - 1.5, 0.0, 0.0],
    ),
}


@pytest.mark.parametrize(("advantages", "expected"), WORKED.values(), ids=WORKED)
def test_worked_numbers_of_the_variants(advantages: Tensor, expected: list[float]) -> None:
    assert advantages.tolist() == pytest.approx(expected, abs=1e-6)


def test_gdpo_leaves_out_what_is_missing() -> None:
    scores = columns([*FIRST, math.nan, 9.0], [*SECOND, math.nan, math.nan])
    advantages = gdpo(scores, one_group(6), [1.0, 1.0])
    assert advantages[4] == 0.0 and bool(advantages.isfinite().all()) and advantages[5] > 0


def test_worked_numbers_of_log_taming() -> None:
    tamed = log_tamed(columns(FIRST, SECOND))
    assert tamed[:, 0].tolist() == pytest.approx([math.log(1 + value) for value in FIRST])
    assert tamed[:, 1].tolist() == pytest.approx(SECOND)
    z = group_advantages(tamed.sum(1), one_group(4), epsilon=1e-6)
    assert z.tolist() == pytest.approx([-1.20112911, -0.43759432, 0.10414224, 1.53458118], abs=1e-6)
    with pytest.raises(ValueError, match="must be above -1: shift or rescale it"):
        log_tamed(columns([-1.0, 5.0, 1.0], [1.0, 1.0, 1.0]))


def test_a_missing_score_is_not_a_score_of_minus_one() -> None:
    scores = columns([math.nan, 0.0, 1.0], [-1.0, 0.0, 1.0])
    advantages = correlation_weighted(scores, one_group(3))
    assert bool(advantages.isfinite().all()) and advantages[0] == pytest.approx(-math.sqrt(1.5), abs=1e-6)


def test_each_step_is_normalized_within_its_group() -> None:
    gains = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    group = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    advantages = stepwise_advantages(gains, group)
    for step in range(3):
        assert torch.equal(advantages[:, step], group_advantages(gains[:, step], group))


def test_rounding_errors_of_a_step_do_not_become_advantages() -> None:
    gains = torch.tensor([[1.0, 1e-4], [-1.0, 0.0], [0.5, -1e-4], [-0.5, 0.0]])
    floored = stepwise_advantages(gains, one_group(4), floor=0.01)
    assert 0 < float(floored[:, 1].abs().max()) < 2e-2 and float(floored[:, 0].abs().max()) > 1
    assert float(stepwise_advantages(gains, one_group(4), floor=0.0)[:, 1].abs().max()) > 0.5


def test_a_step_below_the_resolution_of_the_scores_gets_exactly_zero() -> None:
    before = torch.rand(6, 1, generator=torch.Generator().manual_seed(0)) / 2 + 0.3
    middle = before.roll(1, 0)
    rounding = torch.tensor([[1.0], [0.0], [-1.0], [1.0], [-1.0], [0.0]]) * 2.0**-23
    gains = torch.cat([before, middle, middle + rounding], dim=1).diff(dim=1)
    for floor in (0.0, 0.01):
        advantages = stepwise_advantages(gains, one_group(6), floor)
        assert torch.equal(advantages[:, 1], torch.zeros(6)) and bool((advantages[:, 0] != 0).all())


def test_a_missing_gain_is_missing_at_its_step_only() -> None:
    gains = torch.tensor([[1.0, 0.5], [2.0, math.nan], [3.0, 0.2], [6.0, 0.1]])
    advantages = stepwise_advantages(gains, one_group(4))
    assert advantages[:, 0].tolist() == pytest.approx(GRPO, abs=1e-6)
    assert advantages[1, 1] == 0.0 and bool((advantages[[0, 2, 3], 1] != 0).all())
    nothing = stepwise_advantages(torch.full((3, 2), math.nan), one_group(3))
    assert torch.equal(nothing, torch.zeros(3, 2))


def test_variants_give_exactly_zero_to_a_group_without_spread() -> None:
    scores = columns([0.1] * 3 + [1.0, 2.0, 6.0], [0.3] * 3 + [2.0, 4.0, 1.0])
    group = torch.tensor([0] * 3 + [1] * 3)
    for advantages in (
        gdpo(scores, group, [1.0, 0.5]),
        correlation_weighted(scores, group),
        leave_one_out(scores[:, 0], group),
    ):
        assert torch.equal(advantages[:3], torch.zeros(3)) and bool((advantages[3:] != 0).any())


def test_variants_do_not_depend_on_the_order_of_samples() -> None:
    generator = torch.Generator().manual_seed(1)
    scores, order = torch.rand(12, 3, generator=generator), torch.randperm(12, generator=generator)
    scores[3, 1] = math.nan
    group = torch.tensor([5] * 4 + [0] * 8)
    shuffled, keys = scores[order], group[order]
    torch.testing.assert_close(gdpo(shuffled, keys, [1, 2, 3]), gdpo(scores, group, [1, 2, 3])[order])
    torch.testing.assert_close(correlation_weighted(shuffled, keys), correlation_weighted(scores, group)[order])
    torch.testing.assert_close(ngrpo(shuffled[:, 1], keys), ngrpo(scores[:, 1], group)[order])
    torch.testing.assert_close(leave_one_out(shuffled[:, 1], keys), leave_one_out(scores[:, 1], group)[order])
    assert gdpo(scores, group, [0.0, 1.0, 0.0])[3] == ngrpo(scores[:, 1], group)[3] == 0.0


def test_variants_with_a_z_score_are_clipped() -> None:
    scores = torch.zeros(101)
    scores[0] = 1.0
    assert gdpo(scores[:, None], one_group(101), [1.0]).max() == ngrpo(scores, one_group(101)).max() == 5.0
    assert ngrpo(scores, one_group(101), clip=None).max() > 7


def test_conflicting_rewards_count_more_and_a_dead_one_least() -> None:
    rising = [1.0, 2.0, 3.0, 4.0]
    scores = columns(rising, rising, rising[::-1], [0.7] * 4)
    advantages = correlation_weighted(scores, one_group(4), temperature=0.1)
    assert bool((advantages.diff() < 0).all())  # the one that falls outweighs the two that rise


FOUR, PAIRS = torch.tensor(FIRST), torch.rand(4, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: group_advantages(FOUR, ONE[:2]), "scores and group"),
        (lambda: zero_std_share(FOUR[:, None], ONE), "scores and group"),
        (lambda: group_advantages(FOUR, ONE.float()), "prompt indices"),
        (lambda: group_advantages(torch.tensor([1.0, math.inf]), ONE[:2]), "infinite"),
        (lambda: group_advantages(FOUR, ONE, ddof=2), "ddof"),
        (lambda: group_advantages(FOUR, ONE, std="batch"), "std must be"),
        (lambda: combine(PAIRS, [1.0]), "one weight per column"),
        (lambda: combine(PAIRS, [math.nan, 1.0]), "finite"),
        (lambda: gdpo(PAIRS, ONE, [1.0, 1.0, 1.0]), "one weight per column"),
        (lambda: log_tamed(FOUR), r"scores must be \(B, K\)"),
        (lambda: correlation_weighted(FOUR, ONE), r"scores must be \(B, K\)"),
        (lambda: correlation_weighted(PAIRS, ONE[:3]), "scores and group"),
        (lambda: stepwise_advantages(FOUR, ONE), r"gains must be \(B, S\)"),
    ],
)
def test_inputs_are_checked(call: Callable[[], object], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call()
