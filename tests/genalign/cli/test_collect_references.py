"""``genalign collect --references``: folders that ``ReferencesByPrompt`` reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from genalign.cli.main import main
from genalign.types import Prompt
from rewards.backbones.reference_images import ReferencesByPrompt
from rewards.jpeg import incompressibility

SIZE = {"size": {"function": "rewards.jpeg.incompressibility"}}


def _config(path: Path, model: Path | str, **settings: object) -> str:
    (path.parent / "prompts.txt").write_text("a red circle\ntwo blue squares\na red circle\n")
    own = {
        "output": str(path.with_suffix("")),
        "model": {"path": str(model)},
        "prompts": str(path.parent / "prompts.txt"),
        "sampling": {"num_steps": 2, "guidance": 1.0},
        "samples_per_prompt": 3,
        "batch_size": 4,
    }
    path.write_text(yaml.safe_dump(own | settings))
    return str(path)


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_references_of_a_model_are_read_by_prompt_and_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, folder = _config(tmp_path / "real.yaml", "shapes-sd3"), tmp_path / "real"
    assert main(["collect", "--references", "--config", config]) == 0
    assert f"references: {folder}, 6 samples of 2 prompts\n" in capsys.readouterr().out
    references = ReferencesByPrompt.read(folder)
    assert [references.rows(Prompt(text)) for text in ("a red circle", "two blue squares")] == [(0, 1, 2), (3, 4, 5)]
    images = references.images.load(range(6))
    assert images.shape == (6, 3, 64, 64) and len({image.numpy().tobytes() for image in images}) == 6
    before = _contents(folder)
    (folder / "images" / "00005.png").unlink()  # as if it had been killed within the second part
    (folder / ".references" / "00001.jsonl").unlink()
    (folder / "prompts.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"prompts\.jsonl is missing"):
        ReferencesByPrompt.read(folder)
    first = (folder / "images" / "00000.png").stat().st_mtime_ns
    assert main(["collect", "--config", config, "--references"]) == 0
    assert _contents(folder) == before and (folder / "images" / "00000.png").stat().st_mtime_ns == first


def test_references_of_a_search_score_more_than_plain_samples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    strategy = {"class_path": "genalign.BestOfN", "init_args": {"candidates": 3}}
    searched = {"references": True, "rewards": SIZE, "strategy": strategy, "samples_per_prompt": 2}
    folder = tmp_path / "best"
    assert main(["collect", "--config", _config(tmp_path / "best.yaml", "shapes-sd3", **searched)]) == 0
    out = capsys.readouterr().out
    assert "4 samples of 2 prompts; size " in out and " over plain sampling)" in out
    references = ReferencesByPrompt.read(folder)
    rows = [json.loads(path.read_text()) for path in sorted((folder / ".references").glob("*.jsonl"))]
    assert [row["prompt"] for row in rows] == ["a red circle"] * 2 + ["two blue squares"] * 2
    scores = incompressibility(references.images.load(range(4)), [Prompt(row["prompt"]) for row in rows])
    torch.testing.assert_close(torch.tensor([row["scores"]["size"] for row in rows]), scores.float())
    assert all(row["scores"]["size"] >= row["plain"]["size"] for row in rows)
    assert any(row["scores"]["size"] > row["plain"]["size"] for row in rows)


def test_wrong_settings_of_references_are_named(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def error(name: str, **settings: object) -> str:
        assert main(["collect", "--config", _config(tmp_path / f"{name}.yaml", tiny_folder, **settings)]) == 2
        return capsys.readouterr().err

    best = {"class_path": "genalign.BestOfN", "init_args": {"candidates": 2}}
    references = {"references": True}
    assert "have no effect on references without a strategy" in error("a", **references, rewards=SIZE)
    assert "rewards is empty" in error("b", **references, strategy=best)
    assert "give prompts instead of samples" in error("c", **references, samples=str(tmp_path))
    assert "strategy and budget are for references: set references" in error("d", rewards=SIZE, strategy=best)
    own = {**references, "samples_per_prompt": 1}
    assert main(["collect", "--config", _config(tmp_path / "e.yaml", tiny_folder, **own)]) == 0
    assert "holds references of other settings: choose another output" in error("e", **own, seed=1)
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "pool.json").write_text("{}")
    assert "holds pool.json, not references: choose another output" in error("f", **own)
