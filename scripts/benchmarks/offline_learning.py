"""What is learned from pools on disk: the recipes on final samples, from samples of the base model in the shapes world.

Nine arms of 60 updates and three seeds, 3 minutes each on two cores, and 3 for the pool: 1.4 hours. Where it takes
longer, arms go before seeds, from the end of the list in scripts/configs/compare/shapes_offline.yaml.
"""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from genalign.evaluation.records import PromptRecord
from genalign.prompts import drawn_in_turn
from genalign.runtime.files import write_json, write_text
from genalign.worlds import shapes, tones
from scripts.benchmarks.published_results import write_results
from scripts.benchmarks.trained_runs import COMPARISONS, RESULTS, arm_gains, compared, differences, head, run_genalign

POOL = Path("runs/proofs/pool")  # which the comparison names
PROMPTS, SAMPLES = 256, 16  # of a pool, and of each prompt


def offline(work: Path) -> None:
    """What is learned from a pool of the base model's samples, by each recipe that can."""
    write_pool("shapes", work / "pool.jsonl", POOL)
    records: list[PromptRecord] = []
    runs = compared(work / "offline", "shapes_offline")
    for name, by_seed in runs.items():
        for score in ("strict", "partial"):
            own = name if score == "strict" else f"{name}.{score}"
            records += arm_gains(own, score, score, by_seed)
    metric = "strict, dp2o_sr - dpo"
    records += differences("dp2o_sr.difference", metric, "strict", runs["dpo"], runs["dp2o_sr"])
    records.sort(key=lambda record: record.name)
    claim = f"Accuracy on held-out compositions (ODE) after 60 updates on {SAMPLES} samples of {PROMPTS} prompts"
    write_results(RESULTS, "offline_shapes", head(claim, "python scripts/benchmarks/proofs.py offline"), records)


def write_pool(world: str, prompts: Path, pool: Path) -> None:
    """Collect a pool of the base model's samples of training prompts, as many of each task."""
    train = {"shapes": shapes, "tones": tones}[world].prompts("train")
    drawn = drawn_in_turn(train, PROMPTS, seed=0)
    write_text(prompts, "".join(json.dumps(prompt.metadata) + "\n" for prompt in drawn))
    base = yaml.safe_load((COMPARISONS / f"base_{world}.yaml").read_text(encoding="utf-8"))
    own = {
        "output": str(pool),
        "model": base["model"],
        "prompts": str(prompts),
        "rewards": base["rewards"],
        "sampling": base["sampling"],
        "samples_per_prompt": SAMPLES,
        "batch_size": 96,
    }
    write_json(prompts.with_suffix(".json"), own)
    run_genalign("collect", "--config", str(prompts.with_suffix(".json")))
