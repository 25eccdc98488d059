"""Progress of the phases of a command: bars in a terminal, log lines elsewhere (nohup, Slurm, CI)."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

logger = logging.getLogger(__name__)
LOG_SECONDS = 30.0
"""The least time between two log lines about the same phase, or the phases within it."""


@dataclass(eq=False)
class Phase:
    """A phase that is running; calling it reports what has been completed since the last call.

    Args:
        progress: The display.
        name: What happens, such as "sampling".
        total: The amount of work; None if it is unknown. It may be changed while the phase runs.
        unit: What is counted, in the plural.
        done: The work that is complete.
        note: A text that is shown beside the bar, the first to be cut; empty shows the rate.
    """

    progress: Progress
    name: str
    total: int | None
    unit: str
    done: int = 0
    note: str = ""
    _start: float = field(default_factory=lambda: time.monotonic())
    _last: float = field(init=False)  # when work was completed last
    _before: int = field(init=False)

    def __post_init__(self) -> None:
        self._last, self._before = self._start, self.done

    def __call__(self, count: int = 1) -> None:
        """Report that ``count`` more are complete."""
        self.advance(count)
        self.progress.log(self.progress.seconds)

    def advance(self, count: int = 1) -> None:
        """Count ``count`` more as complete, without a line in the log."""
        self.done, self._last = self.done + count, time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds since the phase began."""
        return time.monotonic() - self._start

    @property
    def count(self) -> str:
        """The completed and the total work, as in "96/480 samples"; empty if the total is unknown."""
        return "" if self.total is None else f"{self.done}/{self.total} {self.unit}"

    @property
    def rate(self) -> str:
        """The mean rate of the phase; empty before there is one."""
        seconds = self._last - self._start
        return format_rate((self.done - self._before) / seconds, self.unit) if seconds > 0 else ""

    @property
    def eta(self) -> str:
        """The time that is left at the mean rate of the phase, as H:MM:SS; empty before it is known."""
        completed = self.done - self._before
        if self.total is None or completed <= 0:
            return ""
        per_unit, since = (self._last - self._start) / completed, time.monotonic() - self._last
        return format_seconds(max(0.0, per_unit * (self.total - self.done) - since))

    def __str__(self) -> str:
        details = ", ".join(filter(None, [self.rate, f"ETA {self.eta}" if self.eta else ""]))
        return f"{self.name} {self.count}".rstrip() + (f" ({details})" if details else "")


class Progress:
    """Shows the phases of a command with their counts and the time that is left; phases may be nested.

    In a terminal every running phase has a bar; an outermost phase that is complete leaves a line. In a narrow terminal
    the counts and the times that are left are the last to be cut. Elsewhere an outermost phase has a log line when it
    begins, and one when a phase within it begins if it has no count of its own; from then on, whatever runs within it,
    at most one line every ``seconds``.

    Args:
        enabled: Whether anything is shown, which only one rank of several should do.
        console: The terminal; by default standard error.
        seconds: The least time between two log lines.
    """

    def __init__(self, enabled: bool = True, console: Console | None = None, seconds: float = LOG_SECONDS) -> None:
        self.console = console or Console(stderr=True, force_terminal=sys.stderr.isatty())
        self.seconds = seconds
        self.in_terminal = enabled and self.console.is_terminal and not self.console.is_dumb_terminal
        self.in_log = enabled and not self.in_terminal
        self._phases: list[Phase] = []
        self._logged = 0.0
        self._spinner = Spinner("dots")

    @contextlib.contextmanager
    def phase(self, name: str, total: int | None = None, unit: str = "samples", done: int = 0) -> Iterator[Phase]:
        """Show a phase inside the context; the phase that is yielded is called as in ``advance(len(batch))``.

        Args:
            name: What happens, such as "sampling".
            total: The amount of work; None if it is unknown.
            unit: What is counted, in the plural.
            done: The work that was complete before, such as the rounds before a run was resumed.
        """
        phase, outermost = Phase(self, name, total, unit, done), not self._phases
        uncounted = len(self._phases) == 1 and self._phases[0].total is None
        self._phases.append(phase)
        try:
            if outermost or uncounted:
                self.log()
            with self._live() if outermost and self.in_terminal else contextlib.nullcontext():
                yield phase
            if outermost and self.in_terminal:
                line = f"{phase.name}: {phase.count}".rstrip(": ") + f" in {format_seconds(phase.elapsed)}"
                self.console.print(line, markup=False, highlight=False)
        finally:
            self._phases.remove(phase)

    def log(self, seconds: float = 0.0) -> None:
        """Log a line about the running phases, unless the last line is less than ``seconds`` old, or in a terminal."""
        now = time.monotonic()
        if self.in_log and (not seconds or now - self._logged >= seconds):
            self.log_line(", ".join(map(str, self._phases)))

    def log_line(self, line: str) -> None:
        """Log a line of the caller's in place of the next one about the running phases; a terminal shows none."""
        if not self.in_log:
            return
        self._logged = time.monotonic()
        if logger.hasHandlers():
            logger.info("%s", line)
        else:  # a notebook, or a script without logging
            print(line, file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def _live(self) -> Iterator[None]:
        """Draw the bars inside the context, and let log lines and printed lines appear above them."""
        original = sys.stderr
        streams = [h for h in logging.getLogger().handlers if getattr(h, "stream", None) is original]
        with Live(
            get_renderable=self._table,
            console=self.console,
            transient=True,
            refresh_per_second=4,
            redirect_stdout=sys.stdout.isatty(),
        ):
            try:
                for handler in streams:
                    handler.setStream(sys.stderr)  # type: ignore[attr-defined]  # it has a stream
                yield
            finally:
                for handler in streams:
                    handler.setStream(original)  # type: ignore[attr-defined]  # as above

    def _table(self) -> Table:
        """Draw one row per phase; a narrow terminal has no bars and notes, and cuts the names of phases first."""
        table, wide = Table.grid(padding=(0, 1, 0, 0)), self.console.width >= 70
        for keeps_width in (False, True, True, True, False):
            table.add_column(no_wrap=keeps_width)
        for depth, phase in enumerate(list(self._phases)):
            bar = ProgressBar(phase.total, phase.done, width=16) if phase.total else self._spinner
            table.add_row(
                Text("  " * depth + phase.name, no_wrap=True, overflow="ellipsis"),
                bar if wide else "",
                phase.count or format_seconds(phase.elapsed),
                f"ETA {phase.eta or '-:--:--'}" if phase.total else "",
                Text((phase.note or phase.rate) if wide else "", no_wrap=True, overflow="ellipsis"),
            )
        return table


SILENT = Progress(enabled=False)
"""The progress of callers that show none."""


def format_seconds(seconds: float) -> str:
    """Format a duration as H:MM:SS."""
    return str(timedelta(seconds=round(seconds)))


def format_rate(per_second: float, unit: str = "samples") -> str:
    """Format a rate as in "2.5 samples/s", or, below 1, as in "12.0 s/sample"."""
    if per_second >= 1:
        return f"{per_second:.1f} {unit}/s"
    return f"{1 / per_second:.1f} s/{unit.removesuffix('s')}" if per_second else ""
