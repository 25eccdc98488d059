"""Training methods side by side in the shapes world, and what follows from the same kind of runs.

Each part trains the runs of a comparison file where they are missing, and writes docs/results. The parts are run by
``scripts/benchmarks/proofs.py``.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from genalign.evaluation.evaluate import load_evaluation
from genalign.evaluation.records import PromptRecord
from genalign.evaluation.standings import Look, standings
from genalign.runtime.files import without_infinities, write_text
from genalign.worlds import shapes
from scripts.benchmarks.published_results import write_results
from scripts.benchmarks.trained_runs import RESULTS, arm_gains, compared, differences, gains, head, metrics

REACHED = 0.9  # of the best final score of a method's runs: the target of the learning rates' race

Runs = Mapping[str, Mapping[int, Path]]
"""Finished runs by method and seed."""

Evaluations = list[list[float]]
"""The evaluations of a run on held-out prompts: NFE, seconds of training, mean strict accuracy, its interval."""


def methods(work: Path) -> None:
    """All methods of the shapes world, 6 minutes each."""
    _at_equal_cost(work, "methods", "6 minutes of training by each method, 10 steps")


def finalists(work: Path) -> None:
    """The methods on which a claim rests, 15 minutes each."""
    _at_equal_cost(work, "finalists", "15 minutes of training by each method, 10 steps")


def finalists_20_steps(work: Path) -> None:
    """The claims about completion, with 20 sampling steps."""
    _at_equal_cost(work, "finalists_20_steps", "15 minutes of training by each method, 20 steps")


def _at_equal_cost(work: Path, part: str, training: str) -> None:
    """Write the gains on held-out compositions, and the standings at equal NFE and at equal seconds."""
    folder, records = work / part, list[PromptRecord]()
    runs = compared(folder, f"shapes_{part}")
    for name, by_seed in runs.items():
        for seed, run in by_seed.items():
            records += gains(name, "strict", "strict", seed, run)
    header = head(
        f"Held-out strict accuracy (suite comp, ODE) after {training}", f"python scripts/benchmarks/proofs.py {part}"
    )
    summaries = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
    evaluations = {name: {str(seed): held_out(run) for seed, run in own.items()} for name, own in runs.items()}
    more = {"standings": summaries, "equal": at_equal_cost(evaluations), "evaluations": evaluations}
    write_results(RESULTS, f"{part}_shapes", {**header, **more}, records)


def held_out(run: Path) -> Evaluations:
    """Read the evaluations of a run on held-out prompts, in order."""
    bounds = ("mean", "low", "high")
    return [
        [row["nfe"], row["machine"]["seconds"], *(row["held_out"]["strict"][bound] for bound in bounds)]
        for row in metrics(run)
        if row["held_out"]
    ]


def at_equal_cost(evaluations: Mapping[str, Mapping[str, Evaluations]]) -> dict[str, Any]:
    """The standings at equal NFE and at equal seconds as JSON types, from the evaluations by method and seed."""
    looks = {
        name: {
            int(seed): [Look(nfe, seconds, {"strict": mean}) for nfe, seconds, mean, *_ in run]
            for seed, run in runs.items()
        }
        for name, runs in evaluations.items()
    }
    return without_infinities({cost: standings(looks, cost, "strict").as_dict() for cost in ("nfe", "seconds")})


def matching_losses(work: Path) -> None:
    """CRD, DGPO and other losses on final samples, at equal NFE: 6 arms x 3 seeds x 5 minutes = 1.5 hours."""
    records: list[PromptRecord] = []
    runs = compared(work / "matching", "shapes_matching")
    for name, by_seed in runs.items():
        for score in ("strict", "partial"):
            records += arm_gains(name if score == "strict" else f"{name}.{score}", score, score, by_seed)
    metric = "strict, crd - crd_uncentred"
    records += differences("crd.difference", metric, "strict", runs["crd_uncentred"], runs["crd"])
    records.sort(key=lambda record: record.name)
    claim = "Accuracy on held-out compositions (ODE) after 100 000 NFE by losses that compare a group's final samples"
    header = head(claim, "python scripts/benchmarks/proofs.py matching_losses")
    write_results(RESULTS, "matching_losses_shapes", header, records)


def learning_rates(work: Path) -> None:
    """Whether ``learning_rate: auto`` holds from any first rate, and how soon it arrives beside fixed rates."""
    files = ("shapes_learning_rates", "shapes_learning_rates_flow_grpo", "shapes_fixed_rates")
    runs: dict[str, dict[str, dict[str, Evaluations]]] = {}
    for file in files:
        for name, by_seed in compared(work / file.removeprefix("shapes_"), file).items():
            method, rate = split_rate(name)
            own = runs.setdefault(method, {}).setdefault(rate, {})
            own |= {str(seed): from_start(run) for seed, run in by_seed.items()}
    records = [
        PromptRecord(f"{method}.fell", "runs that ended below their start", int(seed), "all", rate, 0.0, fell, 1)
        for method, rates in runs.items()
        for rate, by_seed in rates.items()
        if rate.startswith("from")
        for seed, run in by_seed.items()
        for fell in [float(ended_below_start(run))]
    ]
    claim = (
        "With learning_rate: auto no run ends below its start by more than its interval, from first rates over a range"
        " of 100 (held-out strict accuracy after 4 minutes)"
    )
    header = head(claim, "python scripts/benchmarks/proofs.py learning_rates")
    more = {"arrivals": arrivals(runs), "evaluations": runs}
    write_results(RESULTS, "learning_rates_shapes", {**header, **more}, records)


def split_rate(name: str) -> tuple[str, str]:
    """Divide the name of a run into its method and its rate, as in prdp and from-1e-3."""
    method, kind, rate = name.partition("-from-") if "-from-" in name else name.partition("-fixed-")
    return method, kind.strip("-") + "-" + rate


def arrivals(runs: Mapping[str, Mapping[str, Mapping[str, Evaluations]]]) -> dict[str, Any]:
    """When each method reaches 90 % of the best final score of its runs, by ``auto`` and by fixed rates.

    Args:
        runs: The evaluations by method, rate and seed; the names of fixed rates begin with "fixed".

    Returns:
        By method: the target, the median of ``auto`` over rates and seeds, the best fixed rate with its seconds, and
        the ratio of both; null where the target was not reached.
    """
    table = {}
    for method, rates in runs.items():
        target = REACHED * max(run[-1][2] for by_seed in rates.values() for run in by_seed.values())
        times = {rate: [arrival(run, target) for run in by_seed.values()] for rate, by_seed in rates.items()}
        fixed = {rate: min(own) for rate, own in times.items() if rate.startswith("fixed")}
        best = min(fixed, key=lambda rate: fixed[rate])
        auto = statistics.median(time for rate, own in times.items() if rate not in fixed for time in own)
        table[method] = {"target": target, "auto": auto, "best_rate": best, "fixed": fixed[best]}
        table[method]["ratio"] = auto / fixed[best] if np.isfinite(auto) else np.inf
    return without_infinities(table)


def arrival(run: Evaluations, target: float) -> float:
    """The seconds of training at which the score first reaches a target, between two evaluations on a straight line."""
    if run[0][2] >= target:
        return run[0][1]
    for (_, earlier, low, *_), (_, later, high, *_) in pairwise(run):
        if high >= target:
            return earlier + (target - low) / (high - low) * (later - earlier)
    return np.inf


def prompt_counts(work: Path) -> None:
    """PRDP and DDPO on 1, 100 and all training prompts: what they gain, and which end below their start."""
    folder = work / "prompt_counts"
    train = shapes.prompts("train").prompts
    drawn = [train[i] for i in np.random.default_rng(0).permutation(len(train))]
    for count in (1, 100):
        lines = "".join(json.dumps(prompt.metadata) + "\n" for prompt in drawn[:count])
        write_text(folder / f"prompts-{count}.jsonl", lines)
    records: list[PromptRecord] = []
    evaluations: dict[str, dict[str, Evaluations]] = {}
    for name, runs in compared(folder / "runs", "shapes_prompt_counts").items():
        evaluations[name] = {str(seed): from_start(run) for seed, run in runs.items()}
        for seed, run in runs.items():
            records += gains(name, "strict", "strict", seed, run)
            fell = float(ended_below_start(evaluations[name][str(seed)]))
            metric = "runs that ended below their start"
            records.append(PromptRecord(f"{name}.fell", metric, seed, "all", "the whole run", 0.0, fell, 1))
    claim = "Strict accuracy on val prompts (ODE, 10 steps) after 6 minutes on 1, 100 and all training prompts"
    header = head(claim, "python scripts/benchmarks/proofs.py prompt_counts")
    write_results(RESULTS, "prompt_counts_shapes", {**header, "evaluations": evaluations}, records)


def from_start(run: Path) -> Evaluations:
    """The evaluations of a run on held-out prompts, with that of the untrained model on the same samples first.

    Raises ValueError where the evaluation before training has other samples.
    """
    prompts, config = (json.loads((run / f"{name}.json").read_text("utf-8")) for name in ("prompts", "config"))
    protocols = [
        (prompts[name]["suite_hash"], config[name]["samples_per_task"], config[name]["seeds"])
        for name in ("before_after", "held_out")
    ]
    if protocols[0] != protocols[1]:
        raise ValueError(f"{run}: before_after has other samples than held_out, so that its start is not known")
    strict = load_evaluation(run / "before").overall["strict"]
    return [[0, 0.0, strict.mean, strict.low, strict.high], *held_out(run)]


def ended_below_start(run: Sequence[Sequence[float]]) -> bool:
    """Whether the last evaluation of a run lies below the first by more than its own interval."""
    start, end = run[0], run[-1]
    return end[4] < start[2]
