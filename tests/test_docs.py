"""What the documentation shows does what it says."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest
import yaml

from genalign import config
from genalign.cli import main

METHODS = Path(__file__).parents[1] / "docs" / "methods"
REWARDS = (METHODS.parent / "rewards.md").read_text()
AUDIO = (METHODS.parent / "audio.md").read_text()


def test_the_added_method_trains(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(# my_methods\.py\n.*?)```", (METHODS / "add_a_method.md").read_text(), re.DOTALL)
    functions = code[code.index("def ranks") :]
    assert len([line for line in functions.splitlines() if line.strip()]) < 20
    (tmp_path / "my_methods.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    small = ["--training.rounds", "1", "--training.prompts_per_round", "2", "--training.group_size", "4"]
    small += ["--training.batch_size", "4", "--before_after", "null", "--held_out.every", "0", "--lora.rank", "2"]
    chosen = ["--recipe", "my_methods.rank_grpo", "--recipe.window", "3", "--model.path", str(tiny_folder)]
    try:
        assert main(["demo", "--output", str(tmp_path / "run"), *chosen, *small]) == 0
    finally:
        sys.modules.pop("my_methods", None)
    assert (tmp_path / "run" / "lora").is_dir()


def test_the_own_reward_keeps_to_the_contract(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(r"```python\n(# my_scores\.py\n.*?)```", REWARDS, re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) < 20
    (tmp_path / "my_scores.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    (command,) = re.findall(r"genalign (reward check my_scores:\w+ --args.*)", REWARDS)
    try:
        assert main([*command.split(), "--count", "4"]) == 0, capsys.readouterr().out
    finally:
        sys.modules.pop("my_scores", None)


@pytest.mark.parametrize("block", re.findall(r"```yaml\n(.*?)```", REWARDS + AUDIO, re.DOTALL))
def test_shown_configurations_are_taken(tmp_path: Path, block: str) -> None:
    whole = {"rewards": {"size": {"function": "rewards.jpeg.compressibility"}}, "output": "runs/x"}
    whole |= {"recipe": {"class_path": "genalign.recipes.flow_grpo"}, **yaml.safe_load(block)}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(whole))
    settings, _ = config.parse(config.Train, ["--config", str(tmp_path / "run.yaml")], "train")
    assert set(settings.rewards) == set(whole["rewards"])


def test_named_objects_are_there() -> None:
    names = set(re.findall(r"`((?:rewards|genalign)\.[a-z_.]+\.[A-Za-z]\w+)", REWARDS + AUDIO))
    names |= {f"rewards.combined.{name}" for name in re.findall(r"^\| `(\w+)\(", REWARDS, re.MULTILINE)}
    assert len(names) > 30
    for name in names:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name
