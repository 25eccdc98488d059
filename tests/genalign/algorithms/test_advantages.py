import itertools
import math
from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor

from genalign.algorithms.advantages import (
    UnsuitableScoresError,
    best_of_n,
    beta_normalized,
    correlation_weighted,
    difficulty_weights,
    gaussian_ranks,
    gdpo,
    group_advantages,
    leave_one_out,
    log_tamed,
    ngrpo,
    stepwise_advantages,
    task_normalized,
    zero_std_share,
)
from genalign.algorithms.credit import BestOfNCredit, BetaNormalized, LeaveOneOut, TaskNormalized
from genalign.algorithms.interfaces import RoundScores
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


TWO = torch.arange(8) // 4
ONE, RISING = one_group(4), columns(FIRST, [2.0, 4.0, 6.0, 12.0], [3.0, 1.0, 2.0, 0.0])
WORKED = {
    "gdpo": (gdpo(columns(FIRST, SECOND), ONE, [1, 1], 1e-6), [-0.83890298, -0.56654175, -0.29418052, 1.69962525]),
    "ngrpo, none good": (ngrpo(torch.zeros(4), ONE), [-0.4472126] * 4),
    "ngrpo, one good": (ngrpo(torch.eye(4)[0], ONE), [1.09544312, -0.73029541, -0.73029541, -0.73029541]),
    "ngrpo, all good": (ngrpo(torch.ones(4), ONE), [0.0] * 4),
    "ngrpo, eight, none good": (ngrpo(torch.zeros(8), one_group(8)), [-0.3333323333] * 8),
    "beta, partial credit": (
        beta_normalized(torch.tensor([0.2, 0.4, 0.9, 0.5, 1.0, 0.75, 0.5, 0.25]), TWO),
        [-0.1182766414, -0.0394255471, 0.1577021885, 0.0, 0.1483617504, 0.0494539168, -0.0494539168, -0.1483617504],
    ),
    "beta, two rates": (
        beta_normalized(torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0]), TWO),
        [*[-0.2388688105] * 3, 0.7166064314, *[0.2388688105] * 3, -0.7166064314],
    ),
    "beta, another range": (
        beta_normalized(torch.tensor([-6.0, -2.0, 8.0, 0.0, 10.0, 5.0, 0.0, -5.0]), TWO, -10.0, 10.0),
        [-0.1182766414, -0.0394255471, 0.1577021885, 0.0, 0.1483617504, 0.0494539168, -0.0494539168, -0.1483617504],
    ),
    "best of 2": (best_of_n(torch.tensor(FIRST), ONE, 2), [0.0, 1 / 3, 1.0, 4.0]),
    "best of 3": (best_of_n(torch.tensor(FIRST), ONE, 3), [0.0, 0.0, 1 / 3, 10 / 3]),
    "best of 4": (best_of_n(torch.tensor(FIRST), ONE, 4), [0.0, 0.0, 0.0, 3.0]),
    "best of 5": (best_of_n(torch.tensor(FIRST), ONE, 5), [0.0] * 4),
    "best of 4 with ties": (
        best_of_n(torch.tensor([0.0, 0.0, 0.5, 1.0, 2.0, 2.0, 0.0, 0.5]), one_group(8), 4),
        [0.0, 0.0, 0.0142857143, 0.1571428571, 0.7285714286, 0.7285714286, 0.0, 0.0142857143],
    ),
    "Gaussian ranks": (gaussian_ranks(torch.tensor([2.0, 1.0]), one_group(2)), [0.67448975, -0.67448975]),
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


def test_beta_normalization_is_reinforce_or_grpo_for_special_densities() -> None:
    scores = torch.tensor([0.2, 0.4, 0.9, 0.1])
    torch.testing.assert_close(beta_normalized(scores, one_group(4)), scores - scores.mean())  # alpha = beta = 1
    for offset in (0.0, 1e-9):  # the means of two groups that differ by rounding only
        again = torch.cat([scores, scores.flip(0) + offset])
        torch.testing.assert_close(beta_normalized(again, TWO)[:4], scores - scores.mean())
    means = torch.tensor([0.5 - 1 / math.sqrt(32), 0.5 + 1 / math.sqrt(32)], dtype=torch.float64)  # variance 1/16
    spread = torch.tensor([-0.1, 0.1], dtype=torch.float64)
    binary_std = (means * (1 - means)).sqrt()  # GRPO's, of scores of 0 and 1
    advantages = beta_normalized((means[:, None] + spread).flatten(), torch.arange(4) // 2)  # alpha = beta = 3/2
    expected = (math.pi / 8 * spread / binary_std[:, None]).flatten().float()
    torch.testing.assert_close(advantages, expected)


def test_best_of_n_credit_is_the_mean_over_all_subsets() -> None:
    scores = torch.rand(7, generator=torch.Generator().manual_seed(0), dtype=torch.float64).mul(8).round() / 8
    for n in range(2, 8):
        for i in range(7):
            others = itertools.combinations([*scores[:i].tolist(), *scores[i + 1 :].tolist()], n - 1)
            gains = [max(0.0, float(scores[i]) - max(subset)) for subset in others]
            credit = best_of_n(scores, one_group(7), n)
            assert float(credit[i]) == pytest.approx(sum(gains) / len(gains), abs=1e-6)


def test_best_of_n_credit_is_the_gradient_of_the_best_of_n() -> None:
    """For scores 0 and 1 with P(1) = p, E[best of n] = 1 - (1 - p)^n, of which all outcomes of a group are summed."""
    p, n, size = 0.3, 3, 5
    slope = 0.0
    for outcome in itertools.product([0.0, 1.0], repeat=size):
        scores = torch.tensor(outcome, dtype=torch.float64)
        probability = math.prod(p if score else 1 - p for score in outcome)
        score_function = scores / p - (1 - scores) / (1 - p)
        slope += probability * n * float((best_of_n(scores, one_group(size), n) * score_function).mean())
    assert slope == pytest.approx(n * (1 - p) ** (n - 1), abs=1e-6)


def test_ranks_do_not_depend_on_the_scale_or_the_shape_of_scores() -> None:
    scores = torch.randn(12, generator=torch.Generator().manual_seed(0))
    group = torch.arange(12) % 2
    ranks = gaussian_ranks(scores, group)
    assert torch.equal(gaussian_ranks(torch.exp(3 * scores), group), ranks)
    assert float(ranks[group == 0].sum()) == pytest.approx(0, abs=1e-6)
    assert torch.equal(gaussian_ranks(-scores, group), -ranks)


def test_a_task_of_one_group_is_normalized_by_the_group() -> None:
    scores, group = torch.randn(12, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3
    expected = group_advantages(scores, group, ddof=1)
    torch.testing.assert_close(task_normalized(scores, group, group.add(5)), expected)


def test_hard_tasks_and_scales_of_tasks() -> None:
    scores = torch.tensor([0.0, 0.0, 0.0, 10.0, 1.0, 1.0, 1.0, 0.0])
    positive, negative = difficulty_weights(scores, TWO, TWO)
    assert positive.tolist() == pytest.approx([math.exp(0.25)] * 4 + [math.exp(-0.25)] * 4)
    torch.testing.assert_close(positive * negative, torch.ones(8))
    assert torch.equal(difficulty_weights(scores, TWO, TWO, strength=0.0)[0], torch.ones(8))
    # Scores of 0.6 are no successes where the level is half the mean of the group, 0.6, and half that of the task, 0.8
    partial = torch.tensor([0.6, 0.6, 0.6, 0.6, 1.0, 1.0, 1.0, 1.0])
    rates = [difficulty_weights(partial, TWO, one_group(8), group_share=share)[0][0] for share in (0.5, 1.0)]
    assert rates == pytest.approx([math.exp(0.5)] * 2)
    assert float(difficulty_weights(partial, TWO, one_group(8), group_share=0.5)[0][4]) == pytest.approx(math.exp(-0.5))


def test_a_bounded_reward_fades_without_the_standard_deviation() -> None:
    near_the_bound = torch.tensor([0.9992475374, 0.9997229827, 0.9998980637, 0.9999624960])
    advantages = leave_one_out(near_the_bound, ONE)
    expected = [-0.0006136434, 0.0000202837, 0.0002537250, 0.0003396348]
    assert advantages.tolist() == pytest.approx(expected, abs=1e-6)
    assert float(group_advantages(near_the_bound, ONE).abs().max()) > 1
    scores = RoundScores(near_the_bound[:, None], (1.0,), ONE)
    assert LeaveOneOut(1e6)(scores)[0] == -5.0  # clipped


def test_a_missing_reward_leaves_out_its_own_advantages_only() -> None:
    scores = RoundScores(columns([0.0, 1.0, 0.0, 1.0], [0.0, 0.0, 1.0, math.nan]), (1.0, 2.0), ONE)
    expected = beta_normalized(scores.scores[:, 0], ONE)
    assert float(BetaNormalized()(scores)[3]) == float(expected[3]) == 0.5
    assert BetaNormalized()(scores)[2] == expected[2] + 2 * beta_normalized(scores.scores[:, 1], ONE)[2]


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


def test_variants_give_exactly_zero_to_a_zero_variance_group() -> None:
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
        (lambda: ngrpo(FOUR, ONE, best=5.0), "score 6 is above best = 5"),
        (lambda: beta_normalized(FOUR, ONE), r"scores from 1 to 6 are outside \[0, 1\]: set low"),
        (lambda: beta_normalized(FOUR, ONE, 2.0, 2.0), "low must be less than high"),
        (lambda: best_of_n(FOUR, ONE, 1), "n must be 2 or more"),
        (lambda: BestOfNCredit(5)(RoundScores(PAIRS, (1.0, 1.0), ONE)), "groups of 5 or more, not of 4"),
        (lambda: TaskNormalized("mean")(RoundScores(PAIRS, (1.0, 1.0), ONE)), "center must be"),
        (lambda: log_tamed(FOUR), r"scores must be \(B, K\)"),
        (lambda: correlation_weighted(FOUR, ONE), r"scores must be \(B, K\)"),
        (lambda: correlation_weighted(PAIRS, ONE[:3]), "scores and group"),
        (lambda: stepwise_advantages(FOUR, ONE), r"gains must be \(B, S\)"),
    ],
)
def test_inputs_are_checked(call: Callable[[], object], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_rounding_errors_of_a_sum_are_within_the_range() -> None:
    above = torch.tensor([0.0, 1.0000001])
    assert ngrpo(above, one_group(2)).isfinite().all() and beta_normalized(above, one_group(2)).isfinite().all()
    with pytest.raises(UnsuitableScoresError):
        ngrpo(torch.tensor([0.0, 1.0001]), one_group(2))
