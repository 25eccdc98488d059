"""Learned rewards put to use: beside the verifier, against what they overrate, and as references of Adv-GRPO.

The plan, in minutes of two cores (seeds 91 to 93; settings are fixed on seed 100 and ``val`` before, apart from this
budget; what ``overoptimization`` has made is not made again):

| part | minutes |
|---|---|
| learned, on shapes and on tones: single, ensemble and verifier, 100,000 NFE | 2 x 3 x 3 x 6 = 108, and 20 for pairs |
| overrated: three turns of search, labels and training; Flow-GRPO on the first and the last reward | 30 + 2 x 3 x 4.7 |
| references: Adv-GRPO on references of the pruned base model, beside the verifier alone | 2 x 3 x 5.5, and 5 for them |

That is 3.7 hours.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

from genalign.evaluation.records import PromptRecord
from genalign.reward_learning.preferences import append_judgments, read_judgments
from genalign.runtime.files import write_text
from scripts.benchmarks.learned_rewards import (
    GROUPS,
    SEEDS,
    SHAPES,
    TONES,
    Proxy,
    Setting,
    drawn_pairs,
    judge,
    judged_pairs,
    learned,
    measured,
    optimized,
    run_with,
    trained_reward,
    write_prompts,
)
from scripts.benchmarks.overoptimization import best_of_n_records
from scripts.benchmarks.published_results import write_results
from scripts.benchmarks.trained_runs import RESULTS, arm_gains, differences, head

NOISY = Proxy(2000, 0.1)
START, FLIPS = 1000, 0.1  # pairs of the first reward of ``overrated``, and the share of flipped labels in every turn
TURNS, SEARCHED, CANDIDATES = 3, 240, 16  # turns, prompts that are searched in each, and candidates of a prompt
EQUAL_NFE = {"max_nfe": 100_000, "learning_rate_schedule": "linear"}


def learned_rewards(work: Path) -> None:
    """What a reward that was learned from noisy pairs brings, beside the verifier that judged them."""
    records: list[PromptRecord] = []
    for world in (SHAPES, TONES):
        rewards = {
            "single": learned(work, world, NOISY),
            "ensemble": {
                seed: {**one, "init_args": {**one["init_args"], "pool": "min"}}
                for seed, one in learned(work, world, replace(NOISY, members=4)).items()
            },
            "verifier": dict.fromkeys(SEEDS, world.score("partial")),
        }
        runs = {}
        for name, own in rewards.items():
            runs[name] = {
                seed: optimized(work, world, f"equal_nfe_{name}", {seed: reward}, _equal_nfe(seed))[seed]
                for seed, reward in own.items()
            }
            records += arm_gains(f"{world.name}.{name}", "strict", "strict", runs[name])
        metric = "strict, ensemble - single"
        records += differences(f"{world.name}.difference", metric, "strict", runs["single"], runs["ensemble"])
    claim = (
        "Held-out strict accuracy after 100,000 NFE on a reward that was learned from 2,000 pairs with 10 % flipped"
        " labels, on the least of an ensemble of four, and on the verifier that judged them"
    )
    write_results(
        RESULTS, "learned_rewards", head(claim, "python scripts/benchmarks/proofs.py learned_rewards"), records
    )


def _equal_nfe(seed: int) -> Setting:
    """The settings of a run to a number of NFE, with one look at its end."""
    return {"training": {**EQUAL_NFE, "rounds": 100_000, "seed": seed}, "max_seconds": None, "held_out": {}}


# What a reward overrates


def overrated(work: Path) -> None:
    """Search for samples that a reward overrates, let them be judged, and train again, three times."""
    records: list[PromptRecord] = []
    rewards: dict[str, dict[int, Setting]] = {}
    for seed in SEEDS:
        folder = judged_pairs(work, SHAPES, "train", GROUPS)
        pairs = drawn_pairs(folder, START + TURNS * SEARCHED, FLIPS, seed)
        searched = pairs[:START]
        for turn in range(TURNS + 1):
            count = START + turn * SEARCHED  # the same number of pairs, of random samples
            for name, own in {"searched": searched, "random": pairs[:count]}.items():
                file = folder / f"{name}-{turn}-{seed}.jsonl"
                write_text(file, "".join(f"{line}\n" for line in own))
                reward = trained_reward(work, SHAPES, f"{name}_{turn}", seed, file)
                rewards.setdefault(f"{name}_{turn}", {})[seed] = reward
                content = measured(work, SHAPES, f"{name}_{turn}", seed, reward)
                records += best_of_n_records(f"best_of_n.{name}_{turn}", seed, content)
            if turn < TURNS:
                reward = rewards[f"searched_{turn}"][seed]
                searched = [*searched, *_searched_pairs(work, reward, folder, turn, seed)]
    runs = {name: optimized(work, SHAPES, name, rewards[name]) for name in ("searched_0", f"searched_{TURNS}")}
    for name, by_seed in runs.items():
        records += arm_gains(f"flow_grpo.{name}", "strict", "strict", by_seed)
    metric = "strict, after three turns - before"
    records += differences("flow_grpo.difference", metric, "strict", *runs.values())
    records.sort(key=lambda record: record.name)
    claim = (
        "The truth of the best of 64 samples by a reward, and after Flow-GRPO on it, as the samples that a search"
        " finds by the reward are judged and learned from, beside as many pairs of random samples"
    )
    write_results(RESULTS, "overrated_shapes", head(claim, "python scripts/benchmarks/proofs.py overrated"), records)


def _searched_pairs(work: Path, reward: Setting, folder: Path, turn: int, seed: int) -> list[str]:
    """Search by a reward, and compare the best candidate of each prompt with a sample of the base model.

    Returns the lines of the judgments, of files in ``folder``.
    """
    name = f"{turn}-{seed}"
    prompts = work / "overrated" / f"prompts-{name}.jsonl"
    write_prompts(prompts, SHAPES, SEARCHED, "train", seed=1000 * seed + turn)
    common = {"model": SHAPES.settings()["model"], "prompts": str(prompts), "sampling": SHAPES.sampling()}
    search = {
        "strategy": {"class_path": "genalign.BestOfN"},
        "budget": {"nfe": CANDIDATES * 10},
        "rewards": {"learned": {"function": reward}},
    }
    own = folder / f"found-{name}"
    if not (own / "preferences.jsonl").exists():
        lines: list[str] = []
        for generator, settings in {"search": search, "base": {}}.items():
            source = work / "overrated" / f"{generator}-{name}"
            collection = {**common, **settings, "output": str(source), "references": True, "samples_per_prompt": 1}
            run_with(
                "collect", settings={**collection, "batch_size": 96, "seed": seed}, file=source.with_suffix(".json")
            )
            lines += _copied(source, work / "overrated" / f"both-{name}", generator)
        write_text(work / "overrated" / f"both-{name}" / "prompts.jsonl", "".join(lines))
        compared = {"output": str(own), "samples": str(work / "overrated" / f"both-{name}"), "seed": seed}
        run_with("reward", "collect", settings=compared, file=own.with_name(f"{own.name}-collect.json"))
        judge(own, SHAPES, (FLIPS,))
    judged = work / "overrated" / f"judged-{name}.jsonl"
    if not judged.exists():
        listed = folder / judged.name
        listed.unlink(missing_ok=True)
        append_judgments(folder, read_judgments(own), judged.name)
        listed.replace(judged)
    return judged.read_text(encoding="utf-8").splitlines()


def _copied(source: Path, target: Path, generator: str) -> list[str]:
    """Copy listed samples into a folder, and return its lines, which name the generator."""
    lines = []
    for line in (source / "prompts.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        name = f"{generator}-{Path(entry['file_name']).name}"
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / entry["file_name"], target / name)
        lines.append(json.dumps({**entry, "file_name": name, "generator": generator}) + "\n")
    return lines


# References of Adv-GRPO


def references(work: Path) -> None:
    """Adv-GRPO on references that a search of the base model has found, beside the verifier alone."""
    folder, prompts = work / "adversarial-references", work / "adversarial-prompts.jsonl"
    write_prompts(prompts, SHAPES, SEARCHED, "train", seed=0)
    pruned = {
        "output": str(folder),
        "model": SHAPES.settings()["model"],
        "prompts": str(prompts),
        "sampling": SHAPES.sampling(),
        "samples_per_prompt": 8,
        "rewards": {"partial": {"function": SHAPES.score("partial")}},
        "strategy": {"class_path": "genalign.Prune", "init_args": {"steps": [3, 6], "keep": [0.5, 0.5]}},
        "budget": {"nfe": 60},
        "references": True,
        "batch_size": 96,
    }
    run_with("collect", settings=pruned, file=work / "adversarial-references.json")
    reader = "rewards.backbones.reference_images.ReferencesByPrompt.read"
    own = {
        "model": "shapes-clip",
        "references": {"class_path": reader, "init_args": {"folder": str(folder)}},
        "update_rule": {"class_path": "rewards.adversarial.Ratio"},
        "learning": {"loss": "bt_pairwise", "learning_rate": 2.0e-5, "steps_per_update": 3},
    }
    tuned = {"class_path": "rewards.adversarial.TunedClipReward", "init_args": own}
    records: list[PromptRecord] = []
    runs = {}
    for name, real in {"verifier": None, "pruned_references": tuned}.items():
        rewards = {"partial": {"function": SHAPES.score("partial")}, "strict": {"function": SHAPES.score("strict")}}
        rewards |= {} if real is None else {"real": {"weight": 0.5, "function": real}}
        settings = {"rewards": rewards, "prompts": str(prompts)}
        runs[name] = {
            seed: optimized(work, SHAPES, f"adv_grpo_{name}", {seed: {}}, {**_equal_nfe(seed), **settings})[seed]
            for seed in SEEDS
        }
        records += arm_gains(name, "strict", "strict", runs[name])
    metric = "strict, with references - without"
    records += differences("difference", metric, "strict", runs["verifier"], runs["pruned_references"])
    claim = "Adv-GRPO on references that pruning found with the base model, beside the same run without them"
    write_results(RESULTS, "references_shapes", head(claim, "python scripts/benchmarks/proofs.py references"), records)
