"""Which steps are trained."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from genalign.algorithms.pathwise_recipes import draft
from genalign.algorithms.step_schedules import (
    AllSteps,
    LastSteps,
    NoSteps,
    Pace,
    RandomLastSteps,
    RandomWindow,
    SlidingWindow,
)
from genalign.diffusion.paths import FlowPath
from genalign.diffusion.transitions import CPS, FlowSDE
from genalign.types import Grid

USABLE = (0, 1, 2, 3, 4)


def test_no_and_all_steps() -> None:
    assert NoSteps()(USABLE, 6, 0, 0) == ()
    assert AllSteps()(USABLE, 6, 0, 0) == USABLE


def test_a_window_begins_within_its_reach() -> None:
    windows = {RandomWindow(2, 0.5)(USABLE, 6, index, 0) for index in range(100)}
    assert windows == {(0, 1), (1, 2), (2, 3)}


def test_a_window_skips_gaps() -> None:
    assert {RandomWindow(2, 1.0)((0, 1, 3, 4), 6, index, 0) for index in range(50)} == {(0, 1), (3, 4)}


def test_a_sliding_window_moves_on_and_begins_again() -> None:
    schedule = SlidingWindow(2, rounds_each=3, stride=2)
    steps = [schedule(USABLE, 6, index, 0) for index in range(9)]
    assert steps == [(0, 1)] * 3 + [(2, 3)] * 3 + [(0, 1)] * 3


def published_starts(pace: str, rounds: int, each: int, total: int) -> list[int]:
    """First steps of MixGRPO's windows by its counters: on by one step when there are enough iterations."""
    step, iterations, starts = 0, 0, []
    while len(starts) < rounds:
        starts.append(step)
        iterations += 1
        if pace == "exp_decay":
            enough = np.ceil(each * np.exp(-0.1 * max(0, step - 13)))
        elif pace == "decay":
            least, progress = max(1, each // 4), step / (total - 2)
            enough = max(least, int(each * (1 - progress) + least * progress))
        else:
            enough = each
        if iterations >= enough:
            step, iterations = step + 1, 0
    return starts


@pytest.mark.parametrize("pace", ["progressive", "decay", "exp_decay"])
def test_a_sliding_window_keeps_the_published_pace(pace: Pace) -> None:
    """Of 25 steps, 23 are trained as published, and the first 20 windows of four steps are whole."""
    schedule, usable = SlidingWindow(4, 25, pace=pace), range(23)
    rounds = sum(schedule.rounds_at(step, 25) for step in range(20))
    starts = [schedule(usable, 25, index, 0)[0] for index in range(rounds + 1)]
    assert starts == [*published_starts(pace, rounds, 25, 25), 0]
    assert rounds == {"progressive": 500, "decay": 334, "exp_decay": 460}[pace]


def test_impossible_schedules() -> None:
    with pytest.raises(ValueError, match="needs a stochastic kernel"):
        AllSteps()((), 6, 0, 0)
    with pytest.raises(ValueError, match="only steps"):
        SlidingWindow(6)(USABLE, 6, 0, 0)
    with pytest.raises(ValueError, match="of at least 1"):
        SlidingWindow(0)
    with pytest.raises(ValueError, match="one of progressive, decay, exp_decay, not 'linear'"):
        SlidingWindow(1, pace="linear")  # type: ignore[arg-type]  # which is refused


def test_the_last_steps_by_number_fraction_and_all() -> None:
    assert [LastSteps(size)((), 8, 0, 0) for size in (1, 3)] == [(7,), (5, 6, 7)]
    assert LastSteps(0.3)((), 8, 0, 0) == (5, 6, 7) and LastSteps()((), 3, 0, 0) == (0, 1, 2)
    with pytest.raises(ValueError, match="trains the last 9 steps, but there are only 8: lower its steps"):
        LastSteps(9)((), 8, 0, 0)
    with pytest.raises(ValueError, match="the recipe needs 4 active steps or more, but there are only 3"):
        LastSteps(least=4)((), 3, 0, 0)
    for size in (0, -1, 1.5):
        with pytest.raises(ValueError, match="a number of at least 1, or a fraction"):
            LastSteps(size)


def test_a_random_number_of_last_steps_has_alignprops_distribution() -> None:
    """Of 50 steps, by N(8, 5): one with probability 0.0275, eight with 0.0839 (fixture F20), never none or all."""
    schedule = RandomLastSteps(mean=0.16, std=0.1)
    sizes = [len(schedule((), 50, number, 1)) for number in range(20_000)]
    assert min(sizes) >= 1 and max(sizes) < 50 and schedule((), 50, 7, 1) == schedule((), 50, 7, 1)
    assert sizes.count(1) / 20_000 == pytest.approx(0.02746, abs=0.004)
    assert sizes.count(8) / 20_000 == pytest.approx(0.08385, abs=0.006)
    with pytest.raises(ValueError, match="at least 2 sampling steps"):
        schedule((), 1, 0, 0)


def test_a_gradient_cannot_follow_a_sampler_that_ends_in_noise() -> None:
    sigma = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    grid = Grid(sigma[:-1], 1 - sigma, sigma)
    recipe = replace(draft(), kernel=FlowSDE(0.7))
    with pytest.raises(ValueError, match=r"FlowSDE.* ends in noise, .*: choose ODE, CPS, DDIM or DPMSDE"):
        recipe.steps(FlowPath(), grid, 0, 0)
    assert replace(draft(), kernel=CPS(0.8)).steps(FlowPath(), grid, 0, 0) == (1,)
