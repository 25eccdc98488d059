"""Progress in a terminal and in a log: counts, rates and the time that is left; what a narrow terminal cuts first."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator

import pytest
from rich.console import Console

from genalign.runtime import progress as progress_module
from genalign.runtime.progress import SILENT, Progress, format_rate


class Clock:
    """A clock that stands still until it is set."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr(progress_module, "time", clock)
    yield clock


def terminal(width: int) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)


def drawn(progress: Progress, width: int) -> list[str]:
    stream = io.StringIO()
    Console(file=stream, width=width, color_system=None).print(progress._table())
    return stream.getvalue().splitlines()


def test_a_log_has_a_line_at_once_and_then_one_every_thirty_seconds(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "genalign")
    progress = Progress(console=Console(file=io.StringIO()))
    with progress.phase("loading sd3"):
        assert caplog.messages == ["loading sd3"]
    caplog.clear()
    with progress.phase("training", 35, "rounds", done=2) as rounds:
        assert caplog.messages == ["training 2/35 rounds"]
        for seconds in (10, 10, 10, 10):
            with progress.phase("sampling", 8) as sampled:
                clock.now += seconds
                sampled(4)
        assert caplog.messages[1:] == ["training 2/35 rounds, sampling 4/8 samples (2.5 s/sample, ETA 0:00:10)"]
        rounds()
        progress.log_line("round 3/35: reward 0.1")
        clock.now += 29
        rounds()
        assert caplog.messages[2:] == ["round 3/35: reward 0.1"]
        clock.now += 1
        rounds()
        assert caplog.messages[3:] == ["training 5/35 rounds (23.3 s/round, ETA 0:11:40)"]


@pytest.mark.parametrize("width", [46, 36])
def test_counts_and_times_left_are_the_last_to_be_cut(clock: Clock, width: int) -> None:
    progress = Progress(console=terminal(width))
    with progress.phase("training", 35, "rounds") as rounds:
        clock.now += 60
        rounds(3)
        rounds.note = "reward 0.114  held-out 0.381  53.0 samples/s"
        with progress.phase("sampling", 1152) as sampled:
            clock.now += 10
            sampled(96)
            lines = drawn(progress, width)
    assert all(len(line) <= width for line in lines)
    assert "3/35 rounds" in lines[0] and "ETA 0:10:30" in lines[0]  # 3 rounds took 60 s, and the fourth 10 s so far
    assert "96/1152 samples" in lines[1] and "ETA 0:01:50" in lines[1]
    assert width < 46 or ("train" in lines[0] and "sampl" in lines[1])


def test_a_complete_phase_leaves_a_line_in_a_terminal_and_logs_nothing(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "genalign")
    progress = Progress(console=terminal(80))
    with progress.phase("before", 480, "images") as advance:
        clock.now += 50
        advance(480)
        progress.log_line("not here")
    with pytest.raises(KeyError), progress.phase("after", 480):
        raise KeyError
    output = progress.console.file.getvalue()  # type: ignore[attr-defined]  # a StringIO
    assert "before: 480/480 images in 0:00:50\n" in output and "after: " not in output
    assert not caplog.messages and not progress._phases


def test_log_lines_appear_above_the_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    console, stream = terminal(80), io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    handler, root = logging.StreamHandler(), logging.getLogger()
    root.addHandler(handler)
    try:
        with Progress(console=console).phase("training", 3, "rounds"):
            logging.getLogger("genalign").warning("a reward failed")
    finally:
        root.removeHandler(handler)
    assert "a reward failed" in console.file.getvalue()  # type: ignore[attr-defined]  # a StringIO
    assert not stream.getvalue() and handler.stream is stream


def test_silent_progress_shows_nothing(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    caplog.set_level(logging.INFO, "genalign")
    with SILENT.phase("training", 3, "rounds") as advance:
        advance(2)
        SILENT.log_line("round")
    assert advance.done == 2 and not caplog.messages and capfd.readouterr() == ("", "")


def test_rates_below_one_are_seconds_per_sample() -> None:
    assert format_rate(12.34) == "12.3 samples/s" and format_rate(0.05, "images") == "20.0 s/image"
    assert format_rate(0.0) == ""


def test_the_first_phase_within_an_uncounted_one_is_logged_at_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "genalign")
    progress = Progress(console=Console(file=io.StringIO()))
    with progress.phase("before"), progress.phase("sampling", 480):
        pass
    assert caplog.messages == ["before", "before, sampling 0/480 samples"]


def test_lines_are_printed_where_nothing_is_set_up_for_logging(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress_module.logger, "hasHandlers", lambda: False)
    with Progress(console=Console(file=io.StringIO())).phase("training", 3, "rounds"):
        pass
    assert capsys.readouterr() == ("", "training 0/3 rounds\n")
