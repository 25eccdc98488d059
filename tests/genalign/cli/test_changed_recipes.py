"""Recipes that are changed by others, and rewards with limits, from the configuration of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from genalign.cli.main import main
from tests.genalign.training.toy_runs import write_config

CHANGES: dict[str, dict[str, Any]] = {
    "with_recalibration": {"every": 1, "step": 0.1},
    "with_elastic_reset": {"every": 1, "decay": 0.5},
    "with_gradient_balance": {"every": 2, "decay": 0.5},
    "with_dynamic_sampling": {"extra": 0.5},
}
CONSTRAINED = {
    "class_path": "rewards.constrained.Constrained",
    "init_args": {
        "rewards": {
            "partial": {"class_path": "rewards.shapes.ShapesReward", "init_args": {"score": "partial"}},
            "red": "tests.genalign.training.toy_runs.redness",
        },
        "limits": {"partial": 0.5, "red": 0.0},
    },
}


def _run(folder: Path, model: Path, recipe: dict[str, Any], rewards: dict[str, Any]) -> Path:
    sections: dict[str, Any] = {"recipe": recipe, "rewards": rewards, "held_out": {"every": 0}}
    sections["sampling"] = {"num_steps": 3, "sigmas": [1.0, 0.6, 0.3]}
    return write_config(folder / "run.json", model, "", {"rounds": 2}, **sections)


def test_all_changes_of_a_recipe_and_constraints_run_from_a_configuration(tiny_folder: Path, tmp_path: Path) -> None:
    recipe: dict[str, Any] = {"class_path": "genalign.dense_grpo", "init_args": {"window": 1}}
    for name, arguments in CHANGES.items():
        recipe = {"class_path": f"genalign.{name}", "init_args": {**arguments, "recipe": recipe}}
    red = {"function": "tests.genalign.training.toy_runs.redness"}
    config = _run(tmp_path, tiny_folder, recipe, {"capped": {"function": CONSTRAINED}, "red": red})
    assert main(["train", "--config", str(config)]) == 0
    first, second = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    for row in (first, second):
        names = {name.split("/")[0] for name in row["metrics"]}
        assert names >= {"noise_level", "balance", "redrawn_samples", "trained_zero_std_share", "capped"}
    assert first["metrics"]["capped/weight.red"] != second["metrics"]["capped/weight.red"]
    kernel = json.loads((tmp_path / "run" / "config.json").read_text())["recipe"]
    for _ in CHANGES:
        kernel = kernel["init_args"]["recipe"]
    assert kernel["init_args"]["kernel"]["class_path"].endswith("FlowSDE")  # the one that training began with


def test_adaptive_group_size_runs_and_other_choices_are_refused_in_one_line(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    red = {"red": {"function": "tests.genalign.training.toy_runs.redness"}}
    inner = {"class_path": "genalign.flow_grpo"}
    recipe = {"class_path": "genalign.with_adaptive_group_size", "init_args": {"recipe": inner}}
    assert main(["train", "--config", str(_run(tmp_path, tiny_folder, recipe, red))]) == 0
    capsys.readouterr()
    refused = {
        "choose with_dynamic_sampling, or a recipe such as flow_grpo": ("with_adaptive_group_size", "dragon"),
        "choose a recipe with a completion, such as dense_grpo": ("with_recalibration", "flow_grpo"),
        "needs 2 to 8 of non-zero weight, not 1": ("with_gradient_balance", "flow_grpo"),
    }
    for message, (change, changed) in refused.items():
        recipe = {"class_path": f"genalign.{change}", "init_args": {"recipe": {"class_path": f"genalign.{changed}"}}}
        (folder := tmp_path / change).mkdir()
        assert main(["train", "--config", str(_run(folder, tiny_folder, recipe, red))]) != 0
        assert message in capsys.readouterr().err
