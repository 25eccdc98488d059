"""Ten thousand optimizer steps need no more memory, threads, files or processes than a few hundred."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean

import pytest

ROUNDS, UPDATES, EVERY = 2500, 4, 50  # UPDATES in a round; the reward measures in every 50th call

WITNESS = f'''
"""A reward that measures its own process now and then."""
import gc
import json
import os
import threading
from pathlib import Path

calls = 0


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def children():
    tasks = Path("/proc/self/task").iterdir()
    return sum(len((task / "children").read_text().split()) for task in tasks)


def redness(samples, prompts):
    global calls
    calls += 1
    if calls % {EVERY} == 0:
        gc.collect()
        files = len(os.listdir("/proc/self/fd"))
        row = {{"bytes": resident(), "threads": threading.active_count(), "files": files, "processes": children()}}
        with open(os.environ["SOAK_METRICS"], "a") as metrics:
            metrics.write(json.dumps(row) + "\\n")
    return samples[:, 0].flatten(1).mean(1)
'''

CONFIG = """
output: {output}
model: {{path: {model}}}
prompts: {prompts}
recipe: {{class_path: genalign.algorithms.recipes.flow_grpo, init_args: {{window: 1}}}}
rewards:
  red: {{function: witness.redness, timeout: 60}}
sampling: {{num_steps: 2, sigmas: [1.0, 0.5]}}
training:
  {{rounds: {rounds}, prompts_per_round: 4, group_size: 2, batch_size: 2, updates_per_round: {updates}}}
lora: {{rank: 2}}
held_out: {{every: 250, prompts: "shapes:val", samples_per_task: 1}}
checkpoint: {{every: 50}}
"""


@pytest.mark.slow
def test_memory_threads_files_and_processes_do_not_grow(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "witness.py").write_text(WITNESS)
    config, metrics, prompts = tmp_path / "soak.yaml", tmp_path / "metrics.jsonl", tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"{count} red circles" for count in range(100)))  # few: encoded texts are cached
    paths = {"output": tmp_path / "run", "model": tiny_folder, "prompts": prompts}
    config.write_text(CONFIG.format(**paths, rounds=ROUNDS, updates=UPDATES))
    variables = {"PYTHONPATH": str(tmp_path), "SOAK_METRICS": str(metrics), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "genalign", "train", "--config", str(config)]
    subprocess.run(command, env={**os.environ, **variables}, check=True, stdout=subprocess.DEVNULL, timeout=2400)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == ROUNDS and not any(row["skipped_updates"] for row in rows)
    measured = [json.loads(line) for line in metrics.read_text().splitlines()]
    fifth = len(measured) // 5
    early, late = measured[fifth : 2 * fifth], measured[-fifth:]
    assert mean(row["bytes"] for row in late) < 1.02 * mean(row["bytes"] for row in early)
    for kind in ("threads", "files", "processes"):
        assert max(row[kind] for row in late) <= max(row[kind] for row in early), kind
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) <= 5
