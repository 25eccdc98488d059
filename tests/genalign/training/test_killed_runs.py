"""A run that is killed at any moment resumes, and ends like an uninterrupted one.

Child processes are forked from a server that has imported everything, so that a kill costs little more than its rounds.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch

from genalign.cli import main
from genalign.runtime.files import load_state
from genalign.training import checkpointing
from genalign.training.checkpointing import Checkpoints
from genalign.training.run_folder import RunFolder
from genalign.types import Prompt
from pipelines import SD3
from tests.genalign.training.toy_runs import write_config, write_pool

REWARD = "tests.genalign.training.toy_runs.redness"

CHECKPOINT_WRITERS = (
    (checkpointing, ("save_state", "write_json", "sync", "_discard")),
    (os, ("rename", "replace")),
    (shutil, ("rmtree",)),
)


def train(arguments: Sequence[str], moment: int | None = None, seconds: float | None = None) -> None:
    """Train in this process, and kill it in call number ``moment`` of functions that write checkpoints, or in time."""
    calls = itertools.count(1)

    def killing(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if next(calls) == moment:
                if name == "save_state":  # within the file
                    arguments[0].parent.mkdir(parents=True, exist_ok=True)
                    arguments[0].write_bytes(b"half of it")
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)

        return call

    for module, names in CHECKPOINT_WRITERS:
        for name in names:
            setattr(module, name, killing(name, getattr(module, name)))
    if seconds is not None:
        timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()
    raise SystemExit(main.main(arguments))


# The system seeds these differently in every process, and nothing here draws from them
PER_PROCESS = ("generators.python", "generators.numpy")


class ChildRuns:
    """Runs of one configuration in child processes."""

    def __init__(self, context: ForkServerContext, work: Path, model: Path, rounds: int) -> None:
        self.context, self.work, self.model, self.rounds = context, work, model, rounds

    def config(self, name: str, pool: Path | None = None) -> Path:
        """Write the configuration of the run ``name``, which samples, or learns from a pool that has its score."""
        recipe = {"class_path": "genalign.algorithms.recipes.nft", "init_args": {"lag": {"slope": 0.3}}}
        sizes = {"prompts": "shapes:len", "samples_per_task": 1, "seeds": 1}
        path, training = self.work / f"{name}.json", dict[str, Any](rounds=self.rounds)
        held_out = {"every": 1, "prompts": "shapes:val", "samples_per_task": 1, "scorers": {"red": REWARD}}
        sections: dict[str, Any] = {"recipe": recipe, "before_after": sizes, "held_out": held_out}
        if pool is not None:
            training |= {"data": str(pool)}
            sections |= {"prompts": str(pool), "recipe": {"class_path": "genalign.dpo", "init_args": {"draws": 1}}}
        return write_config(path, self.model, REWARD, training, **sections)

    def train(self, *arguments: str, **kill: Any) -> int:
        """Run ``genalign train`` in a child; return its exit status, -9 for SIGKILL."""
        process = self.context.Process(target=train, args=(["train", *arguments],), kwargs=kill)
        process.start()
        process.join(300)
        assert process.exitcode is not None
        return process.exitcode


@pytest.fixture
def runs(request: pytest.FixtureRequest, tiny_folder: Path, tmp_path: Path) -> ChildRuns:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["genalign.cli.train", "pipelines", "peft", __name__])
    return ChildRuns(context, tmp_path, tiny_folder, getattr(request, "param", 3))


def _rows(run: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("machine")
    return rows


def _require_same_end(run: Path, unbroken: Path) -> None:
    assert _rows(run) == _rows(unbroken)
    adapters = [f"{folder}/pytorch_lora_weights.safetensors" for folder in ("lora", "lora-last")]
    for name in ("checkpoints/latest/state.safetensors", *adapters):
        first, second = (load_state(path / name)[0] for path in (run, unbroken))
        assert first.keys() == second.keys()
        assert [key for key in first if not torch.equal(first[key], second[key]) and key not in PER_PROCESS] == []
    chosen = [f"{folder}/held_out.json" for folder in ("lora", "peft/adapter", "after")]
    for name in ("gain.json", "before/records.jsonl", "after/records.jsonl", *chosen):
        assert (run / name).read_bytes() == (unbroken / name).read_bytes(), name


def _require_resumable(run: Path) -> int:
    """Require a checkpoint, with its adapter, after every logged round but the one in flight; return its rounds."""
    link = run / "checkpoints" / "latest"
    assert not link.is_symlink() or link.exists()
    checkpoint = Checkpoints(run / "checkpoints").latest()
    assert checkpoint is None or (checkpoint.path / "lora" / "pytorch_lora_weights.safetensors").is_file()
    rounds = checkpoint.rounds if checkpoint else 0
    lines = (run / "metrics.jsonl").read_text().count("\n") if (run / "metrics.jsonl").exists() else 0
    assert lines - 1 <= rounds <= lines
    return rounds


@pytest.mark.slow
def test_a_run_that_is_killed_while_saving_ends_like_an_uninterrupted_one(runs: ChildRuns) -> None:
    assert runs.train("--config", str(runs.config("unbroken"))) == 0
    arguments = ["--config", str(runs.config("run")), "--resume"]  # starts the run, too
    run = runs.work / "run"
    assert runs.train(*arguments, moment=70) == -9
    assert 0 < _require_resumable(run) < 3
    before = (run / "before" / "summary.json").stat().st_mtime_ns
    assert runs.train("--resume", str(run), moment=1) == -9
    assert runs.train("--resume", str(run)) == 0
    assert (run / "before" / "summary.json").stat().st_mtime_ns == before
    _require_same_end(run, runs.work / "unbroken")


@pytest.mark.slow
def test_an_offline_run_that_is_killed_ends_like_an_uninterrupted_one(runs: ChildRuns) -> None:
    prompts = [Prompt(f"{number} circles") for number in range(4)]
    pool = write_pool(SD3.load(runs.model), runs.work / "pool", prompts, group_size=3, scores=("red",))
    assert runs.train("--config", str(runs.config("unbroken", pool))) == 0
    assert runs.train("--config", str(runs.config("run", pool)), moment=70) == -9
    run = runs.work / "run"
    assert 0 < _require_resumable(run) < 3
    assert runs.train("--resume", str(run)) == 0
    _require_same_end(run, runs.work / "unbroken")
    assert "decode" not in _rows(run)[0]["calls"]  # nothing was sampled


@pytest.mark.slow
@pytest.mark.parametrize("runs", [6], indirect=True)
def test_fifty_kills_lose_nothing(runs: ChildRuns) -> None:
    """Kill half of the times within a save; a run that ends is followed by another, until there were fifty kills."""
    config, draw = runs.config("unbroken"), random.Random(0)
    assert runs.train("--config", str(config)) == 0
    kills, finished, rounds, duration = 0, 0, 0, 60.0
    while kills < 50:
        name = f"run-{finished}"
        run, arguments = runs.work / name, ["--config", str(runs.config(name)), "--resume"]
        kill = {"moment": draw.randint(1, 100)} if kills % 2 else {"seconds": draw.uniform(0, 0.7 * duration)}
        start = time.monotonic()
        if runs.train(*arguments, **kill) == -9:
            kills += 1
            rounds, before = _require_resumable(run), rounds
            assert rounds >= before
            continue
        _require_same_end(run, runs.work / "unbroken")
        finished, rounds, duration = finished + 1, 0, min(duration, time.monotonic() - start)
    assert runs.train(*arguments) == 0
    _require_same_end(run, runs.work / "unbroken")


@pytest.mark.slow
def test_a_resumed_run_may_have_more_rounds_and_no_other_settings(
    runs: ChildRuns, capfd: pytest.CaptureFixture[str]
) -> None:
    longer, run = runs.config("longer"), runs.work / "run"
    more = ["--training.rounds", "4", "--held_out.every", "0", "--before_after", "null"]
    assert runs.train("--config", str(longer), *more) == 0
    fewer = ["--training.rounds", "2", *more[2:]]
    assert runs.train("--config", str(runs.config("run")), *fewer) == 0
    assert main.main(["train", "--resume", str(run), "--training.learning_rate", "0.5"]) == 2
    assert "training.learning_rate was 0.01 and is 0.5: choose another output" in capfd.readouterr().err
    assert runs.train("--resume", str(run), "--training.rounds", "4") == 0
    assert _rows(run) == _rows(runs.work / "longer")
    assert json.loads((run / "config.json").read_text())["training"]["rounds"] == 4


def test_a_full_disk_ends_a_run_with_a_message_and_an_intact_checkpoint(
    runs: ChildRuns, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    config, run = runs.config("run"), runs.work / "run"
    append = RunFolder.append

    def full(folder: Any, row: Any) -> None:
        if row["round"] == 1:
            raise OSError(28, "No space left on device")
        append(folder, row)

    with monkeypatch.context() as patched:
        patched.setattr("genalign.training.run_folder.RunFolder.append", full)
        assert main.main(["train", "--config", str(config), "--before_after", "null"]) == 1
    assert f"Free some disk space. Resume with: genalign train --resume {run}" in capfd.readouterr().err
    assert _require_resumable(run) == 1
    assert main.main(["train", "--resume", str(run)]) == 0
    assert [row["round"] for row in _rows(run)] == [0, 1, 2]
