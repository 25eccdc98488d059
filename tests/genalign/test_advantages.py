import math
from typing import Literal

import pytest
import torch
from torch import Tensor

from genalign.advantages import combine, group_advantages, zero_std_share

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


def test_worked_numbers_of_the_global_std() -> None:
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


def test_no_score_at_all() -> None:
    nothing = torch.full((3,), math.nan)
    for std in STD:
        assert torch.equal(group_advantages(nothing, one_group(3), std=std), torch.zeros(3))
    assert zero_std_share(nothing, one_group(3)) == 1.0


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


def test_inputs_are_checked() -> None:
    scores, group = torch.tensor(FIRST), one_group(4)
    with pytest.raises(ValueError, match="scores and group"):
        group_advantages(scores, group[:2])
    with pytest.raises(ValueError, match="scores and group"):
        zero_std_share(scores[:, None], group)
    with pytest.raises(TypeError, match="prompt indices"):
        group_advantages(scores, group.float())
    with pytest.raises(ValueError, match="infinite"):
        group_advantages(torch.tensor([1.0, math.inf]), one_group(2))
    with pytest.raises(ValueError, match="ddof"):
        group_advantages(scores, group, ddof=2)
    with pytest.raises(ValueError, match="std must be"):
        group_advantages(scores, group, std="batch")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one weight per column"):
        combine(torch.zeros(2, 3), [1.0])
    with pytest.raises(ValueError, match="finite"):
        combine(torch.zeros(2, 1), [math.nan])
