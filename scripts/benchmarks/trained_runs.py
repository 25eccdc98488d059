"""Training runs of the proofs: trained where they are missing, and read from their folders."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from genalign import assets
from genalign.cli import parsing
from genalign.cli.compare import SOME_FAILED, Compare, has_failed
from genalign.cli.main import main as genalign
from genalign.diffusion.hypernetwork import hypernetwork_of
from genalign.diffusion.sampling import Sampling
from genalign.evaluation.evaluate import load_evaluation
from genalign.evaluation.records import PromptRecord, prompt_records
from genalign.prompts import drawn_in_turn
from genalign.runtime.files import write_json
from genalign.search.engine import SearchRun
from genalign.training.reward_hacking import HackingReport
from genalign.types import Pipeline, Prompt
from genalign.worlds import shapes
from pipelines import SD3
from scripts.benchmarks.base_weights import require_base

RESULTS, COMPARISONS = Path("docs/results"), Path("scripts/configs/compare")
GATED_PROMPTS = 32  # on which gates are measured


def run_genalign(*arguments: str, tolerated: int = 0) -> None:
    """Run a command of genalign. Raises SystemExit where it fails, but for the exit status that is ``tolerated``."""
    if (status := genalign(list(arguments))) not in (0, tolerated):
        raise SystemExit(f"genalign {' '.join(arguments)} ended with status {status}")


def compared(folder: Path, name: str, allow_failed: bool = False) -> dict[str, dict[int, Path]]:
    """The runs that the file of a comparison names, by recipe and seed; missing ones are trained.

    Exits where the folder has runs of another base model or other settings. A run that stopped during its training
    (``genalign.cli.compare.has_failed``) is among the others with ``allow_failed``; without, one of them exits.
    """
    comparison = yaml.safe_load((COMPARISONS / f"{name}.yaml").read_text(encoding="utf-8"))
    base = yaml.safe_load((COMPARISONS / comparison["base"]).read_text(encoding="utf-8"))
    require_base(folder, base["model"]["path"])
    file, tolerated = str(COMPARISONS / f"{name}.yaml"), SOME_FAILED if allow_failed else 0
    run_genalign("compare", file, "--output", str(folder), tolerated=tolerated)
    settings, _ = parsing.parse(Compare, [file], "compare", first="config")
    runs: dict[str, dict[int, Path]] = {}
    for recipe, seed in sorted(settings.jobs()):
        runs.setdefault(recipe, {})[seed] = folder / recipe / f"seed-{seed}"
    return runs


def finished(runs: Mapping[str, Mapping[int, Path]]) -> dict[str, dict[int, Path]]:
    """The runs that were trained to their end, by recipe and seed; a recipe of which all stopped has none."""
    return {name: {seed: run for seed, run in own.items() if not has_failed(run)} for name, own in runs.items()}


def stopped(runs: Mapping[str, Mapping[int, Path]]) -> list[str]:
    """Name the runs that stopped during their training, as in sum/seed-81, for the head of a result file."""
    return [f"{name}/seed-{seed}" for name, own in runs.items() for seed, run in own.items() if has_failed(run)]


def metrics(run: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl of a run."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def gains(name: str, metric: str, score: str, seed: int, run: Path) -> list[PromptRecord]:
    """The records of one score of a finished run."""
    records = prompt_records(name, score, seed, load_evaluation(run / "before"), load_evaluation(run / "after"))
    return [replace(record, metric=metric) for record in records]


def run_record(name: str, metric: str, seed: int, value: float, before: float = 0.0) -> PromptRecord:
    """A number of a whole run, whose interval is over seeds; ``before`` is what it is compared with."""
    return PromptRecord(name, metric, seed, "all", "the whole run", before, value, 1)


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

    A fall is a score a tenth below the untrained model's. No alarm, or no fall, counts as one past the last round.
    """
    base = load_evaluation(run / "before").overall[score].mean
    rows = metrics(run)
    alarms = (number for number, report in hacking_reports(run) if report.alarm)
    fallen = (row["round"] for row in rows if row["held_out"][score]["mean"] <= 0.9 * base)
    return float(next(alarms, len(rows))), float(next(fallen, len(rows)))


def hacking_reports(run: Path) -> list[tuple[int, HackingReport]]:
    """Every report of reward hacking of a run, by round."""
    return [
        (row["round"], HackingReport.from_list(row["reward_hacking"])) for row in metrics(run) if row["reward_hacking"]
    ]


def gate_spread(run: Path) -> float:
    """How far the gates of a run's LoRA differ between held-out prompts and steps, by ``spread_of_gates``."""
    model = SD3.load(assets.resolve("shapes-sd3"))
    model.load_lora(run / "lora")
    return spread_of_gates(model, drawn_in_turn(shapes.prompts("val"), GATED_PROMPTS, seed=0))


@torch.no_grad()
def spread_of_gates(model: Pipeline, prompts: Sequence[Prompt]) -> float:
    """The standard deviation of each gate over prompts and ten steps of sampling, averaged over the gates.

    It is 0 for gates that do not move, as those of a new adapter. Raises ValueError for a model without gates.
    """
    hypernetwork = hypernetwork_of(model.denoiser)
    if hypernetwork is None:
        raise ValueError("the model has no gates: load a LoRA with a hypernetwork")
    gates: list[Tensor] = []

    def see(module: nn.Module, inputs: Any, made: Sequence[Tensor]) -> None:
        gates.append(torch.cat(list(made), dim=1))

    hook = hypernetwork.register_forward_hook(see)
    search = SearchRun(model, prompts, [], Sampling(10).grid(model), 1.0, len(prompts), "gates")
    search.advance(search.start(1), search.steps)
    hook.remove()
    return float(torch.cat(gates).std(dim=0).mean())


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
