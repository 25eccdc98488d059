"""Learned rewards put to use: beside the verifier, against what they overrate, and as references of Adv-GRPO.

The plan, in minutes of two cores (seeds 91 to 93; settings are fixed on seed 100 and ``val`` before, apart from this
budget; what ``overoptimization`` has made is not made again):

| part | minutes |
|---|---|
| learned_rewards, on shapes: 5 arms of 100,000 NFE | 5 x 3 x 5.2 = 78, and 10 for rewards and pairs |
| overrated: three turns of search, labels and training; Flow-GRPO on the last reward | 60 + 3 x 5.75 = 77 |
| references: Adv-GRPO on references, pruned and plain, beside the verifier alone | 3 x 3 x 5.5, and 25 for both |
| learned_rewards_tones: 5 arms of 100,000 NFE | 5 x 3 x 6 = 90 on the older model, and 20 for rewards and pairs |

That is 5.5 hours. Before learned_rewards, ``scripts/benchmarks/reward_pilots.py smoothing`` and ``falling`` decide
``TRAINING`` here and ``FALLING_FLIPS`` in ``learned_rewards.py``; before learned_rewards_tones, ``tones`` says whether
the verifier gains enough there, about 0.12, for half of it to be told from nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from genalign.evaluation.records import PromptRecord
from scripts.benchmarks.learned_rewards import (
    EQUAL_NFE,
    FALLING_FLIPS,
    LEARNED,
    SEEDS,
    SHAPES,
    SMOOTHED,
    TONES,
    BenchWorld,
    Proxy,
    Setting,
    at_equal_nfe,
    judge,
    judged_pairs,
    learned,
    measured,
    optimized,
    pairs_file,
    pooled,
    run_with,
    trained,
    trained_reward,
    write_prompts,
)
from scripts.benchmarks.overoptimization import UNGUARDED, Curve, best_of_n_records, curve
from scripts.benchmarks.published_results import write_results
from scripts.benchmarks.trained_runs import RESULTS, arm_gains, differences, head, metrics

NOISY, FALLING = Proxy(2000, 0.1), Proxy(100, FALLING_FLIPS)
TRAINING = SMOOTHED  # the configuration that trains these rewards: reward_pilots.py smoothing
FIRST = UNGUARDED  # the first reward of ``overrated``, with whose share of flipped labels every turn is judged
TURNS, SEARCHED, SEARCH_NFE = 3, 240, 160  # turns, prompts that are searched in each, and NFE of a search


# Rewards from noisy pairs


def learned_rewards(work: Path) -> None:
    """What a reward that was learned from noisy pairs brings on shapes, beside the verifier that judged them."""
    _learned_rewards(work, SHAPES, "learned_rewards_shapes", "learned_rewards")


def learned_rewards_tones(work: Path) -> None:
    """What a reward that was learned from noisy pairs brings on tones, beside the verifier that judged them."""
    _learned_rewards(work, TONES, "learned_rewards_tones", "learned_rewards_tones")


def _learned_rewards(work: Path, world: BenchWorld, stem: str, part: str) -> None:
    """Train on the verifier, on single rewards and on ensembles, from many pairs and from too few."""
    rewards: dict[str, dict[int, Setting]] = {"verifier": dict.fromkeys(SEEDS, world.score("partial"))}
    for prefix, proxy in (("", NOISY), ("falling.", FALLING)):
        rewards[f"{prefix}single"] = learned(work, world, proxy, training=TRAINING)
        members = learned(work, world, replace(proxy, members=4), training=TRAINING)
        rewards[f"{prefix}ensemble"] = pooled(members, "min")
    runs, minutes = dict[str, dict[int, Path]](), dict[str, dict[str, dict[str, float]]]()
    for name, own in rewards.items():
        schedule = "constant" if name.startswith("falling") else "linear"
        runs[name] = at_equal_nfe(work, world, f"equal_nfe_{name}", own, schedule)
        minutes[name] = {str(seed): minutes_of(run, own[seed]) for seed, run in runs[name].items()}

    gains = {name: arm_gains(name, "strict", "strict", by_seed) for name, by_seed in runs.items()}
    records = [record for own in gains.values() for record in own]
    records += half_records(gains["verifier"], gains["single"])
    for prefix in ("", "falling."):
        first, second = runs[f"{prefix}single"], runs[f"{prefix}ensemble"]
        metric = "strict, ensemble - single"
        records += differences(f"{prefix}ensemble.difference", metric, "strict", first, second)
    claim = (
        f"Held-out strict accuracy after 100,000 NFE ({world.name}) on a reward that was learned from 2,000 pairs with"
        " 10 % flipped labels, on the least of an ensemble of four, and on the verifier that judged them; and, at a"
        f" constant rate, on a reward that was learned from 100 pairs with {FALLING_FLIPS:.0%} flipped labels, and on"
        " the least of such an ensemble"
    )
    header = head(claim, f"python scripts/benchmarks/proofs.py {part}")
    write_results(RESULTS, stem, {**header, "minutes": minutes}, records)


def minutes_of(run: Path, reward: Setting) -> dict[str, float]:
    """The minutes of a run, of its evaluations before and after, and of learning its reward, if it was learned.

    Of a reward whose training was interrupted, those of its last part; the collection of pairs, which arms share, is
    not among them.
    """
    evaluation = json.loads((run / "before" / "cost.json").read_text(encoding="utf-8"))["seconds"]
    seconds = {"training": metrics(run)[-1]["machine"]["seconds"], "evaluations": 2 * evaluation}
    if path := reward["init_args"].get("path"):
        seconds["reward"] = json.loads((Path(path) / "seconds.json").read_text(encoding="utf-8"))["seconds"]
    return {name: value / 60 for name, value in seconds.items()}


def paired(name: str, metric: str, first: Sequence[PromptRecord], second: Sequence[PromptRecord]) -> list[PromptRecord]:
    """Compare what two lists of records have after training, by seed and prompt; that of ``first`` is before."""
    others = {(record.seed, record.task, record.prompt): record.after for record in second}
    return [
        replace(
            record,
            name=name,
            metric=metric,
            before=record.after,
            after=others[record.seed, record.task, record.prompt],
        )
        for record in first
    ]


def half_records(verifier: Sequence[PromptRecord], single: Sequence[PromptRecord]) -> list[PromptRecord]:
    """Compare the gains of a learned reward with half of those of the verifier, by seed and prompt."""
    half = [replace(record, after=(record.after - record.before) / 2) for record in verifier]
    whole = [replace(record, after=record.after - record.before) for record in single]
    return paired("half", "gain in strict, single - half of the verifier's", half, whole)


# What a reward overrates


def overrated(work: Path) -> None:
    """Search for samples that a reward overrates, let them be judged, and train again, three times."""
    rewards: dict[str, dict[int, Setting]] = {}
    measures: dict[str, dict[int, Path]] = {}
    for seed in SEEDS:
        start = pairs_file(judged_pairs(work, SHAPES, "train"), FIRST, seed)
        judged = {"searched": [start]}
        for turn in range(TURNS + 1):
            for source, files in judged.items():
                name = f"{source}_{turn}"
                reward = trained_reward(work, SHAPES, _stored_as(name), seed, files)
                rewards.setdefault(name, {})[seed] = reward
                measures.setdefault(name, {})[seed] = measured(work, SHAPES, _stored_as(name), seed, reward)
            if turn < TURNS:
                new = judged_turn(work, rewards[f"searched_{turn}"][seed], turn, seed)
                judged = {source: [*judged.get(source, [start]), file] for source, file in new.items()}

    names = "searched_0", f"searched_{TURNS}"
    runs = {name: optimized(work, SHAPES, _stored_as(name), rewards[name]) for name in names}
    best = {name: best_of_n_records(f"best_of_n.{name}", own) for name, own in measures.items()}
    records = [record for own in best.values() for record in own] + overrated_differences(best)
    for name, by_seed in runs.items():
        records += arm_gains(f"flow_grpo.{name}", "strict", "strict", by_seed)
    records += differences("flow_grpo.difference", "strict, after three turns - before", "strict", *runs.values())
    first, last = ({seed: curve(run) for seed, run in by_seed.items()} for by_seed in runs.values())
    records += at_equal_distance("flow_grpo.equal_distance", first, last)
    records.sort(key=lambda record: record.name)
    claim = (
        "The truth of the best of 64 samples by a reward, and after Flow-GRPO on it, as the samples that a search"
        " finds by the reward are judged and learned from, beside as many pairs of plain samples of the same prompts"
    )
    write_results(RESULTS, "overrated_shapes", head(claim, "python scripts/benchmarks/proofs.py overrated"), records)


def _stored_as(name: str) -> str:
    """The name under which a reward is saved, and its runs: the first is that of ``overoptimization``."""
    return FIRST.name if name == "searched_0" else name


def judged_turn(work: Path, reward: Setting, turn: int, seed: int) -> dict[str, Path]:
    """Let what a search by a reward finds be judged against a plain sample, and two plain samples of the same prompts.

    Returns the files of the judgments, "searched" and "random".
    """
    folder, number = work / "overrated" / f"seed-{seed}-turn-{turn}", 1000 * seed + 10 * turn
    write_prompts(folder / "prompts.jsonl", SHAPES.prompts("train"), SEARCHED, seed=number)
    common = {
        "model": SHAPES.settings()["model"],
        "prompts": str(folder / "prompts.jsonl"),
        "sampling": SHAPES.sampling(),
        "samples_per_prompt": 1,
        "references": True,
        "batch_size": 96,
    }
    search = {
        "strategy": {"class_path": "genalign.Prune"},
        "budget": {"nfe": SEARCH_NFE},
        "rewards": {LEARNED: {"function": reward}},
    }
    for place, (name, settings) in enumerate({"found": search, "plain": {}, "other": {}}.items()):
        own = {**common, **settings, "output": str(folder / name), "seed": number + place}
        run_with("collect", settings=own, file=folder / f"{name}.json")
    files = dict[str, Path]()
    for name, sides in {"searched": ("found", "plain"), "random": ("plain", "other")}.items():
        compared = {"output": str(folder / name), "samples": [str(folder / side) for side in sides], "seed": seed}
        run_with("reward", "collect", settings=compared, file=folder / f"{name}-collect.json")
        judge(folder / name, SHAPES, (FIRST.flips,))
        files[name] = folder / name / "preferences.jsonl"
    return files


def overrated_differences(best: dict[str, list[PromptRecord]]) -> list[PromptRecord]:
    """The truth of the best of n after each turn less that before, and less that of as many random pairs, by prompt.

    Args:
        best: The records of the best of n by reward: searched_0, searched_1, ..., random_1, ...
    """
    records, n = list[PromptRecord](), "strict, best of n"
    for turn in range(1, TURNS + 1):
        metric = f"{n}, after turn {turn} - before"
        records += paired(f"searched.turn_{turn}", metric, best["searched_0"], best[f"searched_{turn}"])
    searched, random = best[f"searched_{TURNS}"], best[f"random_{TURNS}"]
    return records + paired("searched.over_random", f"{n}, searched pairs - random pairs", random, searched)


def at_equal_distance(name: str, first: dict[int, Curve], second: dict[int, Curve]) -> list[PromptRecord]:
    """The truth on val of two runs at the largest distance from the base model that both reach, by seed."""
    records = []
    for seed in sorted(first):
        curves = first[seed], second[seed]
        distance = min(max(point[0] for point in points) for points in curves)
        before, after = (
            float(np.interp(distance, *np.array(sorted((point[0], point[2]) for point in points)).T))
            for points in curves
        )
        metric = "strict at an equal distance, after three turns - before"
        records.append(PromptRecord(name, metric, seed, "all", "the run", before, after, 1))
    return records


# References of Adv-GRPO


def references(work: Path) -> None:
    """Adv-GRPO on references of the base model, pruned and plain, beside the verifier alone."""
    prompts = work / "adversarial-prompts.jsonl"
    write_prompts(prompts, SHAPES.prompts("train"), SEARCHED, seed=0)
    runs = {}
    for name in ("verifier", "plain_references", "pruned_references"):
        rewards: dict[str, Setting] = {score: {"function": SHAPES.score(score)} for score in ("partial", "strict")}
        if name != "verifier":
            folder = _reference_folder(work, prompts, pruned=name == "pruned_references")
            rewards["real"] = {"weight": 0.5, "function": _tuned_on(folder)}
        own = {"rewards": rewards, "prompts": str(prompts), "training": EQUAL_NFE}
        runs[name] = {seed: trained(work, SHAPES, f"adv_grpo_{name}", seed, own) for seed in SEEDS}
    records = [record for name, by_seed in runs.items() for record in arm_gains(name, "strict", "strict", by_seed)]
    for name, first, second in (
        ("pruned_references.difference", "verifier", "pruned_references"),
        ("plain_references.difference", "verifier", "plain_references"),
        ("pruning.difference", "plain_references", "pruned_references"),
    ):
        metric = f"strict, {second} - {first}".replace("_", " ")
        records += differences(name, metric, "strict", runs[first], runs[second])
    claim = (
        "Adv-GRPO on references of the base model, that pruning found and plain ones, beside the same run without a"
        " reward of references"
    )
    write_results(RESULTS, "references_shapes", head(claim, "python scripts/benchmarks/proofs.py references"), records)


def _reference_folder(work: Path, prompts: Path, pruned: bool) -> Path:
    """Collect eight references of each prompt, the best of a search by the verifier or plain samples."""
    folder = work / ("adversarial-references" if pruned else "adversarial-plain-references")
    search = {
        "rewards": {"partial": {"function": SHAPES.score("partial")}},
        "strategy": {"class_path": "genalign.Prune", "init_args": {"steps": [3, 6], "keep": [0.5, 0.5]}},
        "budget": {"nfe": 60},
    }
    settings = {
        "output": str(folder),
        "model": SHAPES.settings()["model"],
        "prompts": str(prompts),
        "sampling": SHAPES.sampling(),
        "samples_per_prompt": 8,
        "references": True,
        "batch_size": 96,
        **(search if pruned else {}),
    }
    run_with("collect", settings=settings, file=folder.with_name(f"{folder.name}.json"))
    return folder


def _tuned_on(folder: Path) -> Setting:
    """The reward of Adv-GRPO that is tuned to tell a folder's references from samples."""
    reader = "rewards.backbones.reference_images.ReferencesByPrompt.read"
    own = {
        "model": "shapes-clip",
        "references": {"class_path": reader, "init_args": {"folder": str(folder)}},
        "update_rule": {"class_path": "rewards.adversarial.Ratio"},
        "learning": {"loss": "bt_pairwise", "learning_rate": 2.0e-5, "steps_per_update": 3},
    }
    return {"class_path": "rewards.adversarial.TunedClipReward", "init_args": own}
