"""Training on a user's own prompts: what evaluations take, what is on disk, and how a run ends early."""

from __future__ import annotations

import json
import logging
import os
import signal
import stat
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file

from genalign.cli import train as train_module
from genalign.cli.main import main
from genalign.cli.model_settings import Model
from genalign.cli.parsing import parse
from genalign.cli.run_prompts import RunPrompts
from genalign.cli.train_settings import Train
from genalign.cli.training_run import TrainingRun
from genalign.diffusion.policy import Lora
from genalign.evaluation.evaluate import load_evaluation
from genalign.metrics.intervals import Estimate
from genalign.runtime.distributed import ProcessGroup
from genalign.runtime.memory_options import Memory
from genalign.runtime.progress import Progress
from genalign.training.best_weights import HeldOutScores
from genalign.training.round_result import RoundResult
from genalign.training.settings import TrainerSettings
from genalign.training.trainer import Trainer
from tests.genalign.training.toy_runs import signals

PROMPTS = ["a red circle", "two blue squares", "a green circle", "a yellow square", "a blue triangle"]


@pytest.fixture
def arguments(tiny_folder: Path, tmp_path: Path) -> list[str]:
    """A run of two rounds on five prompts of a user's own."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    values = {
        "output": tmp_path / "run",
        "model.path": tiny_folder,
        "prompts": tmp_path / "prompts.txt",
        "recipe": "genalign.flow_grpo",
        "rewards.red.function": "tests.genalign.training.toy_runs.redness",
        "sampling": '{"num_steps": 2, "sigmas": [1.0, 0.5]}',
        "training": '{"rounds": 2, "group_size": 4, "learning_rate": 0.01}',
        "lora.rank": 2,
    }
    return ["train", *(f"--{name}={value}" for name, value in values.items())]


def _json(path: Path) -> Any:
    return json.loads(path.read_text())


def test_evaluations_take_a_split_of_own_prompts_and_own_rewards(arguments: list[str], tmp_path: Path) -> None:
    own = ["--held_out.every=1", "--before_after.seeds=2", "--reward_hacking.every=1"]
    own.append('--rewards.other={"function": "tests.genalign.training.toy_runs.careless", "weight": 0}')
    assert main([*arguments, *own]) == 0
    run = tmp_path / "run"
    prompts = _json(run / "prompts.json")
    assert {name: (part["prompts"], part.get("also_trained")) for name, part in prompts.items()} == {
        "training": (3, None),
        "held_out": (2, 0),
        "reward_hacking": (2, 0),
        "before_after": (2, 0),
    }
    records = [json.loads(line) for line in (run / "after" / "records.jsonl").read_text().splitlines()]
    assert len(records) == 4 and {record["prompt"] for record in records} < set(PROMPTS)  # two noises of each
    assert set(_json(run / "gain.json")["gain"]) == {"red", "other"}
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(set(row["held_out"]) == {"red", "other"} for row in rows)
    signals = {signal["name"] for signal in rows[0]["reward_hacking"]}
    assert "other" in signals and "red" not in signals  # which is trained on
    training = _json(run / "config.json")["training"]
    assert (training["prompts_per_round"], training["batch_size"], training["updates_per_round"]) == (2, 4, 2)
    assert load_evaluation(run / "after").protocol.batch_size == 4  # which fits, as the training samples do
    assert main(["train", "--resume", str(run), "--training.rounds", "3"]) == 0


def test_prompts_that_are_trained_on_too_are_named(
    arguments: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "some.txt").write_text("\n".join([*PROMPTS[:2], "a cat"]))
    assert main([*arguments, "--held_out.every=2", f"--held_out.prompts={tmp_path / 'some.txt'}"]) == 0
    assert "2 of the 3 prompts of held_out are trained on: its scores say nothing about new prompts" in caplog.text
    assert _json(tmp_path / "run" / "prompts.json")["held_out"]["also_trained"] == 2


def test_the_prompts_that_choose_the_weights_are_not_those_of_their_gain(
    arguments: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(f"{count} circles" for count in range(20)))
    halves = ["--held_out.every=1", "--before_after.seeds=1", "--training.rounds=1"]
    assert main([*arguments, *halves]) == 0
    run, warning = tmp_path / "run", "prompts of before_after are also used to select the weights"
    described = _json(run / "prompts.json")
    assert [described[name]["prompts"] for name in ("training", "held_out", "before_after")] == [16, 2, 2]
    assert described["held_out"]["suite_hash"] != described["before_after"]["suite_hash"]
    assert described["before_after"]["suite"] == "prompts (held out), half for before_after"
    assert warning not in caplog.text
    shared = [f"--{name}.prompts={tmp_path / 'prompts.txt'}" for name in ("held_out", "before_after")]
    settings, _ = parse(Train, [*arguments[1:], *halves, *shared], "train")
    RunPrompts.read(settings).warn()
    assert f"20 {warning}" in caplog.text


def test_the_best_weights_are_evaluated_and_named_in_the_last_line(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    means = iter((0.2, 0.4, 0.3))

    def held_out(run: TrainingRun) -> HeldOutScores:
        return HeldOutScores({}, "val", "red", Estimate(mean := next(means), mean - 0.1, mean + 0.1, 8))

    monkeypatch.setattr(TrainingRun, "evaluate_held_out", held_out)
    three = ["--held_out.every=1", "--before_after.seeds=1", "--training.rounds=3", "--checkpoint.keep=3"]
    assert main([*arguments, *three]) == 0
    run, name = tmp_path / "run", "lora/pytorch_lora_weights.safetensors"
    second, third = (load_file(run / "checkpoints" / f"round-00000{rounds}" / name) for rounds in (2, 3))
    best, last = load_file(run / name), load_file(run / f"lora-last/{Path(name).name}")
    assert all(torch.equal(second[key], best[key]) and torch.equal(third[key], last[key]) for key in best)
    assert any(not torch.equal(best[key], last[key]) for key in best)
    words = "the weights after round 2, the best of 3 evaluations on held-out prompts (val): red 0.400 (0.300 to 0.500)"
    assert capsys.readouterr().out.splitlines()[-1] == f"lora/: {words}; lora-last/: those after round 3"
    assert f"Evaluated after training: {words}." in (run / "report.html").read_text()
    pairs = [load_evaluation(run / "after").records]
    evaluate = ["evaluate", "prompts", f"--model.path={_json(run / 'config.json')['model']['path']}", f"--lora={run}"]
    size = [
        "--sampling.num_steps=2",
        "--sampling.sigmas=[1.0,0.5]",
        "--seeds=1",
        f"--prompts={tmp_path / 'prompts.txt'}",
    ]
    reward = ["--rewards.red.function=tests.genalign.training.toy_runs.redness", f"--output={tmp_path / 'again'}"]
    assert main([*evaluate, *size, *reward]) == 0
    again = {(r.prompt, r.seed): r.scores["red"] for r in load_evaluation(tmp_path / "again").records}
    assert all(again[r.prompt, r.seed] == pytest.approx(r.scores["red"], abs=1e-5) for r in pairs[0])


def test_a_run_ends_at_its_seconds_and_is_evaluated_by_them(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds, train_round = iter(range(4, 100, 4)), Trainer._round

    def timed(trainer: Trainer, *of_round: Any) -> RoundResult:
        result = train_round(trainer, *of_round)
        trainer.seconds = float(next(seconds))
        return replace(result, seconds=trainer.seconds)

    monkeypatch.setattr(Trainer, "_round", timed)
    run, limits = tmp_path / "run", ["--training.rounds=50", "--held_out.every_seconds=7", "--max_seconds=22"]
    assert main([*arguments, *limits]) == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [bool(row["held_out"]) for row in rows] == [True, True, False, True, False, True]  # at 4, 8, 16 and the end
    assert rows[-1]["machine"]["seconds"] == 24 and "lora/: the weights after round" in capsys.readouterr().out
    assert "not finished" not in (run / "report.html").read_text()
    assert main(["train", "--resume", str(run)]) == 0  # is over already
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 6
    assert main(["train", "--resume", str(run), "--max_seconds=27"]) == 0
    later = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert later["machine"]["seconds"] == 28 and later["held_out"]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--max_seconds=0", "max_seconds must be positive, not 0"),
        ("--held_out.every_seconds=-1", "held_out.every_seconds must be positive, not -1"),
    ],
)
def test_impossible_times_are_refused(
    arguments: list[str], error: Callable[..., str], argument: str, message: str
) -> None:
    assert message in error(*arguments, argument)


def test_the_monitor_compares_two_prompts_or_more(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\na dog")
    assert main([*arguments, "--reward_hacking.every=1"]) == 2
    assert not (tmp_path / "run").exists()


def test_checkpoints_hold_the_adapter_that_a_run_that_ended_there_would_write(
    arguments: list[str], tiny_folder: Path, tmp_path: Path
) -> None:
    assert main([*arguments, "--checkpoint.keep=2"]) == 0
    run = tmp_path / "run"
    folders = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert folders == ["latest", "round-000001", "round-000002"]
    first, last, end = (
        load_file(folder / "lora" / "pytorch_lora_weights.safetensors")
        for folder in (run / "checkpoints" / "round-000001", run / "checkpoints" / "latest", run)
    )
    assert all(torch.equal(last[name], end[name]) for name in end)
    assert any(not torch.equal(first[name], last[name]) for name in end)
    pipe = StableDiffusion3Pipeline.from_pretrained(tiny_folder)
    pipe.load_lora_weights(run / "checkpoints" / "round-000001" / "lora")
    loaded = dict(pipe.transformer.named_parameters())
    assert sum("lora_" in name for name in loaded) == len(first)


def test_files_are_readable_by_others_as_the_umask_grants(arguments: list[str], tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        assert main([*arguments, "--before_after.seeds=1", "--sample_grid.every=1"]) == 0
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(files) > 15
    assert [path for path in files if stat.S_IMODE(path.stat().st_mode) != 0o640] == []


@pytest.mark.parametrize(
    ("number", "status", "name"), [(signal.SIGTERM, 143, "SIGTERM"), (signal.SIGINT, 130, "Ctrl-C")]
)
def test_a_signal_ends_a_run_after_its_round(
    arguments: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    number: int,
    status: int,
    name: str,
) -> None:
    signals.extend([signal.SIGTERM] * 2 if number == signal.SIGTERM else [number])  # a launcher passes it on again
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    reward = "--rewards.red.function=tests.genalign.training.toy_runs.signaling"
    assert main([*arguments, reward, "--training.rounds=9", "--training.group_size=8"]) == status
    run = tmp_path / "run"
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 1 and (run / "lora").is_dir()
    assert (run / "checkpoints" / "latest").resolve().name == "round-000001"
    assert f"{name}: the run ends after this round and is saved" in caplog.text
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("Training stopped at round 1: ") and line.endswith(f"genalign train --resume {run}")
    assert {s: signal.getsignal(s) for s in handlers} == handlers


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("begun", [False, True])
def test_a_signal_while_nothing_is_trained_is_one_line(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: int,
    status: int,
    begun: bool,
) -> None:
    def interrupted(*_: object) -> None:
        signal.raise_signal(number)

    monkeypatch.setattr(TrainingRun, "evaluate_before" if begun else "__init__", interrupted)
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores Ctrl-C
    try:
        assert main(arguments) == status
    finally:
        signal.signal(signal.SIGINT, previous)
    printed = capsys.readouterr()
    expected = f"Resume with: genalign train --resume {tmp_path / 'run'}"
    assert printed.out.count("\n") == 1 and "Traceback" not in printed.err
    assert printed.out.endswith(f"{expected if begun else 'Nothing was written: run the same command again'}\n")


def test_every_phase_of_a_run_is_logged_with_its_counts(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(train_module, "Progress", partial(Progress, seconds=0.0))  # every line, not one in 30 s
    caplog.set_level(logging.INFO, "genalign")
    evaluated = ["--held_out.every=1", "--before_after.seeds=2", "--reward_hacking.every=1", "--sample_grid.every=1"]
    assert main([*arguments, *evaluated]) == 0
    for line in (
        "before, sampling 4/4 samples",
        "training 0/2 rounds, sampling 8/8 samples",
        "scoring 4/8 samples",
        "updates 1/2 updates",
        "training 0/2 rounds, held-out, sampling",
        "reward hacking, sampling",
        "sample grid, sampling",
        "after, sampling 4/4 samples",
    ):
        assert any(line in message for message in caplog.messages), line


def test_a_finished_run_that_is_resumed_shows_no_reward_that_is_not_a_number(
    arguments: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert main(arguments) == 0
    caplog.set_level(logging.INFO, "genalign")
    caplog.clear()
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    assert "training 2/2 rounds" in caplog.messages and "nan" not in caplog.text


def test_a_run_says_when_and_by_which_command_it_began(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("sys.argv", ["genalign", *arguments])
    assert main(arguments) == 0
    run = tmp_path / "run"
    started = _json(run / "environment.json")["started"]
    assert started["command"] == ["genalign", *arguments] and started["date"].startswith("20")
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert row["machine"]["time"] >= started["date"]
    assert main(["train", "--resume", str(run), "--training.rounds=3"]) == 0
    assert "may differ" not in caplog.text and _json(run / "environment.json")["started"] == started


@pytest.mark.parametrize(
    ("model", "advice"),
    [
        (Model("x", compile=True), r"model\.compile: leave it out"),
        (Model("x", memory=Memory(quantization="int8")), r"model\.memory\.quantization: leave it out"),
    ],
)
def test_fsdp_refuses_what_it_was_not_tested_with(monkeypatch: pytest.MonkeyPatch, model: Model, advice: str) -> None:
    for name, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}.items():
        monkeypatch.setenv(name, value)
    settings: Any = SimpleNamespace(model=model, lora=Lora(), training=TrainerSettings())
    with pytest.raises(ValueError, match=advice):
        train_module._sharding(settings, ProcessGroup(0, 2))


def test_the_sampling_kernel_is_a_setting_of_training_and_of_evaluations(
    arguments: list[str], tmp_path: Path, error: Callable[..., str]
) -> None:
    own = ["--sampling.kernel=CPS", "--sampling.kernel.eta=1.0", "--before_after.seeds=1"]
    assert main([*arguments, *own]) == 0
    recorded = _json(tmp_path / "run" / "config.json")["sampling"]["kernel"]
    assert recorded["class_path"].endswith("CPS") and recorded["init_args"] == {"eta": 1.0}
    assert load_evaluation(tmp_path / "run" / "after").protocol.kernel == "CPS(eta=1.0)"
    resumed = ["train", "--resume", str(tmp_path / "run")]
    assert main(resumed) == 0  # the run has ended
    assert "sampling.kernel.init_args.eta was 1.0 and is 0.5" in error(*resumed, "--sampling.kernel.eta=0.5")
    arguments[1] = f"--output={tmp_path / 'other'}"
    assert "sampling.kernel FlowSDE(noise_level=0.7) ends in noise" in error(*arguments, "--sampling.kernel=FlowSDE")
