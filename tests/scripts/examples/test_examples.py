"""Every example runs as it is shown, with arguments that make it short."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from tests.packages import ROOT
from tests.pipelines.tiny_checkpoints import FAMILIES

EXAMPLES = ROOT / "scripts" / "examples"
SHORT = {
    "train_own_reward": ["--rounds", "1", "--prompts", "2"],
    "add_a_method": ["--rounds", "1", "--prompts", "2"],
    "train_audio": ["--rounds", "1", "--prompts", "2", "--samples", "2"],
    "evaluate_two_models": ["--rounds", "1", "--prompts", "2", "--samples", "2"],
    "steer_diffusers_pipeline": [],
}
LAST_LINE = {
    "train_own_reward": "LoRA saved to",
    "add_a_method": "rank_grpo: reward by round",
    "train_audio": "clip.wav",
    "evaluate_two_models": "95% interval",
    "steer_diffusers_pipeline": "over plain sampling",
}


def _run(name: str, arguments: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


def test_every_example_is_run() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(SHORT)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORT)
def test_an_example_runs_on_the_embedded_model(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _run(name, SHORT[name], tmp_path, monkeypatch)
    assert LAST_LINE[name] in capsys.readouterr().out.splitlines()[-1]


# the Euler scheduler makes an array of a tensor without NumPy 2's keyword
@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")
# FLUX generates images of its default size, which takes half a minute
@pytest.mark.parametrize("family", ["sdxl", pytest.param("flux", marks=pytest.mark.slow)])
def test_a_pipeline_of_another_family_is_steered(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = str(FAMILIES[family].save(tmp_path / "own"))
    _run("steer_diffusers_pipeline", [checkpoint, "a", "shapes-clip"], tmp_path, monkeypatch)
    lines = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines() if " NFE" in line]
    assert lines == ["best of 8", "FK steering", "pruning"] and (tmp_path / "steered.png").exists()
