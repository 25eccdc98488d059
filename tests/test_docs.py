"""What the documentation shows does what it says."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from genalign.cli import main

METHODS = Path(__file__).parents[1] / "docs" / "methods"


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
