"""The two hello-world programs of the README run as they are shown."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from diffusers import StableDiffusion3Pipeline

from genalign import assets
from rewards.jpeg import compressibility
from tests.packages import ROOT

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


def _block(word: str) -> str:
    (block,) = (block for block in BLOCKS if word in block)
    return block


def _lines(block: str) -> int:
    return len([line for line in block.splitlines() if line.strip()])


def test_evaluate_and_train_in_ten_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    block = _block("genalign.train(")
    assert _lines(block) <= 10
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})
    assert re.match(r"[+-]\d\.\d{3} \(", capsys.readouterr().out)
    assert (tmp_path / "runs" / "small" / "lora").is_dir()


def test_steering_in_five_lines() -> None:
    block = _block("with steer(")
    assert _lines(block) <= 5
    pipe = StableDiffusion3Pipeline.from_pretrained(assets.resolve("shapes-sd3"))
    pipe.set_progress_bar_config(disable=True)
    names = {"pipe": lambda *args, **call: pipe(*args, num_inference_steps=4, max_sequence_length=8, **call)}
    source = block.replace("steer(pipe,", "steer(own,")  # fewer steps, for the test alone
    values = {**names, "own": pipe, "reward": compressibility}
    exec(compile(source, "README.md", "exec"), values)
    assert values["image"].size == (64, 64) and len(values["steering"].scores) == 8
