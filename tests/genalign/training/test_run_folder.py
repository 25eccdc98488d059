"""The record of a run in its folder."""

from __future__ import annotations

import json
from pathlib import Path

from genalign.training.run_folder import RunFolder


def test_a_run_records_when_it_started_and_ended(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.begin({"output": str(tmp_path)})
    assert "finished" not in json.loads((tmp_path / "environment.json").read_text())
    folder.finish()
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["started"]["date"] <= environment["finished"] and "genalign" in environment
