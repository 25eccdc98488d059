"""Sizes of a round that fit a prompt set, and learning-rate schedules."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from genalign.algorithms.interfaces import Unit
from genalign.runtime.distributed import ProcessGroup
from genalign.training.settings import FittedSettings, TrainerSettings
from genalign.types import PromptSet


def prompts(count: int) -> PromptSet:
    return PromptSet.of([f"{number} cats" for number in range(count)])


def sizes(settings: FittedSettings) -> tuple[int, int, int]:
    return settings.prompts_per_round, settings.batch_size, settings.updates_per_round


@pytest.mark.parametrize(
    ("count", "expected"),
    [(1, (1, 12, 1)), (2, (2, 12, 2)), (5, (4, 24, 2)), (13, (12, 72, 2)), (16, (16, 96, 2)), (500, (16, 96, 2))],
)
def test_sizes_that_are_not_set_fit_the_prompts(count: int, expected: tuple[int, int, int]) -> None:
    assert sizes(TrainerSettings().fit(prompts(count), "sample")) == expected


def test_sizes_that_are_set_are_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "genalign")
    whole = TrainerSettings(prompts_per_round=24, group_size=8, batch_size=96, updates_per_round=2)
    assert sizes(whole.fit(prompts(24), "group")) == (24, 96, 2) and not caplog.messages
    assert sizes(TrainerSettings(prompts_per_round=5).fit(prompts(5), "group", notice=True)) == (5, 60, 1)
    assert caplog.messages[0].startswith("a round takes 5 of the 5 prompts, in 1 updates of batches of 60 samples")
    with pytest.raises(ValueError, match=r"prompts_per_round 5 does not divide into 2 updates: .* to 4"):
        TrainerSettings(prompts_per_round=5, updates_per_round=2)


UNITS = st.sampled_from(["sample", "group", "batch"])


@given(
    unit=UNITS,
    count=st.integers(1, 300),
    group_size=st.integers(2, 40),
    ranks=st.integers(1, 70),
    updates=st.none() | st.integers(1, 4),
    batch_groups=st.none() | st.integers(1, 5),
)
def test_batches_share_each_update_equally(
    unit: Unit, count: int, group_size: int, ranks: int, updates: int | None, batch_groups: int | None
) -> None:
    batch_size = batch_groups and batch_groups * group_size
    settings = TrainerSettings(group_size=group_size, updates_per_round=updates, batch_size=batch_size)
    try:
        fitted = settings.fit(prompts(count), unit, ProcessGroup(0, ranks))
    except ValueError:
        parts = updates or 1
        units = min(count, 16) // parts * (group_size if unit == "sample" else 1)
        assert units < ranks
        return
    assert fitted.prompts_per_round <= min(count, 16)
    batches = fitted.batch_sizes(unit, ranks)
    assert sum(batches) == fitted.prompts_per_round * group_size and max(batches) <= fitted.batch_size
    each = len(batches) // fitted.updates_per_round
    assert len(batches) % fitted.updates_per_round == 0 and each % ranks == 0
    multiple = 1 if unit == "sample" else group_size
    assert all(size % multiple == 0 for size in batches) and max(batches) - min(batches) <= multiple
    assert all(any(batches[rank::ranks]) for rank in range(ranks))
    assert fitted.fit(prompts(count), unit, ProcessGroup(0, ranks)) == fitted


def test_samples_are_shared_by_any_number_of_processes() -> None:
    settings = TrainerSettings(prompts_per_round=48, group_size=24, batch_size=24, updates_per_round=2)
    fitted = settings.fit(prompts(48), "sample")
    for ranks, expected in ((1, {24}), (2, {24}), (16, {18}), (64, {9}), (5, {23, 24}), (576, {1})):
        batches = fitted.batch_sizes("sample", ranks)
        assert {*batches} == expected and len(batches) % (2 * ranks) == 0
    with pytest.raises(ValueError, match="577 processes cannot share updates of 576 samples: start at most 576"):
        fitted.batch_sizes("sample", 577)
    with pytest.raises(ValueError, match="25 processes cannot share updates of 24 groups"):
        fitted.batch_sizes("group", 25)


def test_groups_and_batches_that_a_loss_ties_together_stay_whole() -> None:
    settings = TrainerSettings(prompts_per_round=4, group_size=6, updates_per_round=1, batch_size=8)
    assert settings.fit(prompts(4), "sample").batch_sizes("sample") == (8, 8, 8)
    with pytest.raises(ValueError, match=r"batch_size 8 must be a multiple of group_size 6, .* try 6"):
        settings.fit(prompts(4), "group")
    with pytest.raises(ValueError, match=r"micro_batch 4 must be a multiple of group_size 6"):
        replace(settings, batch_size=12, micro_batch=4).fit(prompts(4), "group")
    with pytest.raises(ValueError, match=r"couples a whole batch: leave training.micro_batch out"):
        replace(settings, batch_size=12, micro_batch=6).fit(prompts(4), "batch")


def test_a_reward_that_compares_a_group_keeps_batches_whole() -> None:
    settings = TrainerSettings(prompts_per_round=11, group_size=12, updates_per_round=1, batch_size=96)
    assert settings.fit(prompts(11), "sample").batch_sizes("sample") == (66, 66)
    fitted = settings.fit(prompts(11), "sample", group_reward="wins")
    assert fitted.batch_sizes("sample") == fitted.batch_sizes("sample", 2) == (60, 72)
    assert fitted.batch_sizes("sample", 3) == (36, 48, 48)
    assert fitted.fit(prompts(11), "sample") == fitted  # as a run that is counted does
    replace(settings, micro_batch=5).fit(prompts(11), "sample", group_reward="wins")
    with pytest.raises(ValueError, match=r"50 must be a multiple of group_size 12, .* whole for reward 'wins': try 48"):
        replace(settings, batch_size=50).fit(prompts(11), "sample", group_reward="wins")
    with pytest.raises(ValueError, match="12 processes cannot share updates of 11 groups"):
        fitted.batch_sizes("sample", 12)


@given(st.integers() | st.sampled_from([-1, 2**40, 2**63, 2**64 - 1, 2**64 + 1, -(2**63), -(2**63) - 1]))
def test_a_seed_is_one_that_torch_takes_or_refused(seed: int) -> None:
    try:
        TrainerSettings(seed=seed)
    except ValueError as error:
        assert f"training.seed must fit into 64 bits, which {seed} does not" in str(error)
        with pytest.raises((ValueError, RuntimeError), match="Overflow"):
            torch.Generator().manual_seed(seed)
    else:
        torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_rates_without_a_warmup(schedule: Literal["constant", "linear", "cosine"]) -> None:
    settings = TrainerSettings(rounds=35, learning_rate_schedule=schedule)
    factors = {
        "constant": lambda p: 1.0,
        "linear": lambda p: 1 - p,
        "cosine": lambda p: (1 + math.cos(math.pi * p)) / 2,
    }
    for done in range(35):
        assert settings.rate_factor(done, 0) == pytest.approx(factors[schedule](done / 35), rel=1e-12)
    halfway = replace(settings, max_nfe=1000).rate_factor(2, 500)  # half of the NFE that end the run
    assert halfway == pytest.approx(factors[schedule](0.5))


def test_a_warmup_rises_to_the_rate_from_which_the_schedule_falls() -> None:
    settings = TrainerSettings(rounds=20, learning_rate_schedule="linear", warmup_rounds=4)
    rates = [settings.rate_factor(done, 0) for done in range(20)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[5:] == pytest.approx([1 - step / 16 for step in range(1, 16)])
    with pytest.raises(ValueError, match=r"training\.warmup_rounds is 20 of 20 rounds: give a number from 0 to 19"):
        replace(settings, warmup_rounds=20)
