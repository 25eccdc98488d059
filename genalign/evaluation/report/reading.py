"""The parts of a run folder that a report is made from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from genalign.evaluation.evaluate import Evaluation, load_evaluation
from genalign.evaluation.paired import SamplePair, effect_sizes, gain, pairs_by_gain, task_gains
from genalign.metrics.intervals import Estimate
from genalign.training.best_weights import BestRound

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Comparison:
    """After minus before: the mean over tasks of each score, each task, and all pairs, worst regression first.

    ``effects`` are the effect sizes of the scores.
    """

    overall: Mapping[str, Estimate]
    tasks: Mapping[str, Mapping[str, Estimate]]
    pairs: tuple[SamplePair, ...]
    effects: Mapping[str, float] = field(default_factory=dict)

    @property
    def prompts(self) -> int:
        """The number of prompts of the pairs."""
        return len({(pair.before.task, pair.before.prompt) for pair in self.pairs})


@dataclass(frozen=True)
class Run:
    """The parts of a run folder; a part that is absent is empty or None.

    ``prompts`` describes the prompt sets by section, as prompts.json does; ``incomparable`` says why two evaluations
    have no comparison; ``best`` is the round whose weights the evaluation after training is of, if they were chosen.
    """

    folder: Path
    rows: tuple[Row, ...]
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    before: Evaluation | None
    after: Evaluation | None
    comparison: Comparison | None
    prompts: Mapping[str, Mapping[str, Any]]
    incomparable: str = ""
    best: BestRound | None = None

    @property
    def unfinished(self) -> str:
        """How many of the configured rounds are recorded if the run did not reach its end; else empty."""
        settings = self.config.get("training", {})
        planned, last = settings.get("rounds"), self.rows[-1] if self.rows else None
        if self.after or "rounds" not in settings:
            return ""
        if planned is None:  # the first round, after which the number is fitted to a time budget, is not finished
            return "0 rounds"
        if last and rounds_done(last) >= planned:
            return ""
        limits = (settings.get("max_nfe"), "nfe"), (self.config.get("max_seconds"), "seconds")
        if last and any(limit and {**last, **last["machine"]}[name] >= limit for limit, name in limits):
            return ""
        return f"{rounds_done(last) if last else 0} of {planned} rounds"


def rounds_done(row: Row) -> int:
    """The number of rounds after which a row was recorded; rows count from 0."""
    return int(row["round"]) + 1


def read_run(folder: Path) -> Run:
    """Read a run folder, finished or interrupted.

    Args:
        folder: may hold metrics.jsonl, config.json, environment.json, prompts.json, and the evaluations before/ and
            after/.

    Raises:
        FileNotFoundError: the folder does not exist, holds no part of a run, or is of another command.
        json.JSONDecodeError: a file is damaged, other than in the last line of metrics.jsonl.
    """
    parts = ("config.json", "metrics.jsonl", "before/summary.json", "after/summary.json")
    if (folder / "comparison.html").is_file():
        raise FileNotFoundError(
            f"{folder} holds a comparison of runs, not a run: open {folder / 'comparison.html'}, or give one of its"
            " runs, as in genalign report FOLDER/RECIPE/seed-1"
        )
    config, environment, prompts = (read_object(folder / f"{n}.json") for n in ("config", "environment", "prompts"))
    recorded = [part for part in parts if (folder / part).is_file()]
    if not recorded or (recorded == ["config.json"] and "training" not in config):
        reason = "its config.json is of another command" if recorded else "it has no config.json"
        give = "Give the output of genalign train or genalign reward train"
        raise FileNotFoundError(f"{folder} is not a run folder: {reason}. {give}")
    before, after = (
        load_evaluation(folder / name) if (folder / name / "summary.json").is_file() else None
        for name in ("before", "after")
    )
    rows = read_rows(folder / "metrics.jsonl")
    comparison, incomparable = None, ""
    if before and after:
        try:
            pairs = pairs_by_gain(before, after)
            gains = gain(before, after), task_gains(before, after)
            comparison = Comparison(*gains, pairs, effect_sizes(before, after))
        except ValueError as error:
            incomparable = str(error)
    best = BestRound.read(folder / "after")
    return Run(folder, rows, config, environment, before, after, comparison, prompts, incomparable, best)


def read_rows(path: Path) -> tuple[Row, ...]:
    """Read the complete lines of a .jsonl file; none if there is no file."""
    if not path.is_file():
        return ()
    *lines, _ = path.read_text(encoding="utf-8").split("\n")  # the last has no end if its writing was interrupted
    return tuple(json.loads(line) for line in lines if line.strip())


def read_object(path: Path) -> Mapping[str, Any]:
    """Read a JSON object; an empty one if there is no file."""
    content: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return content
