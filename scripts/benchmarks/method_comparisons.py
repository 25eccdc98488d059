"""Training methods side by side in the shapes world, and what follows from the same kind of runs.

Each part trains the runs of a comparison file where they are missing, and writes docs/results. The parts are run by
``scripts/benchmarks/proofs.py``. A run that stopped during its training is published too: in a standing it keeps the
score of its last evaluation, and where falls are counted it has fallen.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from genalign.cli.compare import has_failed
from genalign.evaluation.evaluate import load_evaluation
from genalign.evaluation.records import PromptRecord
from genalign.evaluation.standings import Look, standings
from genalign.prompts import drawn_in_turn
from genalign.runtime.files import without_infinities, write_text
from genalign.types import PromptSet
from genalign.worlds import shapes
from scripts.benchmarks.published_results import write_results
from scripts.benchmarks.trained_runs import (
    COMPARISONS,
    RESULTS,
    arm_gains,
    compared,
    differences,
    finished,
    head,
    metrics,
    stopped,
)

REACHED = 0.9  # of the best gain of a method's runs: the target of the learning rates' race
NOISE = 0.03  # of a held-out score: a run that ends further below its start has fallen
LAST_ROUNDS = 5  # over which the training reward at the end of a run is averaged
MATCHING = ("dragon", "nft", "awm")  # of which the one that stands highest is compared with Flow-GRPO
CLAIMS = (  # pairs of arms of which a paper says that the second one is better
    ("flow_grpo", "dense_grpo"),
    ("flow_grpo_every_step", "dense_grpo"),
    ("flow_grpo", "dense_grpo_one_step"),
    ("dense_grpo", "dense_grpo_one_step"),
    ("flow_grpo", "dense_grpo_window"),
    ("flow_grpo", "dense_grpo_window_one_step"),
    ("dense_grpo_window", "dense_grpo_window_one_step"),
    ("prdp", "prdp_4"),
)
GROUP_LOSSES = (  # pairs of arms of shapes_matching.yaml of which the difference is published
    ("crd_uncentered", "crd"),
    *((other, name) for name in ("crd", "dgpo") for other in ("nft", "awm", "flow_grpo")),
)
_PLACEHOLDER = "to_be_chosen"

Runs = Mapping[str, Mapping[int, Path]]
"""Runs by method and seed."""

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


def require_finalists() -> None:
    """Raise ValueError while the file of the finalists has placeholders in place of stage one's winners."""
    file = COMPARISONS / "shapes_finalists.yaml"
    runs = yaml.safe_load(file.read_text(encoding="utf-8"))["runs"]
    if left := [name for name in runs if name.endswith(_PLACEHOLDER)]:
        raise ValueError(
            f"{file} is a template: run the part methods first, and put what stands highest there in place of"
            f" {' and '.join(left)}; without it, name the other parts"
        )


def _at_equal_cost(work: Path, part: str, training: str) -> None:
    """Write the gains on held-out compositions, and the standings at equal NFE and at equal seconds."""
    folder = work / part
    runs = compared(folder, f"shapes_{part}", allow_failed=True)
    evaluations = held_evaluations(runs)
    equal = at_equal_cost(evaluations)
    records = [record for name, own in finished(runs).items() for record in arm_gains(name, "strict", "strict", own)]
    records += claim_differences(finished(runs), [one["name"] for one in equal["seconds"]["recipes"]])
    header = head(
        f"Held-out strict accuracy (suite comp, ODE) after {training}", f"python scripts/benchmarks/proofs.py {part}"
    )
    summaries = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
    more = {"standings": summaries, "equal": equal, "evaluations": evaluations, **about(runs)}
    write_results(RESULTS, f"{part}_shapes", {**header, **more}, records)


def held_out(run: Path) -> Evaluations:
    """Read the evaluations of a run on held-out prompts, in order."""
    bounds = ("mean", "low", "high")
    return [
        [row["nfe"], row["machine"]["seconds"], *(row["held_out"]["strict"][bound] for bound in bounds)]
        for row in metrics(run)
        if row["held_out"]
    ]


def held_evaluations(runs: Runs) -> dict[str, dict[str, Evaluations]]:
    """Read the evaluations of runs, by method and seed.

    A run that stopped early keeps its last score for as long as the longest run, so that it shortens no other's curve.
    Raises ValueError for a run without any evaluation.
    """
    looks = {name: {seed: held_out(run) for seed, run in own.items()} for name, own in runs.items()}
    if empty := [runs[name][seed] for name, own in looks.items() for seed, run in own.items() if not run]:
        raise ValueError(f"{empty[0]} has no evaluation on held-out prompts: delete this folder to train it again")
    ends = [run[-1] for own in looks.values() for run in own.values()]
    longest = [max(end[cost] for end in ends) for cost in (0, 1)]
    for name, own in looks.items():
        for seed, run in own.items():
            if has_failed(runs[name][seed]):
                run.append([*longest, *run[-1][2:]])
    return {name: {str(seed): run for seed, run in own.items()} for name, own in looks.items()}


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


def claim_differences(runs: Runs, best_first: Sequence[str]) -> list[PromptRecord]:
    """Compare on held-out compositions, after training, the pairs of arms on which a claim rests.

    These are ``CLAIMS``, and Flow-GRPO with the matching method that comes first in ``best_first``: the order on the
    validation prompts, so that it is not chosen on the prompts of the comparison.

    Args:
        runs: The finished runs.
        best_first: The arms by their standing on validation prompts.
    """
    strongest = [name for name in best_first if name in MATCHING][:1]
    pairs = [*CLAIMS, *(("flow_grpo", name) for name in strongest)]
    metric = "strict after training, second minus first"
    return [
        record
        for first, second in pairs
        if runs.get(first) and runs.get(second)
        for record in differences(f"{second} - {first}", metric, "strict", runs[first], runs[second])
    ]


def about(runs: Runs) -> dict[str, Any]:
    """Describe runs by method and seed beside their records: which of them failed, and how fast each was."""
    return {
        "failed": stopped(runs),
        "speed": {name: {str(seed): speed(run) for seed, run in own.items()} for name, own in runs.items()},
    }


def speed(run: Path) -> dict[str, float]:
    """How fast a run was: its NFE per second of training, and the median seconds of a round.

    Equal seconds are equal work only where these agree between the seeds of a method.
    """
    rows = metrics(run)
    seconds = [row["machine"]["seconds"] for row in rows]
    rounds = [after - before for before, after in pairwise([0.0, *seconds])]
    return {"nfe_per_second": rows[-1]["nfe"] / seconds[-1], "median_round_seconds": statistics.median(rounds)}


def matching_losses(work: Path) -> None:
    """CRD, DGPO and other losses on final samples, at equal NFE: 16 runs of 6 minutes = 1.6 hours."""
    records: list[PromptRecord] = []
    every = compared(work / "matching", "shapes_matching", allow_failed=True)
    runs = finished(every)
    for name, by_seed in runs.items():
        for score in ("strict", "partial"):
            records += arm_gains(name if score == "strict" else f"{name}.{score}", score, score, by_seed)
    for first, second in GROUP_LOSSES:
        metric = f"strict, {second} - {first}"
        records += differences(f"{second} - {first}", metric, "strict", runs[first], runs[second])
    records.sort(key=lambda record: record.name)
    claim = (
        "Accuracy on held-out compositions (ODE) after 100 000 NFE by losses that compare a group's final samples, and"
        " beside other methods. D3PO, which compares steps, is not built"
    )
    header = head(claim, "python scripts/benchmarks/proofs.py matching_losses")
    write_results(RESULTS, "matching_losses_shapes", {**header, **about(every)}, records)


def learning_rates(work: Path) -> None:
    """Whether ``learning_rate: auto`` holds from any first rate, and how soon it arrives beside fixed rates."""
    files = ("shapes_learning_rates", "shapes_learning_rates_flow_grpo", "shapes_fixed_rates")
    runs = {
        name: by_seed
        for file in files
        for name, by_seed in compared(work / file.removeprefix("shapes_"), file, allow_failed=True).items()
    }
    evaluations: dict[str, dict[str, dict[str, Evaluations]]] = {}
    records: list[PromptRecord] = []
    for name, by_seed in runs.items():
        method, rate = split_rate(name)
        own = evaluations.setdefault(method, {}).setdefault(rate, {})
        for seed, run in by_seed.items():
            own[str(seed)] = from_start(run)
            if rate.startswith("from"):
                records += change_records(method, rate, seed, own[str(seed)], has_failed(run))
    records.sort(key=lambda record: record.name)
    claim = (
        "With learning_rate: auto no run's last evaluation is more than 0.03 below its first, the noise of an"
        " evaluation, from first rates over a range of 100 (held-out strict accuracy after 4 minutes)"
    )
    header = head(claim, "python scripts/benchmarks/proofs.py learning_rates")
    more = {"arrivals": arrivals(evaluations), "evaluations": evaluations, **about(runs)}
    write_results(RESULTS, "learning_rates_shapes", {**header, **more}, records)


def split_rate(name: str) -> tuple[str, str]:
    """Divide the name of a run into its method and its rate, as in prdp and from-1e-3."""
    method, kind, rate = name.partition("-from-") if "-from-" in name else name.partition("-fixed-")
    return method, kind.strip("-") + "-" + rate


def change_records(name: str, arm: str, seed: int, run: Evaluations, failed: bool) -> list[PromptRecord]:
    """The score of one run at its first and its last evaluation, and whether it fell in between.

    When a run fell is what ``fell`` says, a rule that was fixed before any run.

    Args:
        name: The name of the rows.
        arm: What tells the run from others of its name and seed.
        seed: The seed of the training.
        run: The evaluations, beginning with the untrained model's.
        failed: Whether the run stopped during its training, which counts as a fall.
    """
    change, falls = "strict, first evaluation to last", "runs that ended more than 0.03 below their start, or failed"
    return [
        PromptRecord(name, change, seed, "all", arm, run[0][2], run[-1][2], 1),
        PromptRecord(f"{name}.fell", falls, seed, "all", arm, 0.0, float(failed or fell(run)), 1),
    ]


def fell(run: Sequence[Sequence[float]]) -> bool:
    """Whether the last evaluation of a run is more than ``NOISE`` below its first.

    Evaluations of one model differ by up to that. Their own interval is over prompts and much wider, but both
    evaluations are of the same prompts and noises.
    """
    return run[-1][2] < run[0][2] - NOISE


def arrivals(runs: Mapping[str, Mapping[str, Mapping[str, Evaluations]]]) -> dict[str, Any]:
    """When each method has made 90 % of the best gain of its runs, by ``auto`` and by fixed rates.

    The gain is from the mean of the first evaluations to the best of the last ones. "literal" is the race to 90 % of
    that best score itself, which may lie below the start.

    Args:
        runs: The evaluations by method, rate and seed, beginning with the untrained model's; the names of fixed rates
            begin with "fixed".

    Returns:
        By method: the start, the best final score, the target and what ``race`` says of it. Where no run gained
        anything there is no target, and all of the race is null.
    """
    table = {}
    for method, rates in runs.items():
        every = [run for by_seed in rates.values() for run in by_seed.values()]
        start, best = statistics.fmean(run[0][2] for run in every), max(run[-1][2] for run in every)
        target = start + REACHED * (best - start) if best > start else None
        own = {"start": start, "best": best, **race(rates, target)}
        table[method] = own | {"literal": race(rates, REACHED * best)}
    return without_infinities(table)


def race(rates: Mapping[str, Mapping[str, Evaluations]], target: float | None) -> dict[str, Any]:
    """Time the runs of a method to a target.

    Args:
        rates: The evaluations by rate and seed.
        target: The score to reach; None where there is none.

    Returns:
        The target, the median seconds of ``auto`` over rates and seeds, the best fixed rate with its seconds, and the
        ratio of both. Seconds are 0 for a run that is at the target from the start, and infinite for one that never
        reaches it. So is the ratio where ``auto`` never arrives, or where only the fixed rate is there from the start;
        it is 1 where both are, and 0 where no fixed rate arrives.
    """
    if target is None:
        return dict.fromkeys(("target", "auto", "best_rate", "fixed", "ratio"))
    times = {rate: [arrival(run, target) for run in by_seed.values()] for rate, by_seed in rates.items()}
    fixed = {rate: min(own) for rate, own in times.items() if rate.startswith("fixed")}
    best = min(fixed, key=lambda rate: fixed[rate])
    auto = statistics.median(time for rate, own in times.items() if rate not in fixed for time in own)
    ratio = np.inf
    if auto == fixed[best] == 0:
        ratio = 1.0
    elif np.isfinite(auto) and fixed[best]:
        ratio = auto / fixed[best]
    return {"target": target, "auto": auto, "best_rate": best, "fixed": fixed[best], "ratio": ratio}


def arrival(run: Evaluations, target: float) -> float:
    """The seconds of training at which the score first reaches a target, between two evaluations on a straight line."""
    if run[0][2] >= target:
        return run[0][1]
    for (_, earlier, low, *_), (_, later, high, *_) in pairwise(run):
        if high >= target:
            return earlier + (target - low) / (high - low) * (later - earlier)
    return np.inf


def prompt_counts(work: Path) -> None:
    """PRDP and DDPO on 1, 100 and all training prompts: how their scores change, and which runs fall."""
    folder, train = work / "prompt_counts", shapes.prompts("train")
    hardest_first = PromptSet(train.name, train.prompts[::-1])  # a single prompt has two objects and two colors
    for count in (1, 100):
        lines = [json.dumps(prompt.metadata) + "\n" for prompt in drawn_in_turn(hardest_first, count, seed=0)]
        write_text(folder / f"prompts-{count}.jsonl", "".join(lines))
    runs = compared(folder / "runs", "shapes_prompt_counts", allow_failed=True)
    evaluations = {name: {str(seed): from_start(run) for seed, run in own.items()} for name, own in runs.items()}
    records: list[PromptRecord] = []
    for name, by_seed in runs.items():
        for seed, run in by_seed.items():
            records += change_records(name, "the whole run", seed, evaluations[name][str(seed)], has_failed(run))
            first, *rewards = (row["reward"] for row in metrics(run))
            last = statistics.fmean([first, *rewards][-LAST_ROUNDS:])
            metric = f"training reward, first round to mean of the last {LAST_ROUNDS}"
            records.append(PromptRecord(f"{name}.reward", metric, seed, "all", "the whole run", first, last, 1))
    records.sort(key=lambda record: record.name)
    claim = (
        "Strict accuracy on val prompts (ODE, 10 steps) at the first and the last evaluation, and the training reward,"
        " of 6 minutes at a fixed learning rate of 3e-3 on 1, 100 and all training prompts"
    )
    header = head(claim, "python scripts/benchmarks/proofs.py prompt_counts")
    write_results(RESULTS, "prompt_counts_shapes", {**header, "evaluations": evaluations, **about(runs)}, records)


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
