"""SIGKILL at any moment: the run goes on, and ends as one that nothing happened to.

Children are forked from a server that has imported everything, so that a kill costs little more than its rounds.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import sys
import time
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch

from genalign.cli import main
from genalign.runtime.files import load_state
from genalign.training.checkpointing import Checkpoints
from genalign.training.run import RunFolder

VICTIM = '''
"""A training that dies by its own hand, once its checkpoints have been at work so many times."""
import os
import signal
import threading

from genalign.cli import main
from genalign.training import checkpointing

begun = 0


def _deadly(module, name, last):
    original = getattr(module, name)

    def call(*arguments, **options):
        global begun
        begun += 1
        if begun == last and name == "save_state":  # within the file
            path = arguments[0]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"half of it")
        if begun == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    setattr(module, name, call)


def train(arguments, moment=None, seconds=None):
    if moment is not None:
        for name in ("save_state", "write_json", "sync", "_discard"):
            _deadly(checkpointing, name, moment)
        for name in ("rename", "replace"):
            _deadly(checkpointing.os, name, moment)
        _deadly(checkpointing.shutil, "rmtree", moment)
    if seconds is not None:
        timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()
    raise SystemExit(main.main(arguments))


def redness(samples, prompts):
    return samples[:, 0].flatten(1).mean(1)
'''

CONFIG = """
output: {output}
model: {{path: {model}}}
recipe:
  class_path: genalign.algorithms.recipes.nft
  init_args: {{lag: {{slope: 0.3}}}}
rewards:
  red: {{function: killed_run.redness}}
sampling: {{num_steps: 2, sigmas: [1.0, 0.5]}}
training: {{rounds: {rounds}, prompts_per_round: 2, group_size: 2, batch_size: 2, learning_rate: 0.01}}
lora: {{rank: 2}}
held_out: {{every: 2, samples_per_task: 1}}
before_after: {{prompts: "shapes:len", samples_per_task: 1, seeds: 1}}
"""


OWN = ("generators.python", "generators.numpy")
"""What the system seeds differently in every process, and nothing here draws from."""


class Killing:
    """Runs of one configuration in processes of their own."""

    def __init__(self, context: ForkServerContext, work: Path, model: Path, rounds: int) -> None:
        self.context, self.work, self.model, self.rounds = context, work, model, rounds

    def config(self, name: str) -> Path:
        """The file of a run in a folder of its own."""
        path = self.work / f"{name}.yaml"
        path.write_text(CONFIG.format(output=self.work / name, model=self.model, rounds=self.rounds))
        return path

    def train(self, *arguments: str, **death: Any) -> int:
        """The exit status; -9 for SIGKILL."""
        import killed_run  # type: ignore[import-not-found]  # what the fixture wrote

        process = self.context.Process(target=killed_run.train, args=(["train", *arguments],), kwargs=death)
        process.start()
        process.join(300)
        assert process.exitcode is not None
        return process.exitcode


@pytest.fixture
def killing(
    request: pytest.FixtureRequest, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Killing]:
    (tmp_path / "killed_run.py").write_text(VICTIM)
    monkeypatch.syspath_prepend(str(tmp_path))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["genalign.cli.main", "torch"])
    yield Killing(context, tmp_path, tiny_folder, getattr(request, "param", 3))
    sys.modules.pop("killed_run", None)


def _rows(run: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("machine")
    return rows


def _require_same_end(run: Path, unbroken: Path) -> None:
    assert _rows(run) == _rows(unbroken)
    for name in ("checkpoints/latest/state.safetensors", "lora/pytorch_lora_weights.safetensors"):
        first, second = (load_state(path / name)[0] for path in (run, unbroken))
        assert first.keys() == second.keys()
        assert [key for key in first if not torch.equal(first[key], second[key]) and key not in OWN] == []
    for name in ("gain.json", "before/records.jsonl", "after/records.jsonl"):
        assert (run / name).read_bytes() == (unbroken / name).read_bytes(), name


def _require_resumable(run: Path) -> int:
    """How many rounds are kept: all that have a line, but for the one in flight."""
    link = run / "checkpoints" / "latest"
    assert not link.is_symlink() or link.exists()
    found = Checkpoints(run / "checkpoints").latest()
    lines = (run / "metrics.jsonl").read_text().count("\n") if (run / "metrics.jsonl").exists() else 0
    assert lines - 1 <= (found.rounds if found else 0) <= lines
    return found.rounds if found else 0


def test_a_run_that_is_killed_in_its_saves_ends_as_any_other(killing: Killing) -> None:
    assert killing.train("--config", str(killing.config("unbroken"))) == 0
    arguments = ["--config", str(killing.config("run")), "--resume"]  # begins it, too
    run = killing.work / "run"
    assert killing.train(*arguments, moment=45) == -9
    assert 0 < _require_resumable(run) < 3
    before = (run / "before" / "summary.json").stat().st_mtime_ns
    assert killing.train("--resume", str(run), moment=1) == -9
    assert killing.train("--resume", str(run)) == 0
    assert (run / "before" / "summary.json").stat().st_mtime_ns == before
    _require_same_end(run, killing.work / "unbroken")


@pytest.mark.slow
@pytest.mark.parametrize("killing", [6], indirect=True)
def test_fifty_kills_lose_nothing(killing: Killing) -> None:
    """Half of them within a save; a run that reaches its end is followed by the next, until there were fifty."""
    config, draw = killing.config("unbroken"), random.Random(0)
    assert killing.train("--config", str(config)) == 0
    kills, runs, kept, whole = 0, 0, 0, 60.0
    while kills < 50:
        run, arguments = killing.work / f"run-{runs}", ["--config", str(killing.config(f"run-{runs}")), "--resume"]
        death = {"moment": draw.randint(1, 60)} if kills % 2 else {"seconds": draw.uniform(0, 0.7 * whole)}
        began = time.monotonic()
        if killing.train(*arguments, **death) == -9:
            kills += 1
            kept, before = _require_resumable(run), kept
            assert kept >= before
            continue
        _require_same_end(run, killing.work / "unbroken")
        runs, kept, whole = runs + 1, 0, min(whole, time.monotonic() - began)
    assert killing.train(*arguments) == 0
    _require_same_end(run, killing.work / "unbroken")


def test_more_rounds_keep_the_first_and_other_settings_are_refused(
    killing: Killing, capfd: pytest.CaptureFixture[str]
) -> None:
    longer, run = killing.config("longer"), killing.work / "run"
    more = ["--training.rounds", "4", "--held_out.every", "0", "--before_after", "null"]
    assert killing.train("--config", str(longer), *more) == 0
    fewer = ["--training.rounds", "2", *more[2:]]
    assert killing.train("--config", str(killing.config("run")), *fewer) == 0
    assert main.main(["train", "--resume", str(run), "--training.learning_rate", "0.5"]) == 2
    assert "training.learning_rate was 0.01 and is 0.5: choose another output" in capfd.readouterr().err
    assert killing.train("--resume", str(run), "--training.rounds", "4") == 0
    assert _rows(run) == _rows(killing.work / "longer")
    assert json.loads((run / "config.json").read_text())["training"]["rounds"] == 4


def test_a_full_disk_ends_a_run_with_a_message_and_a_whole_checkpoint(
    killing: Killing, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    config, run = killing.config("run"), killing.work / "run"
    append = RunFolder.append

    def full(folder: Any, row: Any) -> None:
        if row["round"] == 1:
            raise OSError(28, "No space left on device")
        append(folder, row)

    with monkeypatch.context() as patched:
        patched.setattr("genalign.training.run.RunFolder.append", full)
        assert main.main(["train", "--config", str(config), "--before_after", "null"]) == 1
    assert f"Free some disk space. Resume with: genalign train --resume {run}" in capfd.readouterr().err
    assert _require_resumable(run) == 1
    assert main.main(["train", "--resume", str(run)]) == 0
    assert [row["round"] for row in _rows(run)] == [0, 1, 2]
