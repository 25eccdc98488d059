"""Which steps are trained."""

from __future__ import annotations

import numpy as np
import pytest

from genalign.algorithms.step_schedules import AllSteps, NoSteps, Pace, RandomWindow, SlidingWindow

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
