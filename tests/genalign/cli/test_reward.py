"""genalign reward check and genalign serve from the command line, with rewards from a file outside the repository."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from genalign.cli.main import main
from genalign.cli.reward import reward_version
from genalign.scoring import protocol
from genalign.types import Prompt
from rewards.remote.http_client import Patience
from rewards.remote.remote_reward import RemoteReward
from tests.packages import ROOT

REWARDS = """
from dataclasses import dataclass

import torch

def redness(samples, prompts):
    return samples[:, 0].flatten(1).mean(1)

@dataclass
class Channel:
    channel: int
    flipped: bool = False

    def __call__(self, samples, prompts):
        scores = samples[:, self.channel].flatten(1).mean(1)
        return scores.flip(0) if self.flipped else scores

def loudness(samples, prompts):
    return samples.square().flatten(1).mean(1)

def counted(images, prompts, **metadata):
    return [float(len(prompt)) for prompt in prompts]

def shapeless(samples, prompts):
    return samples[:, 0, 0, 0, 0]

def in_numpy(samples, prompts):
    return torch.from_numpy(samples.cpu().numpy().std((1, 2, 3)))
"""

SHAPES = ["--samples", "shapes:val"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "outside_scores.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")  # of the table
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("outside_scores", None)


def test_a_reward_is_checked(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reward", "check", "outside_scores:redness", "--expected.gradient", "true", *SHAPES]) == 0
    assert "every check passed" in capsys.readouterr().out
    channel = ["reward", "check", "outside_scores:Channel", "--args.channel", "1", *SHAPES]
    assert main(channel) == 0
    capsys.readouterr()
    assert main([*channel, "--args.flipped", "true"]) == 1
    printed = capsys.readouterr().out
    assert "failed: order" in printed and "return the scores" in printed


def test_the_traceback_of_a_failing_check_is_printed_on_request(
    folder: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    for debug in ([], ["--debug"]):
        caplog.clear()
        assert main(["reward", "check", "outside_scores:shapeless", *SHAPES, *debug]) == 1
        printed = " ".join(capsys.readouterr().out.split())
        assert "raised IndexError: too many indices for tensor" in printed and "(outside_scores.py:" in printed
        assert ("return samples[:, 0, 0, 0, 0]" in caplog.text) == bool(debug)


def test_a_reward_in_numpy_passes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reward", "check", "outside_scores:in_numpy", *SHAPES]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "every check passed" in printed and "black-box reward" in printed


def test_other_ways_to_name_a_reward(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = "{class_path: outside_scores.Channel, init_args: {channel: 2}}"
    assert main(["reward", "check", "--reward", whole, "--count", "4", "--size", "32", *SHAPES]) == 0
    (folder / "check.yaml").write_text(f"reward: {whole}\nsamples: shapes:val\n")
    assert main(["reward", "check", "--config", "check.yaml", "--count", "4"]) == 0
    adapted = ["rewards.adapters:Adapted", "--args.function", "outside_scores.counted", *SHAPES]
    assert main(["reward", "check", *adapted, "--expected.prompts", "true"]) == 1
    assert "failed: sensitivity" in capsys.readouterr().out


def test_own_samples(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"file_name": f"{n}.png", "prompt": f"image {n}", "tag": "x"} for n in range(4)]
    for n, row in enumerate(rows):
        Image.new("RGB", (6, 8), (40 * n, 10, 200)).save(folder / row["file_name"])
    (folder / "prompts.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    assert main(["reward", "check", "outside_scores:redness", "--samples", str(folder)]) == 0
    sounds = folder / "sounds"
    sounds.mkdir()
    for n in range(4):
        (sounds / f"{n}.wav").write_bytes(protocol.encode_audio(torch.randn(1, 500) * (n + 1) / 10, 8000))
    lines = [json.dumps({"file_name": f"{n}.wav", "prompt": f"sound {n}"}) for n in range(4)]
    (sounds / "prompts.jsonl").write_text("\n".join(lines))
    capsys.readouterr()
    assert main(["reward", "check", "outside_scores:loudness", "--samples", str(sounds)]) == 0
    assert "JPEG" not in capsys.readouterr().out


BAD = [
    (["reward", "check"], "reward is missing, as in genalign reward check rewards.clip.ClipReward"),
    (["serve"], "reward is missing, as in genalign serve rewards.clip.ClipReward"),
    (["reward", "check", "outside_scores:nothing"], " has no "),
    (["reward", "check", "outside_scores:Channel", "--args.chanel", "1"], "unknown setting 'reward.chanel'"),
    (["reward", "check", "outside_scores:redness"], "name the samples to score: --samples FOLDER"),
    (["reward", "check", "outside_scores:redness", *SHAPES, "--count", "2"], "at least 4 images"),
    (["reward", "check", "outside_scores:redness", "--samples", "nowhere"], "write a line with file_name and prompt"),
    (["serve", "outside_scores:redness", "--host", "0.0.0.0"], "set a token in the environment variable"),
    (["serve", "outside_scores:redness", "--prot", "1"], "unknown setting 'prot': did you mean 'port'?"),
]


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(arguments) for arguments, _ in BAD])
def test_bad_input_gets_a_one_line_message(
    arguments: list[str], message: str, error: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GENALIGN_TOKEN", raising=False)
    assert message in error(*arguments)


def test_a_version_depends_on_the_content_of_the_files(folder: Path) -> None:
    weights = folder / "model" / "weights.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"one")
    other = folder / "head.pt"
    other.write_bytes(b"x")
    setting = {"class_path": "outside_scores.Channel", "init_args": {"model": "model", "parts": [{"head": "head.pt"}]}}
    name, first = reward_version(setting)
    assert name == "outside_scores.Channel" and reward_version(setting) == (name, first)
    weights.write_bytes(b"two")
    second = reward_version(setting)[1]
    other.write_bytes(b"y")
    third = reward_version(setting)[1]
    renamed = reward_version({**setting, "init_args": {"model": "elsewhere"}})[1]
    assert len({first, second, third, renamed}) == 4
    assert reward_version("outside_scores.redness")[0] == "outside_scores.redness"
    reward_version({"class_path": "judges.Judge", "init_args": {"question": "a question " * 500}})


@pytest.mark.slow
def test_a_served_reward_is_used_and_stopped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GENALIGN_TOKEN": "s3cret", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "genalign", "serve", "outside_scores:Channel", "--args.channel", "1"]
    process = subprocess.Popen(
        [*command, "--port", "0"], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("serving outside_scores.Channel ")
        monkeypatch.setenv("GENALIGN_TOKEN", "s3cret")
        samples = torch.rand(6, 3, 4, 4).mul(255).round().div(255)
        reward = RemoteReward(line.split(" at ")[1].strip(), version=line.split()[2], patience=Patience(timeout=300))
        scores = reward(samples, [Prompt(f"p{n}") for n in range(6)])
        torch.testing.assert_close(scores, samples[:, 1].flatten(1).mean(1), atol=1e-6, rtol=0)
        process.send_signal(signal.SIGINT)
        assert process.wait(300) == 0 and "stopped" in process.stdout.read()
    finally:
        process.kill()
        process.communicate()
