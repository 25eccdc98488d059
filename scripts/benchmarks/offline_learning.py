"""What is learned from pools on disk: the recipes on final samples, from samples of the base model in the shapes world.

Eight arms of three seeds and two of one, 60 updates and 3 minutes each on two cores, and 3 for the pool: 1.4 hours.
Where it takes longer, arms go before seeds, from the end of the list in scripts/configs/compare/shapes_offline.yaml.
MaPO, which compares pairs without a reference policy, is not built.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from genalign.evaluation.records import PromptRecord
from genalign.prompts import drawn_in_turn
from genalign.runtime.files import write_json, write_text
from genalign.worlds import shapes, tones
from scripts.benchmarks.published_results import write_results
from scripts.benchmarks.trained_runs import (
    COMPARISONS,
    RESULTS,
    arm_gains,
    compared,
    differences,
    finished,
    head,
    run_genalign,
    stopped,
)

POOL = Path("runs/proofs/pool")  # which the comparison names
PROMPTS, SAMPLES = 256, 16  # of a pool, and of each prompt
CLIP = {"clip": {"function": {"class_path": "rewards.clip.ClipReward", "init_args": {"model": "shapes-clip"}}}}
HYBRID = ("dp2o_sr", "dp2o_sr_unweighted", "dpo_hybrid")  # which learn from partial credit and CLIP
PAIRS = (
    ("dpo_hybrid", "dp2o_sr"),
    ("dp2o_sr_unweighted", "dp2o_sr"),
    ("gdro_without_sft", "gdro"),
    ("gdro_of_two", "gdro"),
)


def offline(work: Path) -> None:
    """What is learned from a pool of the base model's samples, by each recipe that can."""
    write_pool("shapes", work / "pool.jsonl", POOL, CLIP)
    every = compared(work / "offline", "shapes_offline", allow_failed=True)
    runs = finished(every)
    records: list[PromptRecord] = []
    for name, by_seed in runs.items():
        for score in ("strict", "partial", *(["clip"] if name in HYBRID else [])):
            own = name if score == "strict" else f"{name}.{score}"
            records += arm_gains(own, score, score, by_seed)
    for first, second in PAIRS:
        for score in ("strict", *(["partial", "clip"] if first in HYBRID else [])):
            name, metric = f"{second} - {first}", f"{score}, {second} - {first}"
            own = name if score == "strict" else f"{name}.{score}"
            records += differences(own, metric, score, runs[first], runs[second])
    records.sort(key=lambda record: record.name)
    claim = (
        f"Accuracy on held-out compositions (ODE) after 60 updates on {SAMPLES} samples of {PROMPTS} prompts; arms of"
        " dp2o_sr and dpo_hybrid learn from half of partial credit and half of CLIP, all others from partial and strict"
        " credit. MaPO is not built"
    )
    header = head(claim, "python scripts/benchmarks/proofs.py offline")
    write_results(RESULTS, "offline_shapes", {**header, "failed": stopped(every)}, records)


def write_pool(world: str, prompts: Path, pool: Path, rewards: Mapping[str, Any] | None = None) -> None:
    """Collect a pool of the base model's samples of training prompts, as many of each task.

    Args:
        world: "shapes" or "tones".
        prompts: The file of the prompts to write.
        pool: The folder of the pool.
        rewards: Rewards that score its samples beside the base's.
    """
    train = {"shapes": shapes, "tones": tones}[world].prompts("train")
    drawn = drawn_in_turn(train, PROMPTS, seed=0)
    write_text(prompts, "".join(json.dumps(prompt.metadata) + "\n" for prompt in drawn))
    base = yaml.safe_load((COMPARISONS / f"base_{world}.yaml").read_text(encoding="utf-8"))
    own = {
        "output": str(pool),
        "model": base["model"],
        "prompts": str(prompts),
        "rewards": base["rewards"] | dict(rewards or {}),
        "sampling": base["sampling"],
        "samples_per_prompt": SAMPLES,
        "batch_size": 96,
    }
    write_json(prompts.with_suffix(".json"), own)
    run_genalign("collect", "--config", str(prompts.with_suffix(".json")))
