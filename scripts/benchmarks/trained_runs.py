"""Training runs of the proofs: trained where they are missing, and read from their folders."""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from genalign.cli.main import main as genalign
from genalign.evaluation.evaluate import load_evaluation
from genalign.evaluation.records import PromptRecord, prompt_records
from genalign.runtime.files import write_json
from genalign.training.reward_hacking import HackingReport

RESULTS, COMPARISONS = Path("docs/results"), Path("scripts/configs/compare")


def run_genalign(*arguments: str) -> None:
    """Run a command of genalign. Raises SystemExit where it fails."""
    if status := genalign(list(arguments)):
        raise SystemExit(f"genalign {' '.join(arguments)} ended with status {status}")


def compared(folder: Path, name: str) -> dict[str, dict[int, Path]]:
    """The finished runs of a comparison by recipe and seed; missing ones are trained."""
    run_genalign("compare", str(COMPARISONS / f"{name}.yaml"), "--output", str(folder))
    recipes = sorted(path for path in folder.iterdir() if path.is_dir())
    return {
        recipe.name: {int(run.name.removeprefix("seed-")): run for run in sorted(recipe.glob("seed-*"))}
        for recipe in recipes
    }


def metrics(run: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl of a run."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def gains(name: str, metric: str, score: str, seed: int, run: Path) -> list[PromptRecord]:
    """The records of one score of a finished run."""
    records = prompt_records(name, score, seed, load_evaluation(run / "before"), load_evaluation(run / "after"))
    return [replace(record, metric=metric) for record in records]


def arm_gains(name: str, metric: str, score: str, runs: Mapping[int, Path]) -> list[PromptRecord]:
    """The records of one score of an arm, over its seeds."""
    return [record for seed, run in runs.items() for record in gains(name, metric, score, seed, run)]


def arm_options(comparison: str, arm: str, own: Path) -> list[str]:
    """The options with which another command takes the settings of an arm; those of its own are written to ``own``."""
    settings = yaml.safe_load((COMPARISONS / f"{comparison}.yaml").read_text(encoding="utf-8"))
    write_json(own, settings["runs"][arm])
    return ["--config", str(COMPARISONS / settings["base"]), "--config", str(own)]


def differences(
    name: str, metric: str, score: str, first: Mapping[int, Path], second: Mapping[int, Path]
) -> list[PromptRecord]:
    """One score after training in two arms, paired by seed, prompt and noise; ``before`` is the first arm's."""
    records: list[PromptRecord] = []
    for seed in sorted(first.keys() & second.keys()):
        sides = [load_evaluation(runs[seed] / "after") for runs in (first, second)]
        records += [replace(record, metric=metric) for record in prompt_records(name, score, seed, *sides)]
    return records


def alarm_and_fall(run: Path, score: str) -> tuple[float, float]:
    """Find the round of the first alarm, and the round of the first fall of a held-out score.

    A fall is a score a tenth below the untrained model's. Without an alarm the first is infinite; without a fall the
    second is one past the last round.
    """
    base = load_evaluation(run / "before").overall[score].mean
    rows = metrics(run)
    alarm = next((number for number, report in hacking_reports(run) if report.alarm), math.inf)
    fallen = (row["round"] for row in rows if row["held_out"][score]["mean"] <= 0.9 * base)
    return float(alarm), float(next(fallen, len(rows)))


def hacking_reports(run: Path) -> list[tuple[int, HackingReport]]:
    """Every report of reward hacking of a run, by round."""
    return [
        (row["round"], HackingReport.from_list(row["reward_hacking"])) for row in metrics(run) if row["reward_hacking"]
    ]


def head(claim: str, command: str) -> dict[str, str]:
    """The header of a result file: claim, command, machine, date and commit."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    return {
        "claim": claim,
        "command": command,
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip(),
    }
