"""Rewards that are learned from preferences in the shapes world: how far they can be optimized, and what tells before.

The verifier's partial credit judges pairs of the base model's samples, and a share of its labels is flipped; a reward
is learned from them, and optimized by best-of-n, Flow-GRPO and DRAGON. The truth, strict accuracy on held-out prompts,
is drawn against the distance from the base model.

The plan, in minutes of two cores (seeds 91 to 93; settings are fixed on seed 100 and ``val`` before, apart from this
budget):

| what | minutes |
|---|---|
| 20,640 samples of training prompts, 776 of val, 3,840 of comp; their labels | 20 |
| 7 rewards and 1 ensemble, 3 seeds; their measures | 30 |
| Flow-GRPO on the 7 rewards, on CLIP and on the verifier, 3 seeds of 4 minutes | 9 x 3 x 4.7 = 127 |
| DRAGON at 1,000 pairs | 3 x 4.7 = 14 |
| guards at 1,000 pairs: KL, PAR, the ensemble's mean, minimum, and mean less deviation | 5 x 3 x 4.7 = 70 |
| a guard more, early stopping: read off the runs without a guard | 0 |
| PAR's references: four samples of each prompt | 3 x 3 = 9 |

That is 4.5 hours. Where it takes longer, arms go before seeds: DRAGON, then PAR, then KL.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy

from genalign.evaluation.records import PromptRecord
from genalign.metrics.intervals import jackknife
from genalign.runtime.files import without_infinities
from scripts.benchmarks.learned_rewards import (
    POOLED,
    POOLED_PROMPTS,
    SEEDS,
    SHAPES,
    Proxy,
    Setting,
    learned,
    measured,
    optimized,
    run_with,
)
from scripts.benchmarks.published_results import write_results
from scripts.benchmarks.trained_runs import RESULTS, arm_gains, differences, head, metrics

CLIP = {"class_path": "rewards.clip.ClipReward", "init_args": {"model": "shapes-clip"}}
GUARDS = ("kl", "par", "ensemble_mean", "ensemble_min", "ensemble_mean_minus_std")


PROXIES = (
    *(Proxy(size, 0.1) for size in (100, 1000, 10_000, 30_000)),
    *(Proxy(1000, flips) for flips in (0.0, 0.2, 0.4)),
)
UNGUARDED = Proxy(1000, 0.1)
ENSEMBLE = Proxy(1000, 0.1, members=4)


def overoptimization(work: Path) -> None:
    """Optimize rewards that were learned from few and noisy pairs, and find where the truth turns."""
    rewards = {proxy.name: learned(work, SHAPES, proxy) for proxy in (*PROXIES, ENSEMBLE)}
    measures = {
        name: {seed: measured(work, SHAPES, name, seed, own[seed]) for seed in SEEDS} for name, own in rewards.items()
    }
    measures["clip"] = {seed: measured(work, SHAPES, "clip", seed, CLIP) for seed in SEEDS[:1]}
    runs = {proxy.name: optimized(work, SHAPES, proxy.name, rewards[proxy.name]) for proxy in PROXIES}
    runs["clip"] = optimized(work, SHAPES, "clip", dict.fromkeys(SEEDS, CLIP))
    runs["verifier"] = optimized(work, SHAPES, "verifier", dict.fromkeys(SEEDS, SHAPES.score("partial")))
    dragon = {"recipe": {"class_path": "genalign.dragon", "init_args": {"loss": "dpo", "beta": 100.0, "draws": 6}}}
    runs["dragon"] = optimized(work, SHAPES, "dragon", rewards[UNGUARDED.name], dragon)
    runs |= {guard: _guarded(work, guard, rewards) for guard in GUARDS}

    curves = {name: {seed: curve(run) for seed, run in by_seed.items()} for name, by_seed in runs.items()}
    curves["early_stop"] = stopped_early(curves[UNGUARDED.name])
    records = _records(measures, runs, curves)
    by_n = {name: {str(seed): one["best_of_n"] for seed, one in own.items()} for name, own in measures.items()}
    claim = (
        "Held-out strict accuracy while rewards that were learned from pairs are optimized, by the number of pairs and"
        " the share of flipped labels"
    )
    header = head(claim, "python scripts/benchmarks/proofs.py overoptimization")
    more = {"curves": without_infinities(curves), "best_of_n": by_n, "measures": _measure_table(measures, runs)}
    write_results(RESULTS, "overoptimization_shapes", {**header, **more}, records)


def _records(
    measures: Mapping[str, Mapping[int, Mapping[str, Any]]],
    runs: Mapping[str, Mapping[int, Path]],
    curves: Mapping[str, Mapping[int, Sequence[Sequence[float]]]],
) -> list[PromptRecord]:
    """The truth of the best of a pool, the gains of training, what was lost again, and what guards changed."""
    records: list[PromptRecord] = []
    for name, measured_by_seed in measures.items():
        for seed, content in measured_by_seed.items():
            records += best_of_n_records(f"best_of_n.{name}", seed, content)
    for name, by_seed in runs.items():
        records += arm_gains(f"flow_grpo.{name}" if name != "dragon" else name, "strict", "strict", by_seed)
    for name, own in curves.items():
        for seed, points in own.items():
            truths, metric = [point[2] for point in points], "strict lost since the best"
            records.append(PromptRecord(f"{name}.lost", metric, seed, "all", "the run", truths[-1], max(truths), 1))
    for guard in GUARDS:
        metric = f"strict, {guard} - unguarded"
        records += differences(f"{guard}.difference", metric, "strict", runs[UNGUARDED.name], runs[guard])
    for seed, points in curves["early_stop"].items():  # on val, where the curves are measured
        last, stopped, metric = curves[UNGUARDED.name][seed][-1][2], points[-1][2], "strict, early_stop - unguarded"
        records.append(PromptRecord("early_stop.difference", metric, seed, "all", "the run", last, stopped, 1))
    return sorted(records, key=lambda record: record.name)


# Training with guards


def _guarded(work: Path, guard: str, rewards: Mapping[str, Mapping[int, Setting]]) -> dict[int, Path]:
    """Train with a guard on the reward of ``UNGUARDED``, or on the ensemble of as many pairs."""
    if guard.startswith("ensemble"):
        pool = guard.removeprefix("ensemble_")
        pooled = {
            seed: {**reward, "init_args": {**reward["init_args"], "pool": pool}}
            for seed, reward in rewards[ENSEMBLE.name].items()
        }
        return optimized(work, SHAPES, guard, pooled)
    single = rewards[UNGUARDED.name]
    recipe = SHAPES.settings()["recipe"]
    if guard == "kl":
        return optimized(
            work, SHAPES, guard, single, {"recipe": {**recipe, "init_args": {**recipe["init_args"], "kl": 1.0}}}
        )
    shaped = {}
    for seed, reward in single.items():
        references = work / "references" / f"seed-{seed}.json"
        settings = {"rewards": {"learned": {"function": reward}}, "samples": 4, "output": str(references)}
        if not references.exists():
            file = references.with_suffix(".config.json")
            run_with("reward", "references", settings=settings, file=file, base=SHAPES.base)
        arguments = {"reward": reward, "references": str(references)}
        shaped[seed] = {"class_path": "rewards.shaped.PreferenceAsReward", "init_args": arguments}
    credit = {"class_path": "genalign.algorithms.credit.LeaveOneOut", "init_args": {"scale": 2.0}}
    with_credit = {"class_path": "genalign.with_credit", "init_args": {"recipe": recipe, "credit": credit}}
    return optimized(work, SHAPES, guard, shaped, {"recipe": with_credit})


# What came of it


def curve(run: Path) -> list[list[float]]:
    """The evaluations of a run: its distance from the base model, the reward, and the truth with its interval.

    The distance is the square root of the KL of a trained step from that of the base model, in a latent's dimension.
    """
    points, kl = list[list[float]](), 0.0
    for row in metrics(run):
        kl = kl if row["kl"] is None else row["kl"]
        if row["held_out"]:
            strict, distance = row["held_out"]["strict"], math.sqrt(max(kl, 0.0))
            points.append([distance, row["held_out"]["learned"]["mean"], strict["mean"], strict["low"], strict["high"]])
    return points


def stopped_early(curves: Mapping[int, list[list[float]]]) -> dict[int, list[list[float]]]:
    """The curves of runs that would have stopped before the distance at which the other runs are at their best.

    The truth of the other seeds, on val, says how far a reward of this kind can be optimized: the limit of a run is the
    mean of the distances at which theirs is highest. Its curve ends at the last evaluation before it goes beyond.

    Args:
        curves: The evaluations of each of several seeds, as ``curve`` gives them.
    """
    best = {seed: max(points, key=lambda point: point[2])[0] for seed, points in curves.items()}
    stopped = dict[int, list[list[float]]]()
    for seed, points in curves.items():
        others = [distance for other, distance in best.items() if other != seed]
        limit = sum(others) / len(others)
        beyond = next((place for place, point in enumerate(points) if point[0] > limit), len(points))
        stopped[seed] = points[: max(beyond, 1)]
    return stopped


def best_of_n_records(name: str, seed: int, content: Mapping[str, Any]) -> list[PromptRecord]:
    """The truth of one sample, and of the best of all by the reward, as one record: prompts are joined there."""
    first, last = content["best_of_n"][0]["truth"]["mean"], content["best_of_n"][-1]["truth"]["mean"]
    return [PromptRecord(name, f"strict, best of {POOLED}", seed, "all", "the pool", first, last, POOLED_PROMPTS)]


def _measure_table(
    measures: Mapping[str, Mapping[int, Mapping[str, Any]]], runs: Mapping[str, Mapping[int, Path]]
) -> dict[str, Any]:
    """The measures of each reward beside the gain of training on it, and how well each orders the rewards."""
    rows = []
    for name, by_seed in measures.items():
        for seed, run in runs.get(name, {}).items():
            gain = json.loads((run / "gain.json").read_text(encoding="utf-8"))["gain"]["strict"]["mean"]
            content = by_seed.get(seed) or next(iter(by_seed.values()))
            values = {key: value["mean"] for key, value in content["measures"].items()}
            rows.append({"reward": name, "seed": seed, "gain": gain, "measures": values})
    return {"rewards": rows, "predictors": predictors(rows)}


def predictors(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How each measure of rewards orders the gains of training on them.

    Args:
        rows: For each reward and seed the "gain", and the "measures" by name.

    Returns:
        By measure that every row has: Kendall's tau-b with the gain, with its jackknife interval over the rewards,
        each with all of its seeds.
    """
    shared = set.intersection(*({name for name, value in row["measures"].items() if value is not None} for row in rows))
    rewards = list(dict.fromkeys(row["reward"] for row in rows))
    table = {}
    for measure in sorted(shared):
        whole = _tau(rows, measure)
        if not math.isfinite(whole):
            continue
        left_out = [_tau([row for row in rows if row["reward"] != reward], measure) for reward in rewards]
        table[measure] = jackknife(whole, left_out).as_dict()
    plain: dict[str, Any] = without_infinities(table)
    return plain


def _tau(rows: Sequence[Mapping[str, Any]], measure: str) -> float:
    values, gains = np.array([[row["measures"][measure], row["gain"]] for row in rows]).T
    return float(scipy.stats.kendalltau(values, gains).statistic)
