"""The command, end to end on the tiny pipeline, with a reward from a file outside the repository."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from genalign.cli.main import COMMANDS, main
from genalign.evaluation.evaluate import Record
from genalign.evaluation.folder import BatchFolder
from genalign.runtime.files import load_state

REWARDS = """
import torch

def redness(samples, prompts):
    return samples[:, 0].flatten(1).mean(1)

class Channel:
    def __init__(self, channel: int = 1):
        self.channel = channel

    def __call__(self, samples, prompts):
        return samples[:, self.channel].flatten(1).mean(1)

def shapeless(samples, prompts):
    return samples.mean()

pressed = []

def interrupting(samples, prompts):
    import os, signal
    if len(samples) > 2 and not pressed:  # not in the probe, and once: twice stops at once
        pressed.append(True)
        os.kill(os.getpid(), signal.SIGINT)
    return samples[:, 0].flatten(1).mean(1)
"""

CONFIG = """
output: {output}
model: {{path: {model}}}
recipe:
  class_path: genalign.algorithms.recipes.flow_grpo
  init_args: {{window: 1}}
rewards:
  red: {{function: outside_rewards.redness}}
sampling: {{num_steps: 3, sigmas: [1.0, 0.6, 0.3]}}
training: {{rounds: 2, prompts_per_round: 2, group_size: 2, batch_size: 2, updates_per_round: 2}}
lora: {{rank: 2}}
held_out: {{every: 1, samples_per_task: 1}}
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


def _error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 2
    return capsys.readouterr().err


def test_a_run_leaves_everything_behind(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    second = "rewards.green={function: {class_path: outside_rewards.Channel, init_args: {channel: 1}}, weight: 0.5}"
    assert main(["train", "--config", str(config), f"--{second}"]) == 0
    run = tmp_path / "run"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rows] == [0, 1]
    assert set(rows[0]["rewards"]) == {"red", "green"}
    assert set(rows[0]["held_out"]) == {"strict", "partial", "relaxed"}
    for name in ("config.json", "environment.json", "gain.json", "report.html", "checkpoints/latest/state.safetensors"):
        assert (run / name).is_file(), name
    for name in ("lora/pytorch_lora_weights.safetensors", "peft/adapter_model.safetensors", "before/summary.json"):
        assert (run / name).is_file(), name
    assert json.loads((run / "config.json").read_text())["training"]["rounds"] == 2
    assert set(json.loads((run / "gain.json").read_text())["strict"]) == {"mean", "low", "high", "n"}
    assert "overall" in capsys.readouterr().out
    assert "holds a run already" in _error(capsys, "train", "--config", str(config))
    assert main(["report", str(run)]) == 0


def test_a_network_trained_whole_is_saved_whole(config: Path, tmp_path: Path) -> None:
    short = ["--lora", "null", "--training.rounds", "1", "--before_after", "null", "--held_out.every", "0"]
    assert main(["train", "--config", str(config), *short]) == 0
    run = tmp_path / "run"
    assert not (run / "lora").exists()
    saved = list(SD3Transformer2DModel.from_pretrained(run / "denoiser").parameters())
    tensors, _ = load_state(run / "checkpoints" / "latest" / "state.safetensors")
    assert all(torch.equal(tensors[f"trainer.average.{index}"], parameter) for index, parameter in enumerate(saved))
    pairs = [(tensors[f"trainer.current.{i}"], tensors[f"trainer.average.{i}"]) for i in range(len(saved))]
    assert any(not torch.equal(current, average) for current, average in pairs)


def test_tensorboard_gets_every_number(config: Path, tmp_path: Path) -> None:
    assert main(["train", "--config", str(config), "--trackers", "[tensorboard]", "--before_after", "null"]) == 0
    events = EventAccumulator(str(tmp_path / "run" / "genalign"))
    events.Reload()
    rewards = [event.value for event in events.Scalars("reward")]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rewards == pytest.approx([row["reward"] for row in rows])
    assert "held_out/strict" in events.Tags()["scalars"]


def test_evaluation_of_a_run_equals_its_after(config: Path, tiny_folder: Path, tmp_path: Path) -> None:
    assert main(["train", "--config", str(config)]) == 0
    arguments = ["--model.path", str(tiny_folder), "--lora", str(tmp_path / "run" / "lora"), "--suite", "len"]
    arguments += ["--seeds", "1", "--samples_per_task", "2", "--batch_size", "6", "--output", str(tmp_path / "again")]
    sampling = ["--sampling.num_steps", "3", "--sampling.sigmas", "[1.0, 0.6, 0.3]"]
    assert main(["evaluate", "shapes", *arguments, *sampling]) == 0
    after, again = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("run/after", "again"))
    for estimates in (after["overall"], *after["tasks"].values()):
        del estimates["red"]  # the run's own reward stands beside the verifier's scores
    assert after == again


def test_a_killed_evaluation_goes_on(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["evaluate", "shapes", "--model.path", str(tiny_folder), "--suite", "len", "--seeds", "1"]
    arguments += ["--samples_per_task", "5", "--batch_size", "2", "--sampling.num_steps", "3"]
    arguments += ["--sampling.sigmas", "[1.0, 0.6, 0.3]", "--output"]
    assert main([*arguments, str(tmp_path / "whole")]) == 0
    add, asked = BatchFolder.add, BatchFolder.read

    def dying(folder: BatchFolder, number: int, records: Sequence[Record]) -> None:
        if number == 1:
            raise KeyboardInterrupt
        add(folder, number, records)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(BatchFolder, "add", dying)
        main([*arguments, str(tmp_path / "part")])
    assert not (tmp_path / "part" / "summary.json").exists()
    found: list[bool] = []

    def watched(folder: BatchFolder, number: int) -> list[Record] | None:
        records = asked(folder, number)
        found.append(records is not None)
        return records

    monkeypatch.setattr(BatchFolder, "read", watched)
    assert main([*arguments, str(tmp_path / "part")]) == 0
    assert found == [True, False, False]
    for name in ("records.jsonl", "summary.json", "images/00004.png"):
        assert (tmp_path / "part" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert main([*arguments, str(tmp_path / "part"), "--sampling.guidance", "2"]) == 2
    assert "holds an evaluation with other settings (protocol.guidance): choose another" in capsys.readouterr().err


def test_ctrl_c_ends_with_a_checkpoint(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)
    arguments = ["--rewards.red.function", "outside_rewards.interrupting", "--training.rounds", "9"]
    geometry = ["--training.group_size", "4", "--training.batch_size", "4"]
    assert main(["train", "--config", str(config), *arguments, *geometry]) == 130
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1
    assert (tmp_path / "run" / "checkpoints" / "round-000001" / "state.safetensors").is_file()
    assert "interrupted: everything so far is in" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is before


BAD = [
    (["--recipe.windw", "3"], "unknown setting 'windw': did you mean 'window'?"),
    (["--training.group_sise", "3"], "unknown setting 'training.group_sise': did you mean 'training.group_size'?"),
    (["--training.group_size", "1"], "group_size is 1: a group needs at least 2 samples to be compared"),
    (["--training.batch_size", "3"], "batch_size 3 must be a multiple of group_size 2"),
    (["--training.prompts_per_round", "3"], "3 x group_size 2 = 6 images do not divide into 2 updates of batches of 2"),
    (["--recipe.kernel", "ODE"], "needs a stochastic kernel, such as FlowSDE, CPS or DPMSDE"),
    (["--rewards.red.function", "outside_rewards.shapeless"], "reward 'red' returned shape () for 2 samples"),
    (["--rewards.red.function", "outside_rewards.nothing"], "outside_rewards"),
    (["--rewards.red.weight", "0"], "every reward has weight 0"),
    (["--model.path", "nowhere"], "is neither a folder nor a Hub id (owner/name)"),
    (["--prompts", "shapes:nope"], "unknown suite 'nope': choose one of train, val, iid, comp, len"),
    (["--prompts", "missing.txt"], "no prompt file missing.txt"),
    (["--lora.targets", '["nope"]'], "this network has no layer named nope: change lora.targets"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(arguments) for arguments, _ in BAD])
def test_bad_configurations_say_what_to_write(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert message in _error(capsys, "train", "--config", str(config), *arguments)
    assert not (tmp_path / "run").exists()


def test_prompts_without_metadata_for_a_reward_that_needs_it(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("a circle\na square\n")
    arguments = ["--prompts", str(tmp_path / "mine.txt"), "--rewards.red.function", "rewards.shapes.ShapesReward"]
    assert "metadata" in _error(capsys, "train", "--config", str(config), *arguments)


def test_help_names_every_command_and_waits_for_no_model_library() -> None:
    code = "import sys; from genalign.__main__ import main; main(); print('torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert [name for name in COMMANDS if f"\n  {name} " not in answer] == []
    assert answer.endswith("\nFalse\n")


def test_unknown_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no command 'trian'; did you mean 'train'?" in _error(capsys, "trian")
    assert "is not a run folder" in _error(capsys, "report", "no-such-run")
    assert "name the world: genalign evaluate shapes" in _error(capsys, "evaluate")
