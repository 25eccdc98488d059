"""Rewards that are learned in the embedded worlds: the verifier judges pairs of the base model's samples, with errors.

The parts that the proofs of learned rewards share: the pairs, the rewards, their measures, and training on them. All
tasks have as many pairs, since training and evaluations take the tasks in turn, too.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from genalign.diffusion.noise import derived_seed
from genalign.prompts import drawn_in_turn
from genalign.runtime.files import write_json, write_text
from genalign.types import PromptSet
from genalign.worlds import shapes, tones
from genalign.worlds.tones import SAMPLE_RATE
from scripts.benchmarks.trained_runs import COMPARISONS, run_genalign

SEEDS, PILOT_SEED = (91, 92, 93), 100  # of the rewards and of the runs on them, and of what is decided before
MAX_NFE = 90_000  # of a run that optimizes a reward: 32 rounds of Flow-GRPO, 4 minutes on two cores
LOOK_EVERY = 4  # rounds between two evaluations of such a run
EQUAL_NFE = {"max_nfe": 100_000, "learning_rate_schedule": "linear"}  # of runs whose newest weights are compared
GROUP = 4  # samples of a comparison, each two of which are a pair
VAL_PAIRS, VAL_PROMPTS = 900, 10  # pairs that measure a reward, and the most prompts of a task that they are of
POOLED_PROMPTS, POOLED = 60, 64  # of best-of-n: prompts, and samples of each
FALLING_FLIPS = 0.4  # share of flipped labels with which a reward of 100 pairs falls: reward_pilots.py falling
PLAIN, SMOOTHED = (Path("scripts/configs/reward") / name for name in ("overoptimized.yaml", "shapes_clip.yaml"))
LEARNED = "learned"  # the name of the reward that is trained on, and of its score on held-out prompts

Setting = Mapping[str, Any]
"""An object as configurations name it."""


@dataclass(frozen=True, eq=False)
class BenchWorld:
    """An embedded world, and what its rewards are learned on; one object a world, by which commands are cached.

    Attributes:
        name: "shapes" or "tones".
        verifier: The class of the verifier.
        encoder: The encoder of learned rewards.
        pairs: The number of training pairs that are collected, or a few more.
        flips: The shares of flipped labels of the training pairs, each an annotator.
        recipe: The training method; None takes that of the configuration that the runs share.
    """

    name: str
    verifier: str
    encoder: Setting
    pairs: int
    flips: tuple[float, ...]
    recipe: Setting | None = None

    def prompts(self, suite: str) -> PromptSet:
        """Load the prompts of a suite of the world."""
        own: PromptSet = {"shapes": shapes, "tones": tones}[self.name].prompts(suite)
        return own

    def score(self, name: str) -> dict[str, Any]:
        """A score of the verifier as a reward."""
        return {"class_path": self.verifier, "init_args": {"score": name}}

    @property
    def base(self) -> Path:
        """The configuration that the runs share."""
        return COMPARISONS / f"base_{self.name}.yaml"

    def settings(self) -> dict[str, Any]:
        """Read the configuration that the runs share."""
        content: dict[str, Any] = yaml.safe_load(self.base.read_text(encoding="utf-8"))
        return content

    def sampling(self) -> dict[str, Any]:
        """The sampling settings of an evaluation."""
        return {"guidance": 1.0, **self.settings()["evaluation"]}


SHAPES = BenchWorld(
    "shapes",
    "rewards.shapes.ShapesReward",
    {"class_path": "rewards.learned_encoders.ClipTokens", "init_args": {"model": "shapes-clip"}},
    pairs=30_000,
    flips=(0.0, 0.1, 0.2, 0.4),
)
TONES = BenchWorld(
    "tones",
    "rewards.tones.TonesReward",
    {
        "class_path": "rewards.learned_encoders.ClapTokens",
        "init_args": {"model": "tones-clap", "sample_rate": SAMPLE_RATE},
    },
    pairs=2000,
    flips=tuple(sorted({0.1, FALLING_FLIPS})),
    recipe={"class_path": "genalign.nft"},  # as in the demo of shapes
)


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


def run_with(*command: str, settings: Setting, file: Path, base: Path | None = None) -> None:
    """Run a command with settings, which are written to a file, over those of a base."""
    write_json(file, settings)
    run_genalign(*command, *([] if base is None else ["--config", str(base)]), "--config", str(file))


def write_lines(file: Path, lines: Sequence[str]) -> None:
    """Write the lines of a .jsonl file."""
    write_text(file, "".join(f"{line}\n" for line in lines))


def write_prompts(file: Path, prompts: PromptSet, count: int, seed: int) -> None:
    """Write ``count`` of the prompts, drawn from all tasks in turn."""
    write_lines(file, [json.dumps(prompt.metadata) for prompt in drawn_in_turn(prompts, count, seed=seed)])


# Pairs


@functools.cache
def judged_pairs(work: Path, world: BenchWorld, suite: str) -> Path:
    """Collect comparisons of the base model's samples, each task in a folder of its own, and let the verifier judge.

    Prompts of small tasks have more comparisons, so that all tasks have as many pairs, or more where a single
    comparison of each prompt gives more. Training pairs are judged once for each share of flipped labels, the others
    without errors.
    """
    folder, tasks = work / f"{world.name}-pairs-{suite}", world.prompts(suite).by_task()
    wanted, most = (world.pairs, None) if suite == "train" else (VAL_PAIRS, VAL_PROMPTS)
    for task, prompts in tasks.items():
        listed, count = folder / f"{task}-prompts.jsonl", min(len(prompts), most or len(prompts))
        write_prompts(listed, PromptSet(task, prompts), count, seed=0)
        collect = {
            "output": str(folder / task),
            "models": {"base": {"model": world.settings()["model"], "sampling": world.sampling()}},
            "prompts": str(listed),
            "group_size": GROUP,
            "comparisons_per_prompt": math.ceil(wanted / len(tasks) / (math.comb(GROUP, 2) * count)),
            "batch_size": 96,
        }
        run_with("reward", "collect", settings=collect, file=folder / f"{task}-collect.json")
        judge(folder / task, world, world.flips if suite == "train" else (0.0,))
    return folder


def judge(folder: Path, world: BenchWorld, flips: Sequence[float]) -> None:
    """Let the verifier judge the comparisons of a folder, as one annotator for each share of flipped labels."""
    annotators = {annotator(share): {"noise": {"flips": share}} for share in flips}
    labeler = "genalign.reward_learning.labeling.RewardLabeler"
    arguments = {"rewards": {"overall": world.score("partial")}, "annotators": annotators}
    by = {"class_path": labeler, "init_args": arguments}
    settings = {"folder": str(folder), "kind": "pair", "by": by, "batch_size": 256}
    run_with("reward", "label", settings=settings, file=folder.with_name(f"{folder.name}-label.json"))


def annotator(flips: float) -> str:
    """The name of the annotator of a share of flipped labels."""
    return f"flips-{round(100 * flips)}"


def judgments_by_task(folder: Path, flips: float) -> dict[str, list[str]]:
    """The lines of an annotator's judgments in a folder of ``judged_pairs``, by task, as lines of a file in it.

    The task is the subset of a line's prompt, over which ``genalign reward evaluate`` averages the accuracy.
    """
    tasks: dict[str, list[str]] = {}
    for file in sorted(folder.glob("*/preferences.jsonl")):
        task = file.parent.name
        for judgment in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
            if judgment["annotator"] == annotator(flips):
                samples = [{**sample, "file": f"{task}/{sample['file']}"} for sample in judgment["samples"]]
                metadata = {**judgment.get("metadata", {}), "subset": task}
                tasks.setdefault(task, []).append(json.dumps({**judgment, "samples": samples, "metadata": metadata}))
    return tasks


def drawn_pairs(folder: Path, size: int, flips: float, seed: int) -> list[str]:
    """Draw the lines of ``size`` judgments, of one task after the other; of one seed, fewer are the first of more."""
    tasks = judgments_by_task(folder, flips)
    for task, lines in tasks.items():
        random.Random(derived_seed(seed, "pairs", task)).shuffle(lines)
    drawn = [line for turn in itertools.zip_longest(*tasks.values()) for line in turn if line is not None]
    if len(drawn) < size:
        raise ValueError(f"{folder} has {len(drawn)} pairs, not {size}: collect more comparisons")
    return drawn[:size]


def pairs_file(folder: Path, proxy: Proxy, seed: int) -> Path:
    """Write the pairs of a proxy, as drawn by ``seed``, into the folder of all pairs."""
    file = folder / f"{proxy.size}-{annotator(proxy.flips)}-{seed}.jsonl"
    write_lines(file, drawn_pairs(folder, proxy.size, proxy.flips, seed))
    return file


# Rewards, and their measures


def trained_reward(
    work: Path,
    world: BenchWorld,
    name: str,
    seed: int,
    preferences: Sequence[Path],
    members: int = 1,
    training: Path = PLAIN,
) -> Setting:
    """Train a reward, and return it as configurations name it; its folder has the seconds that this took.

    Args:
        work: The folder of the proofs.
        world: The world of the samples.
        name: The name of the reward.
        seed: The seed of its heads and of their batches.
        preferences: Files of judgments.
        members: The number of heads.
        training: The configuration of the training.
    """
    run = work / "rewards" / world.name / training.stem / name / f"seed-{seed}"
    settings = {
        "output": str(run),
        "preferences": [str(file) for file in preferences],
        "encoder": world.encoder,
        "fit": {"members": members, "seed": seed},
    }
    if not (run / "seconds.json").exists():
        began = time.monotonic()
        run_with("reward", "train", settings=settings, file=run.with_suffix(".json"), base=training)
        write_json(run / "seconds.json", {"seconds": time.monotonic() - began})
    return {"class_path": "rewards.learned.LearnedReward", "init_args": {"path": str(run)}}


def learned(
    work: Path, world: BenchWorld, proxy: Proxy, seeds: Sequence[int] = SEEDS, training: Path = PLAIN
) -> dict[int, Setting]:
    """Train the rewards of a proxy, one for each seed."""
    folder, rewards = judged_pairs(work, world, "train"), dict[int, Setting]()
    for seed in seeds:
        file = pairs_file(folder, proxy, seed)
        rewards[seed] = trained_reward(work, world, proxy.name, seed, [file], proxy.members, training)
    return rewards


def pooled(rewards: Mapping[int, Setting], pool: str) -> dict[int, Setting]:
    """The rewards of ensembles whose members' scores become one by ``pool``."""
    return {seed: {**one, "init_args": {**one["init_args"], "pool": pool}} for seed, one in rewards.items()}


def measured(work: Path, world: BenchWorld, name: str, seed: int, reward: Setting) -> Path:
    """Measure a reward on clean pairs of val prompts, and on many samples of comp prompts.

    Returns the folder of the evaluation, with its evaluation.json and scores.jsonl.
    """
    output = work / "measures" / world.name / name / f"seed-{seed}"
    if not (output / "evaluation.json").exists():
        pairs = judged_pairs(work, world, "val")
        write_lines(pairs / "clean.jsonl", drawn_pairs(pairs, VAL_PAIRS, 0.0, seed=0))
        samples = str(sample_pool(work, world))
        sources = {"preferences": str(pairs / "clean.jsonl"), "samples": samples, "truth": world.score("strict")}
        settings = {"reward": reward, **sources, "output": str(output), "batch_size": 128}
        run_with("reward", "evaluate", settings=settings, file=output.with_suffix(".json"))
    return output


@functools.cache
def sample_pool(work: Path, world: BenchWorld) -> Path:
    """Make many samples of comp prompts by the base model, of prompts of all tasks in turn."""
    folder, prompts = work / f"{world.name}-pool", work / f"{world.name}-pool.jsonl"
    write_prompts(prompts, world.prompts("comp"), POOLED_PROMPTS, seed=0)
    settings = {
        "output": str(folder),
        "model": world.settings()["model"],
        "prompts": str(prompts),
        "sampling": world.sampling(),
        "samples_per_prompt": POOLED,
        "batch_size": 96,
        "references": True,
    }
    run_with("collect", settings=settings, file=work / f"{world.name}-pool.json")
    return folder


# Training on them


def trained(work: Path, world: BenchWorld, name: str, seed: int, settings: Setting) -> Path:
    """Train or resume a run by settings over those that the runs of a world share; a finished one is left as it is."""
    run = work / "runs" / world.name / name / f"seed-{seed}"
    own: dict[str, Any] = {"output": str(run), **({"recipe": world.recipe} if world.recipe else {}), **settings}
    own["training"] = {"rounds": 100_000, "learning_rate": "auto", "seed": seed, **own["training"]}
    if not (run / "gain.json").exists():
        run_with("train", "--resume", settings=own, file=run.with_suffix(".json"), base=world.base)
    return run


def run_rewards(world: BenchWorld, reward: Setting) -> dict[str, Any]:
    """The rewards of a run on ``reward``; the verifier only reports."""
    reported = {score: {"weight": 0, "function": world.score(score)} for score in ("strict", "partial")}
    return {LEARNED: {"function": dict(reward)}, **reported}


def val_looks(world: BenchWorld) -> dict[str, Any]:
    """The evaluations of a run on val prompts."""
    return {"prompts": f"{world.name}:val", "every": LOOK_EVERY, "samples_per_task": 48, "seeds": 1}


def optimized(
    work: Path,
    world: BenchWorld,
    name: str,
    rewards: Mapping[int, Setting],
    own: Setting | None = None,
    scorers: Mapping[int, Setting] | None = None,
) -> dict[int, Path]:
    """Train on the reward of each seed for ``MAX_NFE`` at a constant rate, with evaluations on val prompts.

    The weights are the best by the reward, as for a user who has no verifier: it is scored on these prompts under the
    name under which it is trained on. Left to itself the first score of the verifier would choose them.

    Args:
        work: The folder of the proofs.
        world: The world.
        name: The name of the runs.
        rewards: The reward of each seed.
        own: Settings in place of others.
        scorers: What is scored on val prompts in place of the reward, such as the reward within it.
    """
    runs = {}
    for seed, reward in rewards.items():
        scored = dict((scorers or rewards)[seed])
        settings = {
            "rewards": run_rewards(world, reward),
            "training": {"max_nfe": MAX_NFE, "learning_rate_schedule": "constant"},
            "held_out": {**val_looks(world), "scorers": {LEARNED: scored}},
            **(own or {}),
        }
        runs[seed] = trained(work, world, name, seed, settings)
    return runs


def at_equal_nfe(
    work: Path,
    world: BenchWorld,
    name: str,
    rewards: Mapping[int, Setting],
    schedule: str = "linear",
    own: Setting | None = None,
) -> dict[int, Path]:
    """Train on the reward of each seed to the same NFE, without evaluations in between: the newest weights count.

    Args:
        work: The folder of the proofs.
        world: The world.
        name: The name of the runs.
        rewards: The reward of each seed.
        schedule: The schedule of the learning rate.
        own: Settings in place of others.
    """
    settings = {"training": {**EQUAL_NFE, "learning_rate_schedule": schedule}, **(own or {})}
    return {
        seed: trained(work, world, name, seed, {"rewards": run_rewards(world, reward), **settings})
        for seed, reward in rewards.items()
    }
