"""Ten thousand optimizer steps need no more memory, threads, files or processes than a few hundred."""

from __future__ import annotations

import gc
import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import pytest
from torch import Tensor

from genalign.types import Prompt
from tests.genalign.training.toy_runs import write_config
from tests.packages import ROOT

ROUNDS, UPDATES, EVERY = 2500, 4, 50  # UPDATES in a round; the reward measures in every 50th call

calls = itertools.count(1)


def redness(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """A reward that measures its own process now and then."""
    if next(calls) % EVERY == 0:
        gc.collect()
        row = {
            "bytes": int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
            "threads": threading.active_count(),
            "files": len(os.listdir("/proc/self/fd")),
            "processes": sum(
                len((task / "children").read_text().split()) for task in Path("/proc/self/task").iterdir()
            ),
        }
        with open(os.environ["SOAK_METRICS"], "a") as metrics:
            metrics.write(json.dumps(row) + "\n")
    return samples[:, 0].flatten(1).mean(1)


@pytest.mark.slow
def test_memory_threads_files_and_processes_do_not_grow(tiny_folder: Path, tmp_path: Path) -> None:
    metrics, prompts = tmp_path / "metrics.jsonl", tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"{count} red circles" for count in range(100)))  # few: encoded texts are cached
    reward = {"red": {"function": f"{__name__}.redness", "timeout": 60}}
    sections = {"prompts": str(prompts), "rewards": reward, "checkpoint": {"every": 50}}
    held_out = {"every": 250, "prompts": "shapes:val", "samples_per_task": 1}
    training = {"rounds": ROUNDS, "prompts_per_round": 4, "updates_per_round": UPDATES, "learning_rate": 3e-4}
    config = write_config(tmp_path / "run.json", tiny_folder, "", training, held_out=held_out, **sections)
    variables = {"SOAK_METRICS": str(metrics), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "genalign", "train", "--config", str(config)]
    environment = {**os.environ, **variables}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL, timeout=2400)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == ROUNDS and not any(row["skipped_updates"] for row in rows)
    measured = [json.loads(line) for line in metrics.read_text().splitlines()]
    fifth = len(measured) // 5
    early, late = measured[fifth : 2 * fifth], measured[-fifth:]
    assert mean(row["bytes"] for row in late) < 1.02 * mean(row["bytes"] for row in early)
    for kind in ("threads", "files", "processes"):
        assert max(row[kind] for row in late) <= max(row[kind] for row in early), kind
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) <= 5
