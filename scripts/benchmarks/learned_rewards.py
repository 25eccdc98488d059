"""Rewards that are learned in the embedded worlds: the verifier judges pairs of the base model's samples, with errors.

The parts that the proofs of learned rewards share: the pairs, the rewards, their measures, and training on them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
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

SEEDS = (91, 92, 93)  # of the rewards and of the runs on them
MINUTES = 4  # of a run
GROUP, GROUPS = 4, 3  # samples of a comparison, and comparisons of a training prompt
POOLED_PROMPTS, POOLED = 60, 64  # of best-of-n: prompts, and samples of each
FLIPS = (0.0, 0.1, 0.2, 0.4)  # shares of flipped labels, each an annotator

Setting = Mapping[str, Any]
"""An object as configurations name it."""


@dataclass(frozen=True)
class BenchWorld:
    """An embedded world, and what its rewards are learned on.

    Attributes:
        name: "shapes" or "tones".
        verifier: The class of the verifier.
        encoder: The encoder of learned rewards.
    """

    name: str
    verifier: str
    encoder: Setting

    def prompts(self, suite: str) -> PromptSet:
        """Load the prompts of a suite of the world."""
        return {"shapes": shapes, "tones": tones}[self.name].prompts(suite)

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
)
TONES = BenchWorld(
    "tones",
    "rewards.tones.TonesReward",
    {
        "class_path": "rewards.learned_encoders.ClapTokens",
        "init_args": {"model": "tones-clap", "sample_rate": SAMPLE_RATE},
    },
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


def write_prompts(file: Path, world: BenchWorld, count: int, suite: str, seed: int) -> None:
    """Write prompts of a suite, as many of each task."""
    drawn = drawn_in_turn(world.prompts(suite), count, seed=seed)
    write_text(file, "".join(json.dumps(prompt.metadata) + "\n" for prompt in drawn))


def judged_pairs(work: Path, world: BenchWorld, suite: str, groups: int) -> Path:
    """Collect comparisons of the base model's samples, and judge them once for each share of flipped labels."""
    folder = work / f"{world.name}-pairs-{suite}"
    collect = {
        "output": str(folder),
        "models": {"base": {"model": world.settings()["model"], "sampling": world.sampling()}},
        "prompts": f"{world.name}:{suite}",
        "group_size": GROUP,
        "comparisons_per_prompt": groups,
        "batch_size": 96,
    }
    run_with("reward", "collect", settings=collect, file=folder.with_name(f"{folder.name}-collect.json"))
    judge(folder, world, FLIPS)
    return folder


def judge(folder: Path, world: BenchWorld, flips: tuple[float, ...]) -> None:
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


def lines_of(file: Path, flips: float) -> list[str]:
    """The lines of the judgments of an annotator."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if json.loads(line)["annotator"] == annotator(flips)]


def drawn_pairs(folder: Path, size: int, flips: float, seed: int) -> list[str]:
    """Draw the lines of ``size`` judgments by ``seed``; of one seed, fewer are the first of more."""
    own = lines_of(folder / "preferences.jsonl", flips)
    if len(own) < size:
        raise ValueError(f"{folder} has {len(own)} pairs, not {size}: collect more groups")
    random.Random(derived_seed(seed, "pairs")).shuffle(own)
    return own[:size]


def trained_reward(work: Path, world: BenchWorld, name: str, seed: int, preferences: Path, members: int = 1) -> Setting:
    """Train a reward on a file of judgments, and return it as configurations name it."""
    run = work / "rewards" / world.name / name / f"seed-{seed}"
    settings = {
        "output": str(run),
        "preferences": str(preferences),
        "encoder": world.encoder,
        "fit": {"members": members, "seed": seed},
    }
    if not (run / "reward.safetensors").exists():
        base = Path("scripts/configs/reward/overoptimized.yaml")
        run_with("reward", "train", settings=settings, file=run.with_suffix(".json"), base=base)
    return {"class_path": "rewards.learned.LearnedReward", "init_args": {"path": str(run)}}


def learned(work: Path, world: BenchWorld, proxy: Proxy) -> dict[int, Setting]:
    """Train the rewards of a proxy, one for each seed."""
    folder, rewards = judged_pairs(work, world, "train", GROUPS), dict[int, Setting]()
    for seed in SEEDS:
        file = folder / f"{proxy.size}-{annotator(proxy.flips)}-{seed}.jsonl"
        write_text(file, "".join(f"{line}\n" for line in drawn_pairs(folder, proxy.size, proxy.flips, seed)))
        rewards[seed] = trained_reward(work, world, proxy.name, seed, file, proxy.members)
    return rewards


def measured(work: Path, world: BenchWorld, name: str, seed: int, reward: Setting) -> dict[str, Any]:
    """Measure a reward on clean pairs of val prompts, and on many samples of comp prompts; as ``evaluation.json``."""
    output = work / "measures" / world.name / name / f"seed-{seed}"
    pairs, pool = judged_pairs(work, world, "val", 1), sample_pool(work, world)
    clean = pairs / "clean.jsonl"
    write_text(clean, "".join(f"{line}\n" for line in lines_of(pairs / "preferences.jsonl", 0.0)))
    if not (output / "evaluation.json").exists():
        sources = {"preferences": str(clean), "samples": str(pool), "truth": world.score("strict")}
        settings = {"reward": reward, **sources, "output": str(output), "batch_size": 128}
        run_with("reward", "evaluate", settings=settings, file=output.with_suffix(".json"))
    content: dict[str, Any] = json.loads((output / "evaluation.json").read_text(encoding="utf-8"))
    return content


def sample_pool(work: Path, world: BenchWorld) -> Path:
    """Make many samples of comp prompts by the base model, of as many prompts of each task."""
    folder, prompts = work / f"{world.name}-pool", work / f"{world.name}-pool.jsonl"
    write_prompts(prompts, world, POOLED_PROMPTS, "comp", seed=0)
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


def optimized(
    work: Path, world: BenchWorld, name: str, rewards: Mapping[int, Setting], own: Setting | None = None
) -> dict[int, Path]:
    """Train on the reward of each seed for ``MINUTES``, or by the settings ``own``; the verifier only reports."""
    runs = {}
    for seed, reward in rewards.items():
        run = runs[seed] = work / "runs" / world.name / name / f"seed-{seed}"
        if (run / "gain.json").exists():
            continue
        reported = {score: {"weight": 0, "function": world.score(score)} for score in ("strict", "partial")}
        settings = {
            "output": str(run),
            "rewards": {"learned": {"function": dict(reward)}, **reported},
            "training": {"max_nfe": None, "rounds": 100_000, "learning_rate_schedule": "constant", "seed": seed},
            "max_seconds": 60 * MINUTES,
            "held_out": {"prompts": f"{world.name}:val", "every_seconds": 30, "samples_per_task": 48, "seeds": 1},
            **(own or {}),
        }
        run_with("train", settings=settings, file=run.with_suffix(".json"), base=world.base)
    return runs
