"""Which steps are trained."""

from __future__ import annotations

import pytest

from genalign.algorithms.step_schedules import AllSteps, NoSteps, RandomWindow, SlidingWindow

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


def test_a_decaying_window_stays_less_at_later_steps() -> None:
    schedule = SlidingWindow(1, rounds_each=4, decay=0.7)
    steps = [schedule(USABLE, 6, index, 0)[0] for index in range(9)]
    assert steps == [0, 0, 0, 0, 1, 1, 2, 3, 4]


def test_impossible_schedules() -> None:
    with pytest.raises(ValueError, match="needs a stochastic kernel"):
        AllSteps()((), 6, 0, 0)
    with pytest.raises(ValueError, match="only steps"):
        SlidingWindow(6)(USABLE, 6, 0, 0)
    with pytest.raises(ValueError, match="of at least 1"):
        SlidingWindow(0)
