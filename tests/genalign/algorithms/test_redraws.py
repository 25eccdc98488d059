"""What is drawn in place of zero-variance groups, on scores worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from genalign.algorithms.advantages import group_advantages, group_spread
from genalign.algorithms.interfaces import RoundScores
from genalign.algorithms.recipe_changes import with_adaptive_group_size, with_dynamic_sampling
from genalign.algorithms.recipes import dragon, flow_grpo
from genalign.algorithms.redraws import AdaptiveGroupSize, DynamicSampling, allocation
from genalign.types import Prompt

NAN = math.nan
PROMPTS = tuple(map(Prompt, "abcd"))
FURTHER = tuple(map(Prompt, "efg"))
ZERO_VARIANCE = [[0.0, 1.0], [1.0, 1.0], [0.0, 0.0], [3.0, 1.0]]  # the groups b and c


def _scores(groups: list[list[float]], group: list[int] | None = None) -> RoundScores:
    scores = torch.tensor(groups).flatten()[:, None]
    places = torch.arange(len(groups)).repeat_interleave(len(groups[0]))
    return RoundScores(scores, (1.0,), places if group is None else torch.tensor(group))


def test_zero_variance_groups_are_those_that_get_no_advantage() -> None:
    scores = torch.tensor([1.0, 2.0, 3.0, 3.0, 1.0, NAN, NAN, NAN, 5.0])
    group = torch.tensor([4, 4, 2, 2, 7, 7, 9, 9, 0])
    keys, std = group_spread(scores, group)
    assert keys.tolist() == [0, 2, 4, 7, 9] and std.tolist() == [0.0, 0.0, 0.5, 0.0, 0.0]
    live = group_advantages(scores, group) != 0
    assert set(group[live].tolist()) == set(keys[std > 0].tolist())


def test_zero_variance_groups_give_way_to_further_prompts_up_to_the_limit() -> None:
    redraw = DynamicSampling()(PROMPTS, _scores(ZERO_VARIANCE), FURTHER, limit=8)
    assert redraw is not None and redraw.prompts == tuple(map(Prompt, "abcdef"))
    assert redraw.members == (None, None, (4, 0), (4, 1), (5, 0), (5, 1), None, None)
    assert redraw.group(_scores(ZERO_VARIANCE).group).tolist() == [0, 0, 4, 4, 5, 5, 3, 3]
    for further, limit in ((FURTHER, 3), (FURTHER[:1], 8)):  # one more group
        fewer = DynamicSampling()(PROMPTS, _scores(ZERO_VARIANCE), further, limit)
        assert fewer is not None and fewer.members == (None, None, (4, 0), (4, 1), None, None, None, None)
    assert DynamicSampling()(PROMPTS, _scores(ZERO_VARIANCE), FURTHER, limit=1) is None
    assert DynamicSampling()(PROMPTS, _scores(ZERO_VARIANCE), (), limit=8) is None
    assert DynamicSampling()(PROMPTS, _scores([[0.0, 1.0]] * 4), FURTHER, limit=8) is None
    group = redraw.group(_scores(ZERO_VARIANCE).group).tolist()
    again = _scores([[0.0, 1.0], [1.0, 1.0], [0.0, 2.0], [3.0, 1.0]], group)
    second = DynamicSampling()(redraw.prompts, again, FURTHER[2:], limit=4)  # the place of e has zero variance again
    assert second is not None and second.prompts[-1] == "g"
    assert second.members == (None, None, (6, 0), (6, 1), None, None, None, None)


def test_zero_variance_groups_give_way_to_samples_of_the_groups_that_vary_most() -> None:
    redraw = AdaptiveGroupSize()(PROMPTS, _scores(ZERO_VARIANCE), (), limit=8)
    assert redraw is not None and redraw.prompts == PROMPTS  # the scores of d vary twice as much as those of a
    assert redraw.members == (None, None, (0, 2), (3, 2), (3, 3), (3, 4), None, None)
    assert redraw.group(_scores(ZERO_VARIANCE).group).tolist() == [0, 0, 0, 3, 3, 3, 3, 3]
    limited = AdaptiveGroupSize()(PROMPTS, _scores(ZERO_VARIANCE), (), limit=1)
    assert limited is not None and limited.members == (None, None, (3, 2), *[None] * 5)
    assert AdaptiveGroupSize()(PROMPTS, _scores([[1.0, 1.0]] * 4), (), limit=8) is None  # none varies
    assert AdaptiveGroupSize()(PROMPTS, _scores([[0.0, 1.0]] * 4), (), limit=8) is None  # all vary
    after = _scores(ZERO_VARIANCE, redraw.group(_scores(ZERO_VARIANCE).group).tolist())
    assert AdaptiveGroupSize()(PROMPTS, after, (), limit=4) is None


def test_samples_are_divided_as_neyman_does() -> None:
    std, counts = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64), torch.tensor([4, 4, 4])
    added = allocation(std, counts, 16)
    assert added.tolist() == [4, 12, 0] and int(added.sum()) == 16  # 8 and 16 of the first two

    def variance(more: list[int]) -> float:
        return float((std**2 / (counts + torch.tensor(more))).sum())

    others = [[a, b, 16 - a - b] for a in range(17) for b in range(17 - a)]
    assert variance(added.tolist()) == pytest.approx(min(map(variance, others)))
    assert allocation(torch.ones(3).double(), counts, 4).tolist() == [2, 1, 1]


def test_impossible_redraws_are_refused() -> None:
    for make in (with_dynamic_sampling, with_adaptive_group_size):
        with pytest.raises(ValueError, match="extra must be a positive, finite multiple"):
            make(flow_grpo(), extra=0.0)
    with pytest.raises(ValueError, match="couples all samples of a group, which unequal groups do not allow"):
        with_adaptive_group_size(dragon())
    assert with_dynamic_sampling(dragon()).redraw == DynamicSampling()
