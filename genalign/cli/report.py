"""``genalign report``: the page about a run, of a generator or of a reward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from genalign.cli import parsing
from genalign.cli.context import CommandContext
from genalign.evaluation.report import write_report
from genalign.evaluation.report.reward_training_page import is_reward_training, write_reward_training
from genalign.training.run_folder import RunFolder


@dataclass(frozen=True)
class Report:
    """A page about a run, finished or not: RUN/report.html.

    Args:
        run: Folder of the run, of genalign train or genalign reward train.
    """

    run: str


def report_command(context: CommandContext, arguments: Sequence[str]) -> int:
    """Write the report of a run, finished or not."""
    settings, _ = parsing.parse(Report, arguments, "report", first="run")
    folder = Path(settings.run)
    if is_reward_training(folder):
        print(f"report: {write_reward_training(folder)}")
        return 0
    RunFolder(folder).require_format()
    print(f"report: {write_report(folder)}")
    return 0
