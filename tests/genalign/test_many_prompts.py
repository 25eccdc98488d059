"""Ten thousand prompts searched by processes that are killed now and then: each once, and none left out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

COUNT, PROCESSES, KILLS = 10_000, 3, 8

CONFIG = """
output: {folder}/found
model: {{path: {model}}}
prompts: {folder}/prompts.txt
rewards: {{red: {{function: redness.redness}}}}
strategy: {{class_path: genalign.search.BestOfN}}
budget: {{forwards: 4}}
sampling: {{num_steps: 2, sigmas: [1.0, 0.5]}}
"""
REDNESS = """
def redness(samples, prompts):
    return samples[:, 0].flatten(1).mean(1)
"""


class Workers:
    """Processes that are started by hand on one search; ``printed`` has what all of them have said."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.started = folder, 0
        self.running: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        told = {**os.environ, "PYTHONPATH": str(self.folder), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "genalign.cli", "steer", "--config", str(self.folder / "steer.yaml")]
        with (self.folder / f"printed-{self.started}.txt").open("wb") as printed:
            self.running.append(subprocess.Popen(command, env=told, stdout=printed))
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


@pytest.mark.slow
def test_every_prompt_is_searched_once_after_kills(tiny_folder: Path, tmp_path: Path) -> None:
    texts = [f"{number} red circles" for number in range(COUNT)]
    (tmp_path / "prompts.txt").write_text("\n".join(texts))
    (tmp_path / "redness.py").write_text(REDNESS)
    (tmp_path / "steer.yaml").write_text(CONFIG.format(folder=tmp_path, model=tiny_folder))
    workers, found = Workers(tmp_path), tmp_path / "found"
    for _ in range(PROCESSES):
        workers.start()
    for kill in range(1, KILLS + 1):
        _wait_for(found / "prompts", kill * COUNT // (KILLS + 1))
        workers.kill()
        workers.start()
    workers.end()

    rows = [json.loads(line) for line in (found / "scores.jsonl").read_text().splitlines()]
    assert [(row["index"], row["prompt"]) for row in rows] == list(enumerate(texts))
    assert {found / row["image"] for row in rows} == {path for path in found.rglob("*.png") if path.is_file()}
    said = [line.split("/")[0] for line in workers.printed() if f"/{COUNT}  " in line]
    assert len(said) == len(set(said)) and COUNT - KILLS <= len(said) <= COUNT  # a kill may come before a line
    assert not [path for path in found.rglob("*") if path.suffix == ".part"]


def _wait_for(prompts: Path, rows: int) -> None:
    limit = time.monotonic() + 1800
    while len(list(prompts.glob("*.json"))) < rows:
        assert time.monotonic() < limit, "no prompts were finished in time"
        time.sleep(0.1)
