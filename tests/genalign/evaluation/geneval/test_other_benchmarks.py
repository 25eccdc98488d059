from __future__ import annotations

from pathlib import Path

import pytest

from genalign.evaluation.geneval.other_benchmarks import read_compbench, read_ocr


def test_compbench_files_become_tasks(tmp_path: Path) -> None:
    (tmp_path / "color_val.txt").write_text("a red bench and a blue bowl\n\na blue bench and a red bowl\n")
    (tmp_path / "3d_spatial_val.txt").write_text("a cat in front of a dog\n")
    (tmp_path / "color_val_seen.txt").write_text("a green cup\n")
    paths = [tmp_path / f"{name}.txt" for name in ("color_val", "3d_spatial_val", "color_val_seen")]
    assert [(prompt.task, prompt.text) for prompt in read_compbench(*paths).prompts] == [
        ("color", "a red bench and a blue bowl"),
        ("color", "a blue bench and a red bowl"),
        ("3d_spatial", "a cat in front of a dog"),
        ("color", "a green cup"),
    ]
    with pytest.raises(FileNotFoundError, match="no prompt file"):
        read_compbench(tmp_path / "shape_val.txt")


def test_ocr_prompts_have_the_quoted_text(tmp_path: Path) -> None:
    path = tmp_path / "signs.txt"
    path.write_text('A shop with the sign "Open Late" above "Closed"\nA wall that says “Hello”\n', encoding="utf-8")
    signs = read_ocr(path)
    assert signs.name == "signs" and signs.prompts[0].task == "ocr"
    assert [prompt.metadata["text"] for prompt in signs.prompts] == ["Open Late", "Hello"]
    path.write_text("a wall\n")
    with pytest.raises(ValueError, match=r"signs\.txt, prompt 1: no text in double quotes"):
        read_ocr(path)
