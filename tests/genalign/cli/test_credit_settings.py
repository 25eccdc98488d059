"""Credits from the YAML of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from genalign.algorithms.interfaces import RoundScores
from genalign.cli import parsing
from genalign.cli.train_settings import Train

CREDITS = "genalign.algorithms.credit"
SCALED = {"class_path": f"{CREDITS}.TaskNormalized"}


def _parse(folder: Path, recipe: dict[str, Any]) -> Train:
    run = {"model": {"path": "shapes-sd3"}, "prompts": "shapes:train", "output": "runs/x", "recipe": recipe}
    run["rewards"] = {"size": {"function": "rewards.jpeg.compressibility"}}
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return parsing.parse(Train, ["--config", str(folder / "run.yaml")], "train")[0]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("LeaveOneOut", {"scale": 3.0}),
        ("BestOfNCredit", {"n": 4}),
        ("BetaNormalized", {"low": 0.0, "high": 1.0}),
        ("VirtualBest", {"best": 2.0}),
        ("GaussianRank", {}),
        ("TaskNormalized", {"center": "task"}),
        ("DifficultyWeighted", {"credit": SCALED, "strength": 0.5}),
        ("SpreadDiscounted", {"credit": SCALED, "strength": 0.5}),
    ],
)
def test_credits_are_configured(tmp_path: Path, name: str, arguments: dict[str, Any]) -> None:
    credit = {"class_path": f"{CREDITS}.{name}", "init_args": arguments}
    recipe = {"recipe": {"class_path": "genalign.flow_grpo"}, "credit": credit}
    settings = _parse(tmp_path, {"class_path": "genalign.with_credit", "init_args": recipe})
    scores = RoundScores(torch.rand(8, 2), (1.0, 1.0), torch.arange(8) // 4)
    assert settings.recipe.credit(scores).shape == (8,)


def test_ngrpo_is_configured(tmp_path: Path) -> None:
    recipe = _parse(tmp_path, {"class_path": "genalign.ngrpo", "init_args": {"best": 2.0, "window": 2}}).recipe
    assert recipe.credit.best == 2.0
