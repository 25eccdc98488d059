"""Thousands of prompts, searched or evaluated by processes that are killed now and then: each once, none left out."""

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
output: {folder}/made
model: {{path: {model}}}
prompts: {folder}/prompts.txt
rewards: {{red: {{function: redness.redness}}}}
strategy: {{class_path: genalign.search.BestOfN}}
budget: {{nfe: 4}}
sampling: {{num_steps: 2, sigmas: [1.0, 0.5]}}
"""
REDNESS = """
def redness(samples, prompts):
    return samples[:, 0].flatten(1).mean(1)
"""
EVALUATION = """
output: {folder}/made
model: {{path: {model}}}
prompts: {folder}/prompts.jsonl
seeds: 1
sampling: {{num_steps: 2, sigmas: [1.0, 0.5], guidance: 1.0}}
judge:
  class_path: rewards.geneval.GenEvalJudge
  init_args:
    detector: {{class_path: tests.genalign.evaluation.geneval.shapes_judge.ShapesDetector}}
    colours: tests.genalign.evaluation.geneval.shapes_judge.PaletteColours
"""


class Workers:
    """Processes that are started by hand on one command; ``printed`` has what all of them have said."""

    def __init__(self, folder: Path, command: Sequence[str]) -> None:
        self.folder, self.started = folder, 0
        self.command = [sys.executable, "-m", "genalign", *command]
        self.running: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        told = {**os.environ, "PYTHONPATH": f"{self.folder}:{ROOT}", "OMP_NUM_THREADS": "1"}
        with (self.folder / f"printed-{self.started}.txt").open("wb") as printed:
            self.running.append(subprocess.Popen(self.command, env=told, stdout=printed, cwd=self.folder))
        self.started += 1

    def kill(self) -> None:
        """The one that has run for longest."""
        process = self.running.pop(0)
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL

    def end(self) -> None:
        assert [process.wait(1800) for process in self.running] == [0] * len(self.running)

    def printed(self) -> list[str]:
        files = [self.folder / f"printed-{number}.txt" for number in range(self.started)]
        return [line for file in files for line in file.read_text().splitlines()]


def _killed_now_and_then(folder: Path, command: Sequence[str], count: int) -> None:
    """Processes make ``count`` prompts; none says twice that it made one."""
    workers = Workers(folder, command)
    for _ in range(PROCESSES):
        workers.start()
    for kill in range(1, KILLS + 1):
        _wait_for(folder / "made" / "prompts", kill * count // (KILLS + 1))
        workers.kill()
        workers.start()
    workers.end()
    said = [line.split("/")[0] for line in workers.printed() if f"/{count}  " in line]
    assert len(said) == len(set(said)) and count - KILLS <= len(said) <= count  # a kill may come before a line
    assert not [path for path in (folder / "made").rglob("*") if path.suffix == ".part"]


def _wait_for(prompts: Path, rows: int) -> None:
    limit = time.monotonic() + 1800
    while len(list(prompts.glob("*.json"))) < rows:
        assert time.monotonic() < limit, "no prompts were finished in time"
        time.sleep(0.1)


@pytest.mark.slow
def test_every_prompt_is_searched_once_after_kills(tiny_folder: Path, tmp_path: Path) -> None:
    count, made = 10_000, tmp_path / "made"
    texts = [f"{number} red circles" for number in range(count)]
    (tmp_path / "prompts.txt").write_text("\n".join(texts))
    (tmp_path / "redness.py").write_text(REDNESS)
    (tmp_path / "search.yaml").write_text(SEARCH.format(folder=tmp_path, model=tiny_folder))
    _killed_now_and_then(tmp_path, ["steer", "--config", str(tmp_path / "search.yaml")], count)

    rows = [json.loads(line) for line in (made / "scores.jsonl").read_text().splitlines()]
    assert [(row["index"], row["prompt"]) for row in rows] == list(enumerate(texts))
    assert {made / row["image"] for row in rows} == {path for path in made.rglob("*.png") if path.is_file()}


@pytest.mark.slow
def test_every_prompt_is_evaluated_once_after_kills(tiny_folder: Path, tmp_path: Path) -> None:
    count, made = 1_000, tmp_path / "made"
    circle = {"tag": "single_object", "include": [{"class": "circle", "count": 1}]}
    texts = [f"circle number {number}" for number in range(count)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({**circle, "prompt": text}) for text in texts))
    (tmp_path / "evaluation.yaml").write_text(EVALUATION.format(folder=tmp_path, model=tiny_folder))
    _killed_now_and_then(tmp_path, ["evaluate", "geneval", "--config", str(tmp_path / "evaluation.yaml")], count)

    assert [record.prompt for record in load_evaluation(made).records] == texts
    images = sorted(path.relative_to(made / "images").as_posix() for path in made.rglob("*.png"))
    assert images == [f"{number:05d}/samples/0000.png" for number in range(count)]
