"""A folder of measurements holds those of one base model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from genalign import assets
from scripts.benchmarks.base_weights import require_base, weights_digest


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base model of two files of weights."""
    for name in ("transformer", "vae"):
        (tmp_path / "model" / name).mkdir(parents=True)
        save_file({"w": torch.zeros(2)}, tmp_path / "model" / name / "model.safetensors")
    monkeypatch.setattr(assets, "resolve", lambda name: str(tmp_path / "model"))
    return tmp_path / "model"


def test_the_digest_tells_weights_apart(model: Path) -> None:
    before = weights_digest(model)
    (model / "README.md").write_text("says nothing about the weights")
    assert weights_digest(model) == before
    save_file({"w": torch.ones(2)}, model / "vae" / "model.safetensors")
    assert weights_digest(model) != before


def test_measurements_of_another_base_are_refused(model: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    require_base(work, "shapes-sd3")
    assert json.loads((work / "base.json").read_text()) == {"model": "shapes-sd3", "weights": weights_digest(model)}
    (work / "prices.json").write_text("{}")
    save_file({"w": torch.ones(2)}, model / "vae" / "model.safetensors")
    require_base(work, "shapes-sd3")  # nothing was measured yet
    (work / "pool").mkdir()
    (work / "pool" / "000.safetensors").touch()
    require_base(work, "shapes-sd3")
    save_file({"w": torch.full((2,), 3.0)}, model / "transformer" / "model.safetensors")
    with pytest.raises(
        SystemExit, match=r"work was made with other weights of shapes-sd3 than the present ones.*--work"
    ):
        require_base(work, "shapes-sd3")


def test_measurements_of_an_unknown_base_are_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "work" / "pool").mkdir(parents=True)
    (tmp_path / "work" / "pool" / "000.safetensors").touch()
    with pytest.raises(SystemExit, match="or does not say with which: delete it"):
        require_base(tmp_path / "work", "shapes-sd3")
