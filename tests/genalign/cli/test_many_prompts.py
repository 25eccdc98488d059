"""Processes that share prompts process each of them once, although some of the processes are killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from genalign.evaluation.evaluate import load_evaluation
from genalign.evaluation.geneval.result_files import write_prompts
from genalign.types import PromptSet
from genalign.worlds import shapes
from tests.genalign.evaluation.geneval.test_evaluation_files import assert_same_files
from tests.packages import ROOT

PROCESSES, KILLS = 3, 8

SEARCH = """
output: {folder}/output
model: {{path: {model}}}
prompts: {folder}/prompts.txt
rewards: {{red: {{function: tests.genalign.training.toy_runs.redness}}}}
strategy: {{class_path: genalign.BestOfN}}
budget: {{nfe: 4}}
sampling: {{num_steps: 2, sigmas: [1.0, 0.5]}}
"""
EVALUATION = """
output: {folder}/output
model: {{path: {model}}}
prompts: {folder}/prompts.jsonl
seeds: 1
batch_size: 1
sampling: {{num_steps: 2, sigmas: [1.0, 0.5], guidance: 1.0}}
judge:
  class_path: rewards.geneval.GenEvalJudge
  init_args:
    detector:
      class_path: tests.genalign.evaluation.geneval.shapes_judge.ShapesDetector
      init_args: {{seconds: {seconds}}}
    colors: tests.genalign.evaluation.geneval.shapes_judge.PaletteColors
"""


class Workers:
    """Processes of one command, whose output goes to files in ``folder``."""

    def __init__(self, folder: Path, command: Sequence[str]) -> None:
        self.folder, self.started = folder, 0
        self.command = [sys.executable, "-m", "genalign", *command]
        self.running: list[subprocess.Popen[bytes]] = []

    def start(self, **variables: str) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
        with (self.folder / f"output-{self.started}.txt").open("wb") as output:
            self.running.append(subprocess.Popen(self.command, env=environment, stdout=output, cwd=self.folder))
        self.started += 1

    def kill(self) -> None:
        """Kill the oldest process."""
        process = self.running.pop(0)
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL

    def wait(self) -> None:
        assert [process.wait(1800) for process in self.running] == [0] * len(self.running)
        self.running.clear()

    def reported(self, count: int) -> list[str]:
        """Return the indices of the prompts, out of ``count``, that the processes reported."""
        files = [self.folder / f"output-{number}.txt" for number in range(self.started)]
        lines = [line for file in files for line in file.read_text().splitlines()]
        return [line.split("/")[0] for line in lines if f"/{count}  " in line]


def _run_with_kills(folder: Path, command: Sequence[str], count: int, pieces: str) -> Workers:
    """Run a command on ``count`` prompts, whose files are in a folder of the output, with several kills."""
    workers = Workers(folder, command)
    for _ in range(PROCESSES):
        workers.start()
    for kill in range(1, KILLS + 1):
        _wait_for(folder / "output" / pieces, kill * count // (KILLS + 1))
        workers.kill()
        workers.start()
    workers.wait()
    assert not [path for path in (folder / "output").rglob("*") if path.suffix == ".part"]
    return workers


def _wait_for(prompts: Path, rows: int, pattern: str = "*.json") -> None:
    limit = time.monotonic() + 1800
    while len(list(prompts.glob(pattern))) < rows:
        assert time.monotonic() < limit, "no prompts were finished in time"
        time.sleep(0.01)


@pytest.mark.slow
def test_every_prompt_is_searched_once_after_kills(tiny_folder: Path, tmp_path: Path) -> None:
    count, output = 3_000, tmp_path / "output"
    texts = [f"{number} red circles" for number in range(count)]
    (tmp_path / "prompts.txt").write_text("\n".join(texts))
    (tmp_path / "search.yaml").write_text(SEARCH.format(folder=tmp_path, model=tiny_folder))
    workers = _run_with_kills(tmp_path, ["steer", "--config", str(tmp_path / "search.yaml")], count, "prompts")
    indices = workers.reported(count)
    assert len(indices) == len(set(indices)) and count - KILLS <= len(indices) <= count  # a kill may precede a line

    rows = [json.loads(line) for line in (output / "scores.jsonl").read_text().splitlines()]
    assert [(row["index"], row["prompt"]) for row in rows] == list(enumerate(texts))
    saved = {path.relative_to(output).as_posix() for path in output.rglob("*.png") if path.is_file()}
    assert {sample["image"] for row in rows for sample in (row, row["plain"], *row["top"])} == saved


@pytest.mark.slow
def test_every_prompt_is_evaluated_once_after_kills(tiny_folder: Path, tmp_path: Path) -> None:
    count, output = 1_000, tmp_path / "output"
    circle = {"tag": "single_object", "include": [{"class": "circle", "count": 1}]}
    texts = [f"circle number {number}" for number in range(count)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({**circle, "prompt": text}) for text in texts))
    (tmp_path / "evaluation.yaml").write_text(EVALUATION.format(folder=tmp_path, model=tiny_folder, seconds=0.0))
    _run_with_kills(tmp_path, ["evaluate", "geneval", "--config", str(tmp_path / "evaluation.yaml")], count, "batches")

    assert [record.prompt for record in load_evaluation(output).records] == texts
    images = sorted(path.relative_to(output / "images").as_posix() for path in output.rglob("*.png"))
    assert images == [f"{number:05d}/samples/0000.png" for number in range(count)]


@pytest.mark.slow
def test_ranks_share_the_samples_and_resume_after_a_kill(tiny_folder: Path, tmp_path: Path) -> None:
    """Two ranks, one of them killed, and then two processes that share the rest by locks write the bytes of one."""
    tasks = shapes.prompts("iid").by_task().values()
    twelve = PromptSet("twelve", tuple(prompt for prompts in tasks for prompt in prompts[:2]))
    write_prompts(tmp_path / "prompts.jsonl", twelve)
    (tmp_path / "evaluation.yaml").write_text(EVALUATION.format(folder=tmp_path, model=tiny_folder, seconds=1.0))
    command = ["evaluate", "geneval", "--config", str(tmp_path / "evaluation.yaml")]
    command += ["--seeds", "2", "--batch_size", "2", "--output"]
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    single = Workers(tmp_path, [*command, str(alone)])
    single.start()
    single.wait()

    workers = Workers(tmp_path, [*command, str(shared)])
    for rank in ("0", "1"):
        workers.start(RANK=rank, WORLD_SIZE="2")
    _wait_for(shared / "batches", 1, "00000.json")
    workers.kill()
    workers.wait()
    done = {path: path.stat().st_mtime_ns for path in shared.glob("batches/*.json")}
    assert {int(path.stem) for path in done} >= {0, *range(1, 12, 2)} and len(done) < 12
    assert not (shared / "summary.json").exists()

    for _ in range(2):
        workers.start()
    workers.wait()
    assert all(path.stat().st_mtime_ns == modified for path, modified in done.items())
    assert_same_files(alone, shared)
