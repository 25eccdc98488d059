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

That is 4.4 hours. Where it takes longer, arms go before seeds: DRAGON, then PAR, then KL.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import yaml

from genalign.diffusion.noise import derived_seed
from genalign.evaluation.records import PromptRecord
from genalign.metrics.intervals import jackknife
from genalign.prompts import drawn_in_turn
from genalign.runtime.files import without_infinities, write_json, write_text
from genalign.worlds import shapes
from scripts.benchmarks.published_results import write_results
from scripts.benchmarks.trained_runs import COMPARISONS, RESULTS, arm_gains, differences, head, metrics, run_genalign

SEEDS = (91, 92, 93)  # of the rewards and of the runs on them
MINUTES = 4  # of a run
GROUP, GROUPS = 4, 3  # samples of a comparison, and comparisons of a training prompt
POOLED_PROMPTS, POOLED = 60, 64  # of best-of-n: prompts, and samples of each
FLIPS = (0.0, 0.1, 0.2, 0.4)
VERIFIER = {"class_path": "rewards.shapes.ShapesReward", "init_args": {"score": "partial"}}
STRICT = {"class_path": "rewards.shapes.ShapesReward", "init_args": {"score": "strict"}}
CLIP = {"class_path": "rewards.clip.ClipReward", "init_args": {"model": "shapes-clip"}}
GUARDS = ("kl", "par", "ensemble_mean", "ensemble_min", "ensemble_mean_minus_std")


@dataclass(frozen=True)
class Proxy:
    """A reward that is learned from ``size`` pairs, of whose labels a share of ``flips`` is wrong."""

    size: int
    flips: float
    members: int = 1

    @property
    def name(self) -> str:
        """The name in results, such as 1000_pairs_10_flipped."""
        ensemble = "ensemble_" if self.members > 1 else ""
        return f"{ensemble}{self.size}_pairs_{round(100 * self.flips)}_flipped"


PROXIES = (
    *(Proxy(size, 0.1) for size in (100, 1000, 10_000, 30_000)),
    *(Proxy(1000, flips) for flips in (0.0, 0.2, 0.4)),
)
UNGUARDED = Proxy(1000, 0.1)
ENSEMBLE = Proxy(1000, 0.1, members=4)


def overoptimization(work: Path) -> None:
    """Optimize rewards that were learned from few and noisy pairs, and find where the truth turns."""
    rewards = {proxy.name: _learned(work, proxy) for proxy in (*PROXIES, ENSEMBLE)}
    measures = {name: {seed: _measured(work, name, seed, own[seed]) for seed in SEEDS} for name, own in rewards.items()}
    measures["clip"] = {seed: _measured(work, "clip", seed, CLIP) for seed in SEEDS[:1]}
    runs = {proxy.name: _optimized(work, proxy.name, rewards[proxy.name]) for proxy in PROXIES}
    runs["clip"] = _optimized(work, "clip", dict.fromkeys(SEEDS, CLIP))
    runs["verifier"] = _optimized(work, "verifier", dict.fromkeys(SEEDS, VERIFIER))
    dragon = {"recipe": {"class_path": "genalign.dragon", "init_args": {"loss": "dpo", "beta": 100.0, "draws": 6}}}
    runs["dragon"] = _optimized(work, "dragon", rewards[UNGUARDED.name], dragon)
    runs |= {guard: _guarded(work, guard, rewards) for guard in GUARDS}

    records: list[PromptRecord] = []
    for name, measured_by_seed in measures.items():
        for seed, measured in measured_by_seed.items():
            records += _best_of_n_records(f"best_of_n.{name}", seed, measured)
    for name, by_seed in runs.items():
        records += arm_gains(f"flow_grpo.{name}" if name != "dragon" else name, "strict", "strict", by_seed)
        for seed, run in by_seed.items():
            best, last = _best_and_last(run)
            lost = PromptRecord(f"{name}.lost", "strict lost since the best", seed, "all", "the run", last, best, 1)
            records.append(lost)
    for guard in GUARDS:
        metric = f"strict, {guard} - unguarded"
        records += differences(f"{guard}.difference", metric, "strict", runs[UNGUARDED.name], runs[guard])
    records.sort(key=lambda record: record.name)
    curves = {name: {str(seed): curve(run) for seed, run in by_seed.items()} for name, by_seed in runs.items()}
    by_n = {name: {str(seed): one["best_of_n"] for seed, one in own.items()} for name, own in measures.items()}
    claim = (
        "Held-out strict accuracy while rewards that were learned from pairs are optimized, by the number of pairs and"
        " the share of flipped labels"
    )
    header = head(claim, "python scripts/benchmarks/proofs.py overoptimization")
    more = {"curves": without_infinities(curves), "best_of_n": by_n, "measures": _measure_table(measures, runs)}
    write_results(RESULTS, "overoptimization_shapes", {**header, **more}, records)


# Data and rewards


def _pairs(work: Path, suite: str, groups: int) -> Path:
    """Collect and label comparisons of the base model; each share of flipped labels is an annotator."""
    folder = work / f"pairs-{suite}"
    base = yaml.safe_load((COMPARISONS / "base_shapes.yaml").read_text(encoding="utf-8"))
    collect = {
        "output": str(folder),
        "models": {"base": {"model": base["model"], "sampling": base["evaluation"] | {"guidance": 1.0}}},
        "prompts": f"shapes:{suite}",
        "group_size": GROUP,
        "comparisons_per_prompt": groups,
        "batch_size": 96,
    }
    noises = {_annotator(flips): {"noise": {"flips": flips}} for flips in FLIPS}
    labeler = "genalign.reward_learning.labeling.RewardLabeler"
    label = {
        "folder": str(folder),
        "kind": "pair",
        "by": {"class_path": labeler, "init_args": {"rewards": {"overall": VERIFIER}, "annotators": noises}},
        "batch_size": 256,
    }
    for name, settings in {"collect": collect, "label": label}.items():
        write_json(folder.with_name(f"{folder.name}-{name}.json"), settings)
        run_genalign("reward", name, "--config", str(folder.with_name(f"{folder.name}-{name}.json")))
    return folder


def _annotator(flips: float) -> str:
    return f"flips-{round(100 * flips)}"


def _subset(folder: Path, proxy: Proxy, seed: int) -> Path:
    """Write the file of a reward's pairs, drawn by ``seed``, in the folder of all."""
    path = folder / f"{proxy.size}-{_annotator(proxy.flips)}-{seed}.jsonl"
    lines = (folder / "preferences.jsonl").read_text(encoding="utf-8").splitlines()
    own = [line for line in lines if json.loads(line)["annotator"] == _annotator(proxy.flips)]
    if len(own) < proxy.size:
        raise ValueError(f"{folder} has {len(own)} pairs, not {proxy.size}: collect more groups")
    drawn = random.Random(derived_seed(seed, "pairs")).sample(own, proxy.size)  # nested for one seed, by size
    write_text(path, "".join(f"{line}\n" for line in drawn))
    return path


def _learned(work: Path, proxy: Proxy) -> dict[int, dict[str, Any]]:
    """Train a reward for each seed, and return them as configurations name them."""
    folder = _pairs(work, "train", GROUPS)
    rewards = {}
    for seed in SEEDS:
        run = work / "rewards" / proxy.name / f"seed-{seed}"
        fit = f"{{members: {proxy.members}, seed: {seed}}}"
        options = ["--preferences", str(_subset(folder, proxy, seed)), "--output", str(run), "--fit", fit]
        if not (run / "reward.safetensors").exists():
            run_genalign("reward", "train", "--config", "scripts/configs/reward/shapes_overoptimized.yaml", *options)
        rewards[seed] = {"class_path": "rewards.learned.LearnedReward", "init_args": {"path": str(run)}}
    return rewards


def _measured(work: Path, name: str, seed: int, reward: Mapping[str, Any]) -> dict[str, Any]:
    """Measure a reward on clean pairs of val prompts, and on many samples of comp prompts; as ``evaluation.json``."""
    output, pairs, pool = work / "measures" / name / f"seed-{seed}", _pairs(work, "val", 1), _pool(work)
    clean = pairs / "clean.jsonl"
    lines = (pairs / "preferences.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    write_text(clean, "".join(line for line in lines if json.loads(line)["annotator"] == _annotator(0.0)))
    if not (output / "evaluation.json").exists():
        settings = {"reward": reward, "preferences": str(clean), "samples": str(pool), "truth": STRICT}
        write_json(output.with_suffix(".json"), {**settings, "output": str(output), "batch_size": 128})
        run_genalign("reward", "evaluate", "--config", str(output.with_suffix(".json")))
    measured: dict[str, Any] = json.loads((output / "evaluation.json").read_text(encoding="utf-8"))
    return measured


def _pool(work: Path) -> Path:
    """Sample many images of comp prompts by the base model, as many prompts of each task."""
    folder, prompts = work / "pool", work / "pool-prompts.jsonl"
    drawn = drawn_in_turn(shapes.prompts("comp"), POOLED_PROMPTS, seed=0)
    write_text(prompts, "".join(json.dumps(prompt.metadata) + "\n" for prompt in drawn))
    base = yaml.safe_load((COMPARISONS / "base_shapes.yaml").read_text(encoding="utf-8"))
    settings = {
        "output": str(folder),
        "model": base["model"],
        "prompts": str(prompts),
        "sampling": base["evaluation"] | {"guidance": 1.0},
        "samples_per_prompt": POOLED,
        "batch_size": 96,
        "references": True,
    }
    write_json(work / "pool.json", settings)
    run_genalign("collect", "--config", str(work / "pool.json"))
    return folder


# Training on the rewards


def _optimized(
    work: Path, name: str, rewards: Mapping[int, Mapping[str, Any]], own: Mapping[str, Any] | None = None
) -> dict[int, Path]:
    """Train on the reward of each seed; the verifier only reports."""
    runs = {}
    for seed, reward in rewards.items():
        run = runs[seed] = work / "runs" / name / f"seed-{seed}"
        if (run / "gain.json").exists():
            continue
        settings = {
            "rewards": {
                "learned": {"function": dict(reward)},
                "strict": {"weight": 0, "function": STRICT},
                "partial": {"weight": 0, "function": VERIFIER},
            },
            "training": {"max_nfe": None, "learning_rate_schedule": "constant", "seed": seed, "rounds": 100_000},
            "max_seconds": 60 * MINUTES,
            "held_out": {"prompts": "shapes:val", "every_seconds": 30, "samples_per_task": 48, "seeds": 1},
            "output": str(run),
            **(own or {}),
        }
        write_json(run.with_suffix(".json"), settings)
        base = str(COMPARISONS / "base_shapes.yaml")
        run_genalign("train", "--config", base, "--config", str(run.with_suffix(".json")))
    return runs


def _guarded(work: Path, guard: str, rewards: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> dict[int, Path]:
    """Train with a guard on the reward of ``UNGUARDED``, or on the ensemble of as many pairs."""
    if guard.startswith("ensemble"):
        pool = guard.removeprefix("ensemble_")
        pooled = {
            seed: {**reward, "init_args": {**reward["init_args"], "pool": pool}}
            for seed, reward in rewards[ENSEMBLE.name].items()
        }
        return _optimized(work, guard, pooled)
    single = rewards[UNGUARDED.name]
    base = yaml.safe_load((COMPARISONS / "base_shapes.yaml").read_text(encoding="utf-8"))
    if guard == "kl":
        recipe = base["recipe"]
        return _optimized(work, guard, single, {"recipe": {**recipe, "init_args": {**recipe["init_args"], "kl": 1.0}}})
    shaped = {}
    for seed, reward in single.items():
        references = work / "references" / f"seed-{seed}.json"
        settings = {"rewards": {"learned": {"function": reward}}, "samples": 4, "output": str(references)}
        if not references.exists():
            write_json(references.with_suffix(".config.json"), settings)
            options = ["--config", str(COMPARISONS / "base_shapes.yaml")]
            run_genalign("reward", "references", *options, "--config", str(references.with_suffix(".config.json")))
        arguments = {"reward": reward, "references": str(references)}
        shaped[seed] = {"class_path": "rewards.shaped.PreferenceAsReward", "init_args": arguments}
    credit = {"class_path": "genalign.algorithms.credit.LeaveOneOut", "init_args": {"scale": 2.0}}
    recipe = {"class_path": "genalign.with_credit", "init_args": {"recipe": base["recipe"], "credit": credit}}
    return _optimized(work, guard, shaped, {"recipe": recipe})


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


def _best_and_last(run: Path) -> tuple[float, float]:
    """The highest and the last held-out truth of a run."""
    values = [point[2] for point in curve(run)]
    return max(values), values[-1]


def _best_of_n_records(name: str, seed: int, measured: Mapping[str, Any]) -> list[PromptRecord]:
    """The truth of one sample, and of the best of all by the reward, as one record: prompts are joined there."""
    first, last = measured["best_of_n"][0]["truth"]["mean"], measured["best_of_n"][-1]["truth"]["mean"]
    return [PromptRecord(name, f"strict, best of {POOLED}", seed, "all", "the pool", first, last, POOLED_PROMPTS)]


def _measure_table(
    measures: Mapping[str, Mapping[int, Mapping[str, Any]]], runs: Mapping[str, Mapping[int, Path]]
) -> dict[str, Any]:
    """The measures of each reward beside the gain of training on it, and how well each orders the rewards."""
    rows = []
    for name, by_seed in measures.items():
        for seed, run in runs.get(name, {}).items():
            gain = json.loads((run / "gain.json").read_text(encoding="utf-8"))["gain"]["strict"]["mean"]
            measured = by_seed.get(seed) or next(iter(by_seed.values()))
            values = {key: value["mean"] for key, value in measured["measures"].items()}
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
