"""Every shipped configuration parses."""

from __future__ import annotations

from pathlib import Path

import pytest

from genalign.config import Train, parse

ROOT = Path(__file__).parents[2]
CONFIGS = [*sorted((ROOT / "scripts" / "configs").glob("*.yaml")), ROOT / "genalign" / "assets" / "demo.yaml"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configurations_parse(path: Path) -> None:
    reward = ["--rewards.mine.function", "rewards.shapes.ShapesReward"]
    settings, plain = parse(Train, ["--config", str(path), *reward], "train")
    assert settings.rewards["mine"].weight == 1.0
    assert plain["recipe"]["class_path"] == "genalign.recipes.flow_grpo"
