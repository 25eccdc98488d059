"""Rewards that are learned from preferences in the shapes world: how far they can be optimized, and what tells before.

The verifier's partial credit judges pairs of the base model's samples, and a share of its labels is flipped; a reward
is learned from them, and optimized by best-of-n, Flow-GRPO and DRAGON. The truth, strict accuracy on held-out prompts,
is drawn against the distance from the base model. All runs end at the same NFE, and their weights are the best by the
reward that is optimized, on val prompts.

The plan, in minutes of two cores (seeds 91 to 93; settings are fixed on seed 100 and ``val`` before, apart from this
budget, by ``reward_pilots.py turn``):

| what | minutes |
|---|---|
| 23,300 samples of training prompts, 650 of val, 3,840 of comp; their labels | 25 |
| 7 rewards and 1 ensemble, 3 seeds; their measures | 48 |
| Flow-GRPO on the 7 rewards, on CLIP and on the verifier, 3 seeds of 90,000 NFE | 9 x 3 x 5.75 = 155 |
| DRAGON at 1,000 pairs | 3 x 5.75 = 17 |
| guards at 1,000 pairs: KL, PAR, the ensemble's mean, minimum, and mean less deviation | 5 x 3 x 5.75 = 86 |
| a guard more, early stopping: read off the runs without a guard | 0 |
| PAR's references: four samples of each prompt | 3 x 5 = 15 |

That is 5.8 hours. Where it takes longer, arms go before seeds: DRAGON, then PAR, then KL.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import torch

from genalign.evaluation.records import PromptRecord, mean
from genalign.metrics.intervals import jackknife
from genalign.reward_learning.item_scores import ScoreFile
from genalign.reward_learning.measures import expected_best
from genalign.runtime.files import without_infinities
from scripts.benchmarks.learned_rewards import (
    LEARNED,
    POOLED,
    SEEDS,
    SHAPES,
    Proxy,
    Setting,
    learned,
    measured,
    optimized,
    pooled,
    run_with,
    val_looks,
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

Curve = list[list[float]]
"""The evaluations of a run on val prompts: distance from the base model, reward, truth and its interval."""


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
    runs |= {guard: guarded(work, guard, rewards) for guard in GUARDS}

    curves = {name: {seed: curve(run) for seed, run in by_seed.items()} for name, by_seed in runs.items()}
    records = [record for name, own in measures.items() for record in best_of_n_records(f"best_of_n.{name}", own)]
    records += _gains(runs) + turns(curves)
    contents = {name: {seed: _content(folder) for seed, folder in own.items()} for name, own in measures.items()}
    by_n = {name: {str(seed): one["best_of_n"] for seed, one in own.items()} for name, own in contents.items()}
    drawn = without_infinities({**curves, "early_stop": stopped_early(curves[UNGUARDED.name])})
    claim = (
        "Held-out strict accuracy while rewards that were learned from pairs are optimized, by the number of pairs and"
        " the share of flipped labels"
    )
    header = head(claim, "python scripts/benchmarks/proofs.py overoptimization")
    more = {"curves": drawn, "best_of_n": by_n, "measures": _measure_table(contents, runs)}
    sorted_records = sorted(records, key=lambda record: record.name)
    write_results(RESULTS, "overoptimization_shapes", {**header, **more}, sorted_records)


# Training with guards


def guarded(work: Path, guard: str, rewards: Mapping[str, Mapping[int, Setting]]) -> dict[int, Path]:
    """Train with a guard on the reward of ``UNGUARDED``, or on the ensemble of as many pairs."""
    if guard.startswith("ensemble"):
        pool = guard.removeprefix("ensemble_")
        return optimized(work, SHAPES, guard, pooled(rewards[ENSEMBLE.name], pool))
    single = rewards[UNGUARDED.name]
    recipe = SHAPES.settings()["recipe"]
    if guard == "kl":
        with_kl = {**recipe, "init_args": {**recipe["init_args"], "kl": 1.0}}
        return optimized(work, SHAPES, guard, single, {"recipe": with_kl})
    shaped = {seed: _preference_as_reward(work, seed, reward) for seed, reward in single.items()}
    credit = {"class_path": "genalign.algorithms.credit.LeaveOneOut", "init_args": {"scale": 2.0}}
    with_credit = {"class_path": "genalign.with_credit", "init_args": {"recipe": recipe, "credit": credit}}
    return optimized(work, SHAPES, guard, shaped, {"recipe": with_credit}, scorers=single)


def _preference_as_reward(work: Path, seed: int, reward: Setting) -> Setting:
    """PAR around a reward, with the scores of base samples of all prompts of a run, those of its evaluations too."""
    references = work / "references" / f"seed-{seed}.json"
    if not references.exists():
        settings = {
            "rewards": {LEARNED: {"function": reward}},
            "held_out": val_looks(SHAPES),
            "samples": 4,
            "output": str(references),
        }
        run_with(
            "reward", "references", settings=settings, file=references.with_suffix(".config.json"), base=SHAPES.base
        )
    arguments = {"reward": reward, "references": str(references)}
    return {"class_path": "rewards.shaped.PreferenceAsReward", "init_args": arguments}


# What came of it


def curve(run: Path) -> Curve:
    """The evaluations of a run: its distance from the base model, the reward, and the truth with its interval.

    The distance is the square root of the KL of a trained step from that of the base model, in a latent's dimension;
    of DRAGON, that of the mean squared change of predictions. A round measures it on one batch, at a window of steps
    that is drawn, before its updates: it is averaged over the rounds since the evaluation before.
    """
    points, since, distance = Curve(), list[float](), 0.0
    for row in metrics(run):
        since += [] if row["kl"] is None else [max(row["kl"], 0.0)]
        if row["held_out"]:
            distance, since = math.sqrt(mean(since)) if since else distance, []
            strict, reward = row["held_out"]["strict"], row["held_out"][LEARNED]["mean"]
            points.append([distance, reward, strict["mean"], strict["low"], strict["high"]])
    return points


def stopped_early(curves: Mapping[int, Curve]) -> dict[int, Curve]:
    """The curves of runs that would have stopped before the distance at which the other runs are at their best.

    The truth of the other seeds, on val, says how far a reward of this kind can be optimized: the limit of a run is the
    mean of the distances at which theirs is highest. Its curve ends at the last evaluation before it goes beyond.

    Args:
        curves: The evaluations of each of several seeds, as ``curve`` gives them.
    """
    best = {seed: turn_of(points) for seed, points in curves.items()}
    stopped = dict[int, Curve]()
    for seed, points in curves.items():
        limit = mean(distance for other, distance in best.items() if other != seed)
        beyond = next((place for place, point in enumerate(points) if point[0] > limit), len(points))
        stopped[seed] = points[: max(beyond, 1)]
    return stopped


def turn_of(points: Curve) -> float:
    """The distance at which the truth of a run is highest."""
    return max(points, key=lambda point: point[2])[0]


def turns(curves: Mapping[str, Mapping[int, Curve]]) -> list[PromptRecord]:
    """Where the truth of each arm is highest, what it loses afterwards, and how far each guard moves that point.

    What a run loses is counted from where the other seeds say that it should stop: its own highest evaluation is high
    by luck, too. All of it is on val, where the curves are measured.

    Args:
        curves: The evaluations of the runs of each arm, by seed.
    """
    whole, unguarded, records = ("all", "the run"), curves[UNGUARDED.name], list[PromptRecord]()
    for name, own in curves.items():
        stopped = stopped_early(own)
        kind = "change of predictions" if name == "dragon" else "square root of the KL"
        for seed, points in own.items():
            last, there = points[-1][2], stopped[seed][-1][2]
            lost = "strict at the other seeds' turn - at the end"
            records.append(PromptRecord(f"{name}.lost", lost, seed, *whole, last, there, 1))
            turn = f"{kind} where strict is highest"
            records.append(PromptRecord(f"{name}.turn", turn, seed, *whole, 0.0, turn_of(points), 1))
    for guard in GUARDS:
        for seed, points in curves[guard].items():
            metric, before = f"turn, {guard} - unguarded", turn_of(unguarded[seed])
            records.append(PromptRecord(f"{guard}.turn_difference", metric, seed, *whole, before, turn_of(points), 1))
    for seed, points in stopped_early(unguarded).items():
        metric, before = "strict, early_stop - unguarded", unguarded[seed][-1][2]
        records.append(PromptRecord("early_stop.difference", metric, seed, *whole, before, points[-1][2], 1))
    return records


def _gains(runs: Mapping[str, Mapping[int, Path]]) -> list[PromptRecord]:
    """The gains of training in strict accuracy, and what each guard changed of it."""
    records: list[PromptRecord] = []
    for name, by_seed in runs.items():
        records += arm_gains(f"flow_grpo.{name}" if name != "dragon" else name, "strict", "strict", by_seed)
    for guard in GUARDS:
        metric = f"strict, {guard} - unguarded"
        records += differences(f"{guard}.difference", metric, "strict", runs[UNGUARDED.name], runs[guard])
    return records


def best_of_n_records(name: str, measures: Mapping[int, Path]) -> list[PromptRecord]:
    """The truth of one sample of the pool and of the best of all by a reward, by seed and prompt.

    Args:
        name: The name of the records.
        measures: The folder of ``measured`` of each seed.
    """
    tasks = {prompt.text: prompt.task for prompt in SHAPES.prompts("comp").prompts}
    records: list[PromptRecord] = []
    for seed, folder in measures.items():
        values = ScoreFile(folder / "scores.jsonl").values
        by_prompt: dict[str, list[tuple[float, float]]] = {}
        for (scorer, *key), truth in values.items():
            if scorer == "truth":
                by_prompt.setdefault(key[1], []).append((values[("reward", *key)], truth))
        for prompt, samples in by_prompt.items():
            scores, truths = torch.tensor(samples, dtype=torch.float64).unbind(1)
            expected = expected_best(scores, truths, len(samples))
            before, after = float(expected[0]), float(expected[-1])
            metric = f"strict, best of {POOLED}"
            records.append(PromptRecord(name, metric, seed, tasks[prompt], prompt, before, after, len(samples)))
    return records


def _content(folder: Path) -> dict[str, Any]:
    """Read the evaluation of a reward in a folder of ``measured``."""
    content: dict[str, Any] = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    return content


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
