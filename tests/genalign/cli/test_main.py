"""genalign train, evaluate and report, end to end on the tiny pipeline, with a reward from outside the repository."""

from __future__ import annotations

import json
import logging
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import SD3Transformer2DModel
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from genalign.cli.commands import COMMANDS
from genalign.cli.main import main
from genalign.runtime.files import load_state
from genalign.training.round_log import flat_numbers

REWARDS = """
import torch

def redness(samples, prompts):
    return samples[:, 0].flatten(1).mean(1)

class Channel:
    def __init__(self, channel: int = 1):
        self.channel = channel

    def __call__(self, samples, prompts):
        return samples[:, self.channel].flatten(1).mean(1)

pressed = []

def interrupting(samples, prompts):
    import os, signal
    if len(samples) > 2 and not pressed:  # after the probe, and once: the second Ctrl-C stops at once
        pressed.append(True)
        os.kill(os.getpid(), signal.SIGINT)
    return samples[:, 0].flatten(1).mean(1)
"""

CONFIG = """
output: {output}
model: {{path: {model}}}
prompts: "shapes:train"
recipe:
  class_path: genalign.flow_grpo
  init_args: {{window: 1}}
rewards:
  red: {{function: outside_rewards.redness}}
sampling: {{num_steps: 3, sigmas: [1.0, 0.6, 0.3]}}
training: {{rounds: 2, prompts_per_round: 2, group_size: 2, batch_size: 2, updates_per_round: 2}}
lora: {{rank: 2}}
held_out: {{every: 1, prompts: "shapes:val", samples_per_task: 1}}
before_after: {{prompts: "shapes:len", samples_per_task: 2, seeds: 1, batch_size: 6}}
"""


@pytest.fixture
def config(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "outside_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(str(tmp_path))
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG.format(output=tmp_path / "run", model=tiny_folder))
    yield path
    sys.modules.pop("outside_rewards", None)


def _rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_writes_metrics_weights_evaluations_and_a_report(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], error: Callable[..., str]
) -> None:
    second = "rewards.green={function: {class_path: outside_rewards.Channel, init_args: {channel: 1}}, weight: 0.5}"
    assert main(["train", "--config", str(config), f"--{second}"]) == 0
    run = tmp_path / "run"
    rows = _rows(run)
    assert [row["round"] for row in rows] == [0, 1]
    assert set(rows[0]["rewards"]) == {"red", "green"}
    assert set(rows[0]["held_out"]) == {"strict", "partial", "relaxed"}
    files = "config.json environment.json gain.json report.html checkpoints/latest/state.safetensors"
    files += " before/summary.json lora/pytorch_lora_weights.safetensors peft/adapter/adapter_model.safetensors"
    assert [name for name in files.split() if not (run / name).is_file()] == []
    assert json.loads((run / "config.json").read_text())["training"]["rounds"] == 2
    assert set(json.loads((run / "gain.json").read_text())["gain"]["strict"]) == {"mean", "low", "high", "n"}
    output = capsys.readouterr().out
    assert "overall" in output and "strict: no verdict from " in output
    assert "holds a run already" in error("train", "--config", str(config))
    assert main(["report", str(run)]) == 0


def test_training_without_lora_saves_the_whole_network(config: Path, tmp_path: Path) -> None:
    short = ["--lora", "null", "--training.rounds", "1", "--before_after", "null", "--held_out.every", "0"]
    assert main(["train", "--config", str(config), *short]) == 0
    run = tmp_path / "run"
    assert not (run / "lora").exists()
    saved = list(SD3Transformer2DModel.from_pretrained(run / "denoiser").parameters())
    tensors, _ = load_state(run / "checkpoints" / "latest" / "state.safetensors")
    assert all(torch.equal(tensors[f"trainer.average.{index}"], parameter) for index, parameter in enumerate(saved))
    pairs = [(tensors[f"trainer.current.{i}"], tensors[f"trainer.average.{i}"]) for i in range(len(saved))]
    assert any(not torch.equal(current, average) for current, average in pairs)


def test_tensorboard_receives_every_metric(config: Path, tmp_path: Path) -> None:
    monitor = "--reward_hacking.every 1 --reward_hacking.prompts shapes:val --reward_hacking.samples_per_task 2"
    grid = "--trackers [tensorboard] --before_after null --sample_grid.every 1 --sample_grid.count 3"
    arguments = [*monitor.split(), *grid.split()]
    assert main(["train", "--config", str(config), *arguments]) == 0
    events = EventAccumulator(str(tmp_path / "run" / "genalign"))
    events.Reload()
    for step, row in enumerate(_rows(tmp_path / "run")):
        for tag, value in flat_numbers(row).items():
            assert events.Scalars(tag)[step].value == pytest.approx(value, rel=1e-6), tag
    shifts = {f"reward_hacking/{signal['name']}" for signal in row["reward_hacking"]}
    names = {"rewards/red", "calls/decode", "learning_rate", "held_out/strict", "machine/seconds"}
    assert shifts | names <= set(events.Tags()["scalars"])
    assert [image.step for image in events.Images("samples")] == [0, 1]
    (file,) = (tmp_path / "run" / "genalign").glob("*/hparams.yml")
    settings = yaml.safe_load(file.read_text())
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert settings["training.rounds"] == stored["training"]["rounds"]
    assert json.loads(settings["sampling.sigmas"]) == stored["sampling"]["sigmas"]


def test_trackers_receive_flat_metrics() -> None:
    estimate = {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 9}
    row = {"reward": 1.0, "kl": None, "metrics": {"d/loss": 2.0}, "held_out": {"strict": estimate, "mine": estimate}}
    row |= {"sample_grid": ["a"]}
    row |= {"reward_hacking": [{"name": "grid", "before": 0.0, "shift": estimate, "status": "green"}]}
    ends = {"": 0.5, "/low": 0.4, "/high": 0.6, "/n": 9}
    names = ("held_out/strict", "held_out/mine", "reward_hacking/grid")
    estimates = {f"{name}{end}": value for name in names for end, value in ends.items()}
    assert flat_numbers(row) == {"reward": 1.0, "metrics/d/loss": 2.0, **estimates}


@pytest.mark.slow
def test_a_sample_grid_does_not_change_the_training(config: Path, tmp_path: Path) -> None:
    def trained(name: str, *arguments: str) -> list[dict[str, Any]]:
        run = ["--config", str(config), "--before_after", "null", "--output", str(tmp_path / name)]
        assert main(["train", *run, *arguments]) == 0
        return _rows(tmp_path / name)

    plain = trained("plain")
    rows = trained("grid", "--sample_grid.every", "1", "--sample_grid.count", "5")
    assert [row.pop("sample_grid") for row in rows] == [["samples/round-000001.png"], ["samples/round-000002.png"]]
    for row in (*plain, *rows):
        row.pop("machine")
        row.pop("sample_grid", None)
    assert rows == plain
    paths = [tmp_path / name / "checkpoints" / "latest" / "state.safetensors" for name in ("plain", "grid")]
    (one, _), (two, _) = map(load_state, paths)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    with Image.open(tmp_path / "grid" / "samples" / "round-000001.png") as image:
        assert image.width > image.height  # three columns, two rows


@pytest.mark.parametrize(
    ("settings", "measured"),
    [([], "held-out #, KL #, clip fraction #"), (["--recipe", "genalign.nft", "--held_out.every", "0"], "KL #")],
    ids=["all", "what is not measured is left out"],
)
def test_every_round_is_a_log_line_without_a_terminal(
    config: Path, caplog: pytest.LogCaptureFixture, settings: list[str], measured: str
) -> None:
    assert main(["train", "--config", str(config), "--before_after", "null", *settings]) == 0
    lines = [record.message for record in caplog.records if record.levelno == logging.INFO]
    rest = r"NFE #, # (samples/s|s/sample), ETA 0:00:00, memory # GiB"
    pattern = rf"round 2/2: reward # \(red #\), {measured}, {rest}".replace("#", r"[-+\d.e]+")
    assert lines[0].startswith("reading") and lines[1].startswith("loading") and "training 0/2 rounds" in lines
    assert re.fullmatch(pattern, lines[-1]), lines
    assert sum(line.startswith("round ") for line in lines) == 2


def test_a_run_of_0_1_0_is_refused_and_left_unchanged(config: Path, tmp_path: Path, error: Callable[..., str]) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "environment.json").write_text('{"genalign": "0.1.0"}')
    (run / "config.json").write_text('{"recipe": {"class_path": "genalign.recipes.flow_grpo"}}')
    (run / "metrics.jsonl").write_text("{}\n")
    before = {path: path.read_bytes() for path in run.iterdir()}
    export = ["export", "--run", str(run), "--output", str(tmp_path / "exported")]
    resumed = (["train", "--resume", str(run)], ["train", "--config", str(config), "--resume"])
    for arguments in (*resumed, ["report", str(run)], export):
        message = error(*arguments)
        assert f"{run} was made by genalign 0.1.0, whose runs this version cannot read" in message
        assert message.count("\n") == 1
    assert {path: path.read_bytes() for path in run.iterdir()} == before


def test_evaluating_a_run_gives_the_evaluation_after_training(config: Path, tiny_folder: Path, tmp_path: Path) -> None:
    assert main(["train", "--config", str(config)]) == 0
    arguments = ["--model.path", str(tiny_folder), "--lora", str(tmp_path / "run" / "lora"), "--prompts", "shapes:len"]
    arguments += ["--seeds", "1", "--samples_per_task", "2", "--batch_size", "6", "--output", str(tmp_path / "again")]
    sampling = ["--sampling.num_steps", "3", "--sampling.sigmas", "[1.0, 0.6, 0.3]"]
    assert main(["evaluate", "shapes", *arguments, *sampling]) == 0
    after, again = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("run/after", "again"))
    for estimates in (after["overall"], *after["tasks"].values()):
        del estimates["red"]  # the run's own reward stands beside the verifier's scores
    assert after == again


def test_ctrl_c_ends_a_run_with_a_checkpoint(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)
    arguments = ["--rewards.red.function", "outside_rewards.interrupting", "--training.rounds", "9"]
    geometry = ["--training.group_size", "4", "--training.batch_size", "4"]
    assert main(["train", "--config", str(config), *arguments, *geometry]) == 130
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1
    assert (tmp_path / "run" / "checkpoints" / "round-000001" / "state.safetensors").is_file()
    assert "Training stopped at round 1: interrupted. Resume with: genalign train --resume" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is before


def test_help_names_every_command_without_importing_torch() -> None:
    code = "import sys; from genalign.__main__ import main; main(); print('torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert [name for name in COMMANDS if f"\n  {name} " not in answer] == []
    assert answer.endswith("\nFalse\n")
