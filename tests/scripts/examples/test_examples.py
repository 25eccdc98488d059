"""The example for a pipeline of one's own, run as it is."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from tests.packages import ROOT
from tests.pipelines.tiny_checkpoints import FAMILIES

SCRIPT = ROOT / "scripts" / "examples" / "steer_diffusers_pipeline.py"


# the Euler scheduler makes an array of a tensor without NumPy 2's keyword
@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")
# FLUX makes pictures of its default size, which takes half a minute
@pytest.mark.parametrize("family", ["sdxl", pytest.param("flux", marks=pytest.mark.slow)])
def test_it_runs_on_a_tiny_checkpoint(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["steer_pipeline.py", str(FAMILIES[family].save(tmp_path / "own")), "a", "shapes-clip"]
    )
    runpy.run_path(str(SCRIPT), run_name="__main__")
    told = [line.split("reward")[0].strip() for line in capsys.readouterr().out.splitlines() if " NFE" in line]
    assert told == ["best of 8", "FK steering", "pruning"] and (tmp_path / "steered.png").exists()
