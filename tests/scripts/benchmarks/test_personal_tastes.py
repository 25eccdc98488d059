"""The bench of planted users: its tastes, and a run of a few rounds that writes its results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from scripts.benchmarks.personal_tastes import TASTES, UNSEEN, ExperimentSize, taste, users_part


def test_tastes_are_exact() -> None:
    red, gray = torch.zeros(1, 3, 4, 4), torch.full((1, 3, 4, 4), 0.5)
    red[:, 0] = 1
    assert [float(taste(user, red)) for user in TASTES] == pytest.approx([1.0, -0.5, -0.5, 1 / 3])
    assert float(taste(UNSEEN, red)) == pytest.approx(2 / 3)
    assert [float(taste(user, gray)) for user in (*TASTES, UNSEEN)] == pytest.approx([0, 0, 0, 0.5, 0.25])


@pytest.mark.slow
def test_the_bench_runs_and_resumes(tmp_path: Path) -> None:
    size = ExperimentSize(prompts=8, rounds=2, evaluated=4, steps=4)
    for _ in range(2):  # the second time nothing is trained
        users_part(tmp_path / "work", (1,), size, tmp_path / "results")
    rows = json.loads((tmp_path / "results" / "users_shapes.json").read_text())["rows"]
    between = [
        f"users.{name}" for name in ("unseen_over_bright", "red_over_unseen", "unseen_over_red", "bright_over_unseen")
    ]
    assert [row["name"] for row in rows] == [*(f"users.{user}" for user in TASTES), "users.unseen", *between]
