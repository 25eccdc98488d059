"""genalign steer, prices and train-noise-aware from the command line on the tiny pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

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
AWARE = """
output: {folder}/aware
model: {{path: {model}}}
prompts: "shapes:val"
held_out: "shapes:val"
rewards: {{partial: {{function: {{class_path: rewards.clip.ClipReward, init_args: {{model: shapes-clip}}}}}}}}
student:
  class_path: rewards.noise_aware.{student}
sampling: {{num_steps: 3, sigmas: [1.0, 0.6, 0.3]}}
steps: [0, 1]
count: 3
limit: 4
batch_size: 6
distillation: {{epochs: 1, batch_size: 6}}
"""


def _config(folder: Path, text: str, **values: object) -> str:
    path = folder / "config.yaml"
    path.write_text(text.format(folder=folder, **values))
    return str(path)


def _rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]


def test_steer_writes_results_and_resumes(tiny_folder: Path, tmp_path: Path) -> None:
    config = ["steer", "--config", _config(tmp_path, STEER, model=tiny_folder)]
    assert main(config) == 0
    found = tmp_path / "found"
    rows = _rows(found)
    assert [row["index"] for row in rows] == [0, 1]
    assert all(row["calls"]["nfe"] <= 12 and (found / row["image"]).is_file() for row in rows)
    (found / "prompts" / "00001.json").unlink()  # as an interruption would leave it
    (found / "scores.jsonl").unlink()
    kept = (found / "prompts" / "00000.json").stat().st_mtime_ns
    assert main(config) == 0
    assert (found / "prompts" / "00000.json").stat().st_mtime_ns == kept
    again = _rows(found)
    for old, new in zip(rows, again, strict=True):
        assert {**old, "seconds": 0} == {**new, "seconds": 0}
    page = (found / "report.html").read_text()
    assert rows[0]["prompt"] in page and 'class="tree"' in page and "http:" not in page and "https:" not in page
    assert main([*config, "--limit", "3"]) == 0
    assert len(_rows(found)) == 3
    assert main([*config, "--budget.nfe", "20"]) == 2  # another search


def test_steer_ranks_share_prompts(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, found = ["steer", "--config", _config(tmp_path, STEER, model=tiny_folder)], tmp_path / "found"
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
    rows = _rows(found)
    assert [row["index"] for row in rows] == [0, 1, 2, 3]


def test_prices_writes_json(tiny_folder: Path, tmp_path: Path) -> None:
    reward = "--rewards.partial.function=rewards.shapes.ShapesReward"
    small = ["--prompts", "shapes:val", "--batch_size", "2", "--repeats", "1", "--sampling.num_steps", "3"]
    path = tmp_path / "prices.json"
    assert main(["prices", "--output", str(path), "--model.path", str(tiny_folder), reward, *small]) == 0
    prices = json.loads(path.read_text())
    assert set(prices) == {"nfe", "decode", "reward/partial"} and min(prices.values()) > 0


@pytest.mark.parametrize(
    "student",
    [
        "LatentScorer\n  init_args: {model: shapes-clip, channels: 4, scale: 4, width: 16, depth: 1, hidden: 16}",
        "ClipScorer\n  init_args: {model: shapes-clip, hidden: 16}",
    ],
    ids=["latents", "samples"],
)
def test_train_noise_aware_then_steer(tiny_folder: Path, tmp_path: Path, student: str) -> None:
    assert main(["train-noise-aware", "--config", _config(tmp_path, AWARE, model=tiny_folder, student=student)]) == 0
    made = tmp_path / "aware" / "scorer.safetensors"
    scorer = f"{{class_path: rewards.noise_aware.load_scorer, init_args: {{path: {made}, least_tau: -1.0}}}}"
    steer = ["steer", "--config", _config(tmp_path, STEER, model=tiny_folder), f"--strategy.scorer={scorer}"]
    assert main(steer) == 0
    (first, _) = _rows(tmp_path / "found")
    assert first["calls"]["reward/noise-aware"] > 0


def test_train_noise_aware_is_deterministic(tiny_folder: Path, tmp_path: Path) -> None:
    student = "ClipScorer\n  init_args: {model: shapes-clip, hidden: 16}"
    weights = []
    for seed in (0, 0, 1):
        folder = tmp_path / str(len(weights))
        folder.mkdir()
        config = _config(folder, AWARE, model=tiny_folder, student=student)
        assert main(["train-noise-aware", "--config", config, "--seed", str(seed)]) == 0
        weights.append((folder / "aware" / "scorer.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]
