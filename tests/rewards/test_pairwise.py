"""Comparisons of two samples, win rates within groups, and preferences over reference images."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from genalign.algorithms.advantages import group_advantages
from genalign.scoring.judge_orders import both_orders
from genalign.scoring.score import NamedReward
from genalign.types import PairwiseReward, Prompt, Reward
from rewards.backbones.reference_images import ImageTensor, ReferencePool, ReferencesByPrompt
from rewards.combine import WeightedSum
from rewards.consistency import GroupConsistencyReward
from rewards.pairwise import (
    BothOrders,
    BradleyTerry,
    ReferencePreference,
    WinRateReward,
    compared_pairs,
    hard_wins,
)
from tests.rewards.gray_images import grays, named, plain

NAN = math.nan
SHOWN_FIRST = [[NAN, 0.9, 0.7, 0.6], [0.2, NAN, 0.6, 0.3], [0.4, 0.5, NAN, 0.55], [0.3, 0.8, 0.5, NAN]]
"""P(row is better than column), the row shown first, of four samples."""


def table_judge(table: Sequence[Sequence[float]]) -> Callable[[Tensor, Tensor, Sequence[Prompt]], Tensor]:
    """A judge in one order, of gray images whose level is a tenth of their row in ``table``."""

    def judge(left: Tensor, right: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        rows = [(level(side, prompts) * 10).round().long().tolist() for side in (left, right)]
        return torch.tensor([table[i][j] for i, j in zip(*rows, strict=True)])

    return judge


def level(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return samples.flatten(1).mean(1)


def test_a_preference_by_scores_is_bradley_and_terrys() -> None:
    preference: PairwiseReward = BradleyTerry(level, scale=10)
    preferred = preference(grays(0.5, 0.1), grays(0.3, 0.1), named(2))
    assert preferred.tolist() == pytest.approx([math.exp(5) / (math.exp(5) + math.exp(3)), 0.5], abs=1e-6)
    backwards = preference(grays(0.3, 0.1), grays(0.5, 0.1), named(2))
    torch.testing.assert_close(preferred + backwards, torch.ones(2))


def test_win_rates_are_of_groups_and_not_of_texts() -> None:
    """By hand, for a comparison without doubt; all three groups have one text."""
    first, second, alone = (Prompt("a gray image") for _ in range(3))
    counts: list[int] = []

    def brighter(left: Tensor, right: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        counts.append(len(prompts))
        return (level(left, prompts) > level(right, prompts)).float()

    reward = WinRateReward(brighter)
    assert isinstance(reward, Reward)
    samples, prompts = grays(0.1, 0.9, 0.2, 0.3, 0.8, 0.5), [first, second, first, first, second, alone]
    scores = reward(samples, prompts)
    assert scores[:5].tolist() == [0, 1, 0.5, 1, 0] and bool(scores[5].isnan())
    assert counts == [3 + 1]


def test_the_mean_win_rate_of_a_group_is_a_half() -> None:
    prompt = Prompt("a")
    for opponents in (None, 2, 4):
        reward = WinRateReward(BradleyTerry(level, 3.0), opponents=opponents)
        scores = reward(torch.rand(8, 3, 4, 4), [prompt] * 8)
        assert float(scores.mean()) == pytest.approx(0.5, abs=1e-6)


def test_a_comparison_without_an_answer_is_left_out() -> None:
    prompt = Prompt("a")

    def unsure(left: Tensor, right: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return torch.tensor([1.0, torch.nan, 0.25])  # of (0, 1), (0, 2), (1, 2)

    scores = WinRateReward(unsure)(grays(0.1, 0.2, 0.3), [prompt] * 3)
    assert scores.tolist() == [1.0, 0.0, 1.0]


def test_both_orders_of_a_table() -> None:
    pairs = list(itertools.combinations(range(4), 2))
    first = torch.tensor([SHOWN_FIRST[i][j] for i, j in pairs], dtype=torch.float64)
    second = torch.tensor([SHOWN_FIRST[j][i] for i, j in pairs], dtype=torch.float64)
    preferred, consistency = both_orders(first, second)
    assert preferred.tolist() == pytest.approx([0.85, 0.65, 0.65, 0.5, 0.25, 0.5], abs=1e-6)
    assert (consistency.pairs, consistency.consistent) == (6, 4)
    assert consistency.share == pytest.approx(0.6666666667, abs=1e-8)
    assert consistency.bias == pytest.approx(0.0291666667, abs=1e-8)
    other, backwards = both_orders(second, first)
    assert (other + preferred).tolist() == pytest.approx([1.0] * 6) and backwards == consistency


def test_hard_win_rates_of_a_judge_in_both_orders() -> None:
    prompts = [Prompt("a")] * 4
    scores = WinRateReward(BothOrders(table_judge(SHOWN_FIRST)), margin=0.05)(grays(0.0, 0.1, 0.2, 0.3), prompts)
    assert scores.tolist() == pytest.approx([1, 0.1666666667, 0.3333333333, 0.5], abs=1e-6)
    advantages = group_advantages(scores, torch.zeros(4, dtype=torch.long))
    assert advantages.tolist() == pytest.approx([1.6030533306, -1.0687022204, -0.5343511102, 0.0], abs=1e-6)
    swapped = WinRateReward(lambda left, right, texts: 1 - BothOrders(table_judge(SHOWN_FIRST))(right, left, texts))
    assert swapped(grays(0.0, 0.1, 0.2, 0.3), prompts).tolist() == scores.tolist()


@pytest.mark.parametrize("size", [2, 4, 8, 16])
def test_the_spread_of_win_rates_does_not_depend_on_the_gaps(size: int) -> None:
    prompts, generator = [Prompt("a")] * size, torch.Generator().manual_seed(size)
    samples = grays(*(torch.randperm(size, generator=generator) / size).tolist())
    rates = [WinRateReward(BradleyTerry(level, scale), margin=0.0)(samples, prompts) for scale in (3.0, 300.0)]
    expected = math.sqrt((size + 1) / (12 * (size - 1)))
    assert rates[0].tolist() == rates[1].tolist()
    assert float(rates[0].std(correction=0)) == pytest.approx(expected, abs=1e-6)


def test_gaps_inside_the_margin_teach_nothing() -> None:
    """The means of the preferences themselves would be credited in full."""
    samples, prompts = grays(0.1, 0.101, 0.102, 0.103), [Prompt("a")] * 4
    assert WinRateReward(BradleyTerry(level))(samples, prompts).tolist() == [0.5] * 4
    assert hard_wins(torch.tensor([0.549, 0.451, 0.551, NAN]), 0.05).tolist()[:3] == [0.5, 0.5, 1.0]


def test_a_judge_that_always_takes_the_first_place_makes_ties(caplog: pytest.LogCaptureFixture) -> None:
    judge = BothOrders(lambda left, right, prompts: torch.ones(len(left)), name="first")
    scores = WinRateReward(judge)(grays(0.1, 0.5, 0.9), [Prompt("a")] * 3)
    assert scores.tolist() == [0.5] * 3
    assert "first prefers the same sample in both orders in 0 of 3 pairs" in caplog.text
    assert "position bias +0.500" in caplog.text


def test_consistency_is_logged_without_pairs_that_have_no_answer(caplog: pytest.LogCaptureFixture) -> None:
    table = [[NAN, 0.9, 0.8], [0.2, NAN, NAN], [0.1, 0.4, NAN]]
    caplog.set_level(logging.INFO)
    preferred = BothOrders(table_judge(table))(grays(0.0, 0.0, 0.1), grays(0.1, 0.2, 0.2), named(3))
    assert plain(preferred) == [0.85, 0.85, -1]
    assert "in 2 of 2 pairs" in caplog.text and caplog.records[-1].levelno == logging.INFO


def test_what_would_split_groups_is_refused() -> None:
    wins = WinRateReward(BradleyTerry(level))
    for reward in (wins, GroupConsistencyReward(BradleyTerry(level)), WeightedSum([level, wins], [1.0, 1.0])):
        NamedReward("wins", reward)
        message = "reward 'wins' compares the samples of a prompt with each other, .*: leave score_batch out"
        with pytest.raises(ValueError, match=message):
            NamedReward("wins", reward, score_batch=4)
    NamedReward("level", BothOrders(BradleyTerry(level)), score_batch=4)


def test_few_opponents_are_those_near_on_a_circle() -> None:
    pairs = set(itertools.combinations(range(6), 2))
    assert set(compared_pairs(6)) == set(compared_pairs(6, 6)) == pairs
    assert set(compared_pairs(6, 4)) == pairs - {(0, 3), (1, 4), (2, 5)}
    for size, opponents in [(7, 2), (8, 4), (9, 6)]:
        met = [row for pair in compared_pairs(size, opponents) for row in pair]
        assert [met.count(row) for row in range(size)] == [opponents] * size


def test_groups_without_a_comparison_are_named(caplog: pytest.LogCaptureFixture) -> None:
    reward, prompt = WinRateReward(BradleyTerry(level)), Prompt("a")
    with pytest.raises(ValueError, match="each of these 2 prompts has one, such as 'gray 0': raise group_size"):
        reward(grays(0.1, 0.2), named(2))
    samples = grays(0.1, 0.2, 0.3).clone()
    samples[1:] = NAN  # one valid sample is left
    assert reward(samples, [prompt] * 3).isnan().all()
    assert "3 of 3 samples, such as one of 'a', were compared with no other sample of their prompt" in caplog.text
    assert "3 of 3 comparisons have no answer" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"margin": 0.5}, r"in \[0, 0\.5\), not 0\.5"), ({"opponents": 3}, "an even number"), ({"opponents": 0}, "even")],
)
def test_impossible_settings_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WinRateReward(BradleyTerry(level), **settings)


def test_preferences_must_be_probabilities() -> None:
    reward = WinRateReward(lambda left, right, prompts: level(left, prompts) - level(right, prompts))
    with pytest.raises(ValueError, match=r"must return probabilities .* in \[0, 1\]"):
        reward(grays(0.1, 0.5), [Prompt("a")] * 2)
    with pytest.raises(ValueError, match="both sides must be samples"):
        BothOrders(BradleyTerry(level))(grays(0.1), grays(0.1, 0.2), named(1))


def brightness(left: Tensor, right: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return 0.5 + (level(left, prompts) - level(right, prompts)) / 2


def test_samples_are_compared_with_the_references_of_their_prompt() -> None:
    one, two = named(2)
    references = ReferencesByPrompt(ImageTensor(grays(0.5, 0.1, 0.9)), [one.text, two.text, two.text])
    loaded: list[Sequence[int]] = []
    load = references.images.load
    references.images.load = lambda rows: loaded.append(rows) or load(rows)
    reward = ReferencePreference(brightness, references)
    assert isinstance(reward, Reward)
    assert plain(reward(grays(0.7, 0.5, 0.5, 0.5), [one, one, two, one])) == [0.6, 0.5, 0.5, 0.5]
    assert loaded == [[0, 1, 2]]


def test_the_reference_in_both_orders() -> None:
    """The judge says 0.8 for the sample that is shown first, and 0.3 for the reference that is."""
    table, references = [[NAN, 0.8], [0.3, NAN]], ReferencePool(ImageTensor(grays(0.1)))
    reward = ReferencePreference(BothOrders(table_judge(table)), references)
    assert plain(reward(grays(0.0), named(1))) == [0.75]
    biased = BothOrders(lambda left, right, prompts: torch.full((len(left),), 0.9))
    assert plain(ReferencePreference(biased, references)(grays(0.1), named(1))) == [0.5]


def test_a_reference_without_an_answer_is_left_out() -> None:
    table = [[NAN, NAN, 0.2, NAN], [NAN] * 4, [0.9, NAN, NAN, NAN], [NAN] * 4]
    reward = ReferencePreference(BothOrders(table_judge(table)), ReferencePool(ImageTensor(grays(0.1, 0.2))))
    assert plain(reward(grays(0.0, 0.3), named(2))) == [0.15, -1]


def test_missing_and_other_references_are_refused() -> None:
    references = ReferencesByPrompt(ImageTensor(grays(0.5)), ["gray 0"])
    reward = ReferencePreference(brightness, references)
    with pytest.raises(ValueError, match="there is no reference for the prompt 'gray 1'"):
        reward(grays(0.1, 0.2), named(2))
    reward.require_references(named(1)[0])
    with pytest.raises(ValueError, match="there is no reference for the prompt 'gray 1'"):
        reward.require_references(named(2)[1])
    with pytest.raises(ValueError, match="give size="):
        reward(torch.rand(1, 3, 8, 8), named(1))
    with pytest.raises(ValueError, match="one prompt per image"):
        reward(grays(0.1), named(2))
