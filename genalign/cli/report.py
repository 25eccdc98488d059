"""``genalign report``: the page on a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from genalign.cli import parsing
from genalign.cli.context import CommandContext
from genalign.evaluation.report import write_report
from genalign.training.run_folder import RunFolder


@dataclass(frozen=True)
class Report:
    """A page on a run, finished or not: RUN/report.html.

    Args:
        run: Folder of the run.
    """

    run: str


def report_command(context: CommandContext, arguments: Sequence[str]) -> int:
    """Write the report of a run, finished or not."""
    settings, _ = parsing.parse(Report, arguments, "report", first="run")
    folder = Path(settings.run)
    RunFolder(folder).require_format()
    print(f"report: {write_report(folder)}")
    return 0
