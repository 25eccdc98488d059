"""The notebook is code that runs: a fast check of its cells, and a slow one that executes them in order."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

from tests.packages import ROOT

NOTEBOOK = ROOT / "notebooks" / "genalign.ipynb"


def code_cells() -> list[str]:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def test_the_notebook_parses_and_stores_no_outputs() -> None:
    content = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert content["nbformat"] == 4 and all("id" in cell for cell in content["cells"])
    for source in code_cells():
        ast.parse(source)
    outputs = [cell for cell in content["cells"] if cell.get("outputs") or cell.get("execution_count")]
    assert outputs == []


def test_links_of_the_notebook_exist() -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    text = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    links = [part.split(")")[0] for part in text.split("](")[1:]]
    assert links and all((NOTEBOOK.parent / link).is_file() for link in links)


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """About a minute of computation: steering, ten rounds of training, two evaluations."""
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    for source in code_cells():
        exec(compile(source, "notebook", "exec"), scope)
    assert scope["found"].scores.mean() > 0.5
    assert scope["history"][-1].reward > scope["history"][0].reward + 0.02
    gain = scope["genalign"].gain(scope["before"], scope["after"])["redness"]
    assert gain.has_interval and gain.low > 0
    assert (tmp_path / "runs" / "notebook" / "lora" / "pytorch_lora_weights.safetensors").is_file()
