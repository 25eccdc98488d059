"""Processes that share thousands of prompts process each of them once, although some of the processes are killed."""

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
from tests.packages import ROOT

PROCESSES, KILLS = 3, 8

SEARCH = """
output: {folder}/output
model: {{path: {model}}}
prompts: {folder}/prompts.txt
rewards: {{red: {{function: redness.redness}}}}
strategy: {{class_path: genalign.BestOfN}}
budget: {{nfe: 4}}
sampling: {{num_steps: 2, sigmas: [1.0, 0.5]}}
"""
REDNESS = """
def redness(samples, prompts):
    return samples[:, 0].flatten(1).mean(1)
"""
EVALUATION = """
output: {folder}/output
model: {{path: {model}}}
prompts: {folder}/prompts.jsonl
seeds: 1
sampling: {{num_steps: 2, sigmas: [1.0, 0.5], guidance: 1.0}}
judge:
  class_path: rewards.geneval.GenEvalJudge
  init_args:
    detector: {{class_path: tests.genalign.evaluation.geneval.shapes_judge.ShapesDetector}}
    colors: tests.genalign.evaluation.geneval.shapes_judge.PaletteColors
"""


class Workers:
    """Processes of one command without ranks, whose output goes to files."""

    def __init__(self, folder: Path, command: Sequence[str]) -> None:
        self.folder, self.started = folder, 0
        self.command = [sys.executable, "-m", "genalign", *command]
        self.running: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        environment = {**os.environ, "PYTHONPATH": f"{self.folder}:{ROOT}", "OMP_NUM_THREADS": "1"}
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

    def output_lines(self) -> list[str]:
        files = [self.folder / f"output-{number}.txt" for number in range(self.started)]
        return [line for file in files for line in file.read_text().splitlines()]


def _run_with_kills(folder: Path, command: Sequence[str], count: int) -> None:
    """Run a command on ``count`` prompts with several kills, and check that no prompt is reported twice."""
    workers = Workers(folder, command)
    for _ in range(PROCESSES):
        workers.start()
    for kill in range(1, KILLS + 1):
        _wait_for(folder / "output" / "prompts", kill * count // (KILLS + 1))
        workers.kill()
        workers.start()
    workers.wait()
    indices = [line.split("/")[0] for line in workers.output_lines() if f"/{count}  " in line]
    assert len(indices) == len(set(indices)) and count - KILLS <= len(indices) <= count  # a kill may precede a line
    assert not [path for path in (folder / "output").rglob("*") if path.suffix == ".part"]


def _wait_for(prompts: Path, rows: int) -> None:
    limit = time.monotonic() + 1800
    while len(list(prompts.glob("*.json"))) < rows:
        assert time.monotonic() < limit, "no prompts were finished in time"
        time.sleep(0.1)


@pytest.mark.slow
def test_every_prompt_is_searched_once_after_kills(tiny_folder: Path, tmp_path: Path) -> None:
    count, output = 10_000, tmp_path / "output"
    texts = [f"{number} red circles" for number in range(count)]
    (tmp_path / "prompts.txt").write_text("\n".join(texts))
    (tmp_path / "redness.py").write_text(REDNESS)
    (tmp_path / "search.yaml").write_text(SEARCH.format(folder=tmp_path, model=tiny_folder))
    _run_with_kills(tmp_path, ["steer", "--config", str(tmp_path / "search.yaml")], count)

    rows = [json.loads(line) for line in (output / "scores.jsonl").read_text().splitlines()]
    assert [(row["index"], row["prompt"]) for row in rows] == list(enumerate(texts))
    assert {output / row["image"] for row in rows} == {path for path in output.rglob("*.png") if path.is_file()}


@pytest.mark.slow
def test_every_prompt_is_evaluated_once_after_kills(tiny_folder: Path, tmp_path: Path) -> None:
    count, output = 1_000, tmp_path / "output"
    circle = {"tag": "single_object", "include": [{"class": "circle", "count": 1}]}
    texts = [f"circle number {number}" for number in range(count)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({**circle, "prompt": text}) for text in texts))
    (tmp_path / "evaluation.yaml").write_text(EVALUATION.format(folder=tmp_path, model=tiny_folder))
    _run_with_kills(tmp_path, ["evaluate", "geneval", "--config", str(tmp_path / "evaluation.yaml")], count)

    assert [record.prompt for record in load_evaluation(output).records] == texts
    images = sorted(path.relative_to(output / "images").as_posix() for path in output.rglob("*.png"))
    assert images == [f"{number:05d}/samples/0000.png" for number in range(count)]
