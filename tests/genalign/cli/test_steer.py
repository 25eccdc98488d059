"""genalign steer from the command line on the tiny pipeline."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from genalign.__main__ import main as entry
from genalign.cli.main import main
from genalign.runtime.files import Claims

STEER = """
output: {folder}/found
model: {{path: {model}}}
prompts: "shapes:val:position"
rewards: {{partial: {{function: {{class_path: rewards.shapes.ShapesReward}}}}}}
strategy: {{class_path: genalign.search.Prune, init_args: {{steps: [1], keep: [0.5]}}}}
budget: {{nfe: 12}}
sampling: {{num_steps: 3, sigmas: [1.0, 0.6, 0.3]}}
limit: 2
"""
ANY_TEXT = "{{class_path: rewards.shapes.ShapesReward}}", "tests.genalign.training.toy_runs.redness"


def config_file(folder: Path, text: str, **values: object) -> str:
    """Write a configuration, with ``values`` in its braces, and return its path."""
    path = folder / "config.yaml"
    path.write_text(text.format(folder=folder, **values))
    return str(path)


def scores_in(folder: Path) -> list[dict[str, Any]]:
    """Read the lines of scores.jsonl."""
    return [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]


def test_steer_writes_results_and_resumes(tiny_folder: Path, tmp_path: Path) -> None:
    config = ["steer", "--config", config_file(tmp_path, STEER, model=tiny_folder)]
    assert main(config) == 0
    found = tmp_path / "found"
    rows = scores_in(found)
    assert [row["index"] for row in rows] == [0, 1]
    assert rows[0]["finished"] <= rows[1]["finished"] <= datetime.now(UTC).isoformat()
    assert all(row["calls"]["nfe"] <= 12 and (found / row["image"]).is_file() for row in rows)
    (found / "prompts" / "00001.json").unlink()  # as an interruption would leave it
    (found / "scores.jsonl").unlink()
    kept = (found / "prompts" / "00000.json").stat().st_mtime_ns
    assert main(config) == 0
    assert (found / "prompts" / "00000.json").stat().st_mtime_ns == kept
    again = scores_in(found)
    for old, new in zip(rows, again, strict=True):
        assert {**old, "seconds": 0, "finished": ""} == {**new, "seconds": 0, "finished": ""}
    page = (found / "report.html").read_text()
    assert rows[0]["prompt"] in page and 'class="tree"' in page and "http:" not in page and "https:" not in page
    assert main([*config, "--limit", "3"]) == 0
    assert len(scores_in(found)) == 3
    assert main([*config, "--budget.nfe", "20"]) == 2  # another search


def test_steer_ranks_share_prompts(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, found = ["steer", "--config", config_file(tmp_path, STEER, model=tiny_folder)], tmp_path / "found"
    config += ["--limit", "4"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with monkeypatch.context() as divided:
        for name, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}.items():
            divided.setenv(name, value)
        assert main(config) == 2
    assert not found.exists() and "launch this command without FSDP" in capsys.readouterr().err
    assert main(config) == 0
    assert "2 of 4 prompts are unfinished" in capsys.readouterr().out
    assert [path.name for path in sorted((found / "prompts").iterdir())] == ["00001.json", "00003.json"]
    monkeypatch.setenv("RANK", "0")
    with Claims(found / "locks").try_claim(2):  # by a process that was started beside
        assert main(config) == 0
    assert not (found / "report.html").exists() and not (found / "prompts" / "00002.json").exists()
    assert main(config) == 0
    rows = scores_in(found)
    assert [row["index"] for row in rows] == [0, 1, 2, 3]


def test_steer_takes_texts_and_saves_the_best_four_with_the_plain_one(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "\n".join(line for line in STEER.splitlines() if not line.startswith(("prompts", "budget")))
    text = text.replace("keep: [0.5]", "keep: [0.5], candidates: 6").replace(*ANY_TEXT)
    config = ["steer", "--config", config_file(tmp_path, text, model=tiny_folder)]
    assert main([*config, "--prompt", "a red circle: small", "--prompt=a ring"]) == 0
    found = tmp_path / "found"
    first, second = scores_in(found)
    assert (first["prompt"], second["prompt"]) == ("a red circle: small", "a ring")
    best = [first["scores"]["partial"], *(one["scores"]["partial"] for one in first["top"])]
    assert len(best) == 3 and best == sorted(best, reverse=True)  # three are left of six
    guided = first["calls"]["nfe"] // (6 * 2 + 3 * 1)
    assert first["plain"]["calls"] == {"nfe": 3 * guided, "decode": 1, "reward/partial": 1}
    files = [first["image"], first["plain"]["image"], *(one["image"] for one in first["top"])]
    assert len(set(files)) == 4 and all((found / name).is_file() for name in files)
    lives = json.loads((found / "lineage" / "00000.json").read_text())["lives"]
    assert len(lives) == 6 and all(life["scores"] for life in lives)  # the scores of all candidates
    output = capsys.readouterr().out
    line = next(line for line in output.splitlines() if line.startswith("1/2  a red circle: small: partial "))
    assert "over plain sampling" in line and f"(plain: {3 * guided} NFE" in line
    page = (found / "report.html").read_text()
    assert "gain over plain sampling" in page and "Prune(steps=[1], keep=[0.5], candidates=6)" in page


def test_steer_wants_a_file_of_prompts_or_texts(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    without = "\n".join(line for line in STEER.splitlines() if not line.startswith("prompts"))
    for text, more in ((STEER, ["--prompt", "a ring"]), (without, [])):
        assert main(["steer", "--config", config_file(tmp_path, text, model=tiny_folder), *more]) == 2
        assert "give either prompts, a file as in --prompts prompts.txt, or texts" in capsys.readouterr().err


def test_steer_names_a_reward_that_never_scores(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = STEER.replace("class_path: rewards.shapes.ShapesReward", "class_path: tests.genalign.cli.test_steer.Raises")
    assert main(["steer", "--config", config_file(tmp_path, text, model=tiny_folder)]) == 2
    assert "reward 'partial' failed on a first batch: KeyError: 'color' (test_steer.py:" in capsys.readouterr().err
    assert not (tmp_path / "found").exists()


class Raises:
    """A reward that raises."""

    def __call__(self, samples: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        raise KeyError("color")


def test_steer_shows_its_phases_in_a_log(tiny_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="genalign"):
        assert main(["steer", "--config", config_file(tmp_path, STEER, model=tiny_folder)]) == 0
    phases = [record.message for record in caplog.records if record.name == "genalign.runtime.progress"]
    assert phases[0] == "loading" and phases[1] == "searching 0/2 prompts"


def test_no_character_of_a_prompt_ends_a_search(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", ascii_only)
    text = "\n".join(line for line in STEER.splitlines() if not line.startswith("prompts"))
    config = ["steer", "--config", config_file(tmp_path, text.replace(*ANY_TEXT), model=tiny_folder)]
    assert entry([*config, "--prompt", "café 猫"]) == 0
    ascii_only.flush()
    assert b"caf\\xe9 \\u732b: partial" in ascii_only.buffer.getvalue()
