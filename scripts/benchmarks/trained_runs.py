"""Training runs of the proofs: trained where they are missing, and read from their folders."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

from genalign.cli.main import main as genalign
from genalign.evaluation.evaluate import load_evaluation
from genalign.evaluation.records import PromptRecord, prompt_records

RESULTS = Path("docs/results")


def compared(folder: Path, name: str) -> dict[str, dict[int, Path]]:
    """The finished runs of a comparison by recipe and seed; missing ones are trained."""
    if status := genalign(["compare", f"scripts/configs/compare/{name}.yaml", "--output", str(folder)]):
        raise SystemExit(f"the comparison {name} ended with status {status}")
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
