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
    assert sizes(TrainerSettings().fit(prompts(count))) == expected


def test_sizes_that_are_set_are_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "genalign")
    whole = TrainerSettings(prompts_per_round=24, group_size=8, batch_size=96, updates_per_round=2)
    assert sizes(whole.fit(prompts(24))) == (24, 96, 2) and not caplog.messages
    assert sizes(TrainerSettings(prompts_per_round=5).fit(prompts(5), notice=True)) == (5, 60, 1)
    assert caplog.messages[0].startswith("a round takes 5 of the 5 prompts, in 1 updates of batches of 60 samples")
    with pytest.raises(
        ValueError, match=r"5 x group_size 12 = 60 samples do not divide into 1 updates of batches of 96"
    ):
        TrainerSettings(batch_size=96).fit(prompts(5))
    with pytest.raises(ValueError, match=r"8 x group_size 2 = 16 samples do not divide .* of 4 on 3 processes"):
        TrainerSettings(prompts_per_round=8, group_size=2, batch_size=4).fit(prompts(8), ProcessGroup(0, 3))


@given(
    count=st.integers(1, 300),
    group_size=st.integers(2, 40),
    ranks=st.integers(1, 4),
    updates=st.none() | st.integers(1, 4),
)
def test_fitted_sizes_divide(count: int, group_size: int, ranks: int, updates: int | None) -> None:
    settings = TrainerSettings(group_size=group_size, updates_per_round=updates)
    try:
        fitted = settings.fit(prompts(count), ProcessGroup(0, ranks))
    except ValueError:
        assert count < ranks * (updates or 1)
        return
    assert fitted.prompts_per_round <= min(count, 16) and fitted.batch_size <= max(96, group_size)
    assert fitted.batch_size % group_size == 0
    batches, rest = divmod(fitted.prompts_per_round * group_size, fitted.batch_size * fitted.updates_per_round)
    assert rest == 0 and batches % ranks == 0
    assert fitted.fit(prompts(count), ProcessGroup(0, ranks)) == fitted


@given(st.integers() | st.sampled_from([-1, 2**40, 2**63, 2**64 - 1, 2**64 + 1, -(2**63), -(2**63) - 1]))
def test_a_seed_is_one_that_torch_takes_or_refused(seed: int) -> None:
    try:
        TrainerSettings(seed=seed)
    except ValueError as error:
        assert f"training.seed must fit into 64 bits, not be {seed}" in str(error)
        with pytest.raises((ValueError, RuntimeError), match="Overflow"):
            torch.Generator().manual_seed(seed)
    else:
        torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_rates_without_a_warmup(schedule: Literal["constant", "linear", "cosine"]) -> None:
    settings = TrainerSettings(rounds=35, learning_rate=3e-3, learning_rate_schedule=schedule)
    factors = {
        "constant": lambda p: 1.0,
        "linear": lambda p: 1 - p,
        "cosine": lambda p: (1 + math.cos(math.pi * p)) / 2,
    }
    for done in range(35):
        expected = 3e-3 * factors[schedule](done / 35)
        assert settings.rate(done, 0) == (expected if schedule != "cosine" else pytest.approx(expected, rel=1e-12))
    halfway = replace(settings, max_nfe=1000).rate(2, 500)  # half of the NFE that end the run
    assert halfway == pytest.approx(3e-3 * factors[schedule](0.5))


def test_a_warmup_rises_to_the_rate_from_which_the_schedule_falls() -> None:
    settings = TrainerSettings(rounds=20, learning_rate=1.0, learning_rate_schedule="linear", warmup_rounds=4)
    rates = [settings.rate(done, 0) for done in range(20)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[5:] == pytest.approx([1 - step / 16 for step in range(1, 16)])
    with pytest.raises(ValueError, match=r"training\.warmup_rounds is 20 of 20 rounds: give a number from 0 to 19"):
        replace(settings, warmup_rounds=20)
