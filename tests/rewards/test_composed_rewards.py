"""The combinations that docs/rewards.md lists, from the YAML of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from genalign.algorithms.interfaces import RoundScores
from genalign.cli import parsing
from genalign.cli.train_settings import Train
from genalign.types import Prompt
from rewards.combine import EnsembleCredit, VariancePenalty, save_direction

SIZE, RED = (
    "rewards.jpeg.compressibility",
    {"class_path": "rewards.clip.ClipReward", "init_args": {"model": "shapes-clip"}},
)
COMBINATIONS: dict[str, dict[str, Any]] = {
    "WeightedSum": {"rewards": [SIZE, RED], "weights": [1.0, 2.0]},
    "Product": {"rewards": ["rewards.jpeg.incompressibility"]},
    "WorstCase": {"rewards": [SIZE, RED]},
    "MeanMinusVariance": {"rewards": [SIZE, RED], "penalty": 0.1, "ddof": 1},
    "Standardized": {"reward": RED, "mean": 0.2, "std": 0.1},
    "HarmonicMean": {"rewards": ["rewards.jpeg.incompressibility"] * 2, "weights": [1.0, 2.0]},
    "Gate": {"reward": RED, "condition": SIZE, "threshold": -1.0},
    "DirectionalCorrection": {"base": RED, "direction": "direction.safetensors"},
    "TextRelativeReward": {"base": RED, "positive": "realistic", "negative": "painted"},
}
SHAPED: dict[str, dict[str, Any]] = {
    "LogSigmoidCentered": {"reward": RED, "reference": 0.2, "scale": 100.0},
    "PreferenceAsReward": {"reward": RED, "references": [0.1, 0.2], "scale": 100.0},
    "Calibrated": {"reward": RED, "references": {"a red circle": [0.1, 0.2]}, "tilt": 10.0},
    "Ceiling": {"reward": RED, "limit": 0.3},
    "Residualized": {"reward": RED, "nuisance": SIZE, "slope": 0.1, "mean": -1.0},
}


def parse(folder: Path, run: dict[str, Any]) -> Train:
    plain = {"model": {"path": "shapes-sd3"}, "prompts": "shapes:train", "output": "runs/x"}
    plain |= {"recipe": {"class_path": "genalign.flow_grpo"}, "rewards": {"size": {"function": SIZE}}}
    (folder / "run.yaml").write_text(yaml.safe_dump(plain | run))
    return parsing.parse(Train, ["--config", str(folder / "run.yaml")], "train")[0]


@pytest.mark.parametrize("name", COMBINATIONS)
def test_combinations_of_rewards_are_configured(tmp_path: Path, name: str) -> None:
    function = {"class_path": f"rewards.combine.{name}", "init_args": COMBINATIONS[name]}
    if name == "DirectionalCorrection":
        save_direction(tmp_path / "direction.safetensors", torch.ones(128))
        function["init_args"] = {"base": RED, "direction": str(tmp_path / "direction.safetensors")}
    reward = parse(tmp_path, {"rewards": {"r": {"function": function}}}).rewards["r"].function
    assert reward(torch.rand(2, 3, 64, 64), [Prompt("a red circle")] * 2).isfinite().all()


@pytest.mark.parametrize("name", SHAPED)
def test_rewards_of_one_reward_are_configured(tmp_path: Path, name: str) -> None:
    function = {"class_path": f"rewards.shaped.{name}", "init_args": SHAPED[name]}
    reward = parse(tmp_path, {"rewards": {"r": {"function": function}}}).rewards["r"].function
    assert reward(torch.rand(2, 3, 64, 64), [Prompt("a red circle")] * 2).isfinite().all()


ENSEMBLE, BALANCE = "rewards.combine.EnsembleCredit", "genalign.algorithms.multi_reward_credit"
GROUP_RELATIVE = {"class_path": "genalign.algorithms.credit.GroupRelative"}


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        (ENSEMBLE, {}),
        (ENSEMBLE, {"pool": "rewards.combine.median"}),
        (ENSEMBLE, {"pool": {"class_path": "rewards.combine.VariancePenalty"}}),
        (ENSEMBLE, {"pool": {"class_path": "rewards.combine.DeviationPenalty", "init_args": {"penalty": 0.5}}}),
        (ENSEMBLE, {"pool": {"class_path": "rewards.combine.NominalAndWorst", "init_args": {"nominal": 0.7}}}),
        ("rewards.combine.UncertaintyDiscount", {"credit": {"class_path": ENSEMBLE}, "strength": 2.0}),
        ("rewards.combine.UncertaintyDiscount", {"credit": GROUP_RELATIVE}),
        (f"{BALANCE}.CorrelationWeighted", {"temperature": 1.0}),
        (f"{BALANCE}.LogTamed", {"threshold": "median", "std": "global"}),
        (f"{BALANCE}.LogTamed", {"threshold": 0.5}),
        (f"{BALANCE}.AmongCorrect", {"rule": "a", "weight": 0.2}),
        (f"{BALANCE}.GatedBySuccess", {"rule": "a", "rate": 0.25}),
        (f"{BALANCE}.Decorrelated", {"credit": GROUP_RELATIVE, "nuisances": ["c"]}),
    ],
)
def test_credits_over_several_rewards_are_configured(tmp_path: Path, name: str, arguments: dict[str, Any]) -> None:
    credit = {"class_path": name, "init_args": arguments}
    recipe = {"recipe": {"class_path": "genalign.flow_grpo"}, "credit": credit}
    settings = parse(tmp_path, {"recipe": {"class_path": "genalign.with_credit", "init_args": recipe}})
    scores = RoundScores(torch.rand(8, 3), (1.0, 1.0, 0.0), torch.arange(8) // 4, names=("a", "b", "c"))
    assert settings.recipe.credit(scores).shape == (8,)


def test_the_parameters_of_a_pool_are_settings(tmp_path: Path) -> None:
    pool = {"class_path": "rewards.combine.VariancePenalty", "init_args": {"penalty": 0.5, "ddof": 0}}
    credit = {"class_path": ENSEMBLE, "init_args": {"pool": pool}}
    recipe = {"recipe": {"class_path": "genalign.flow_grpo"}, "credit": credit}
    settings = parse(tmp_path, {"recipe": {"class_path": "genalign.with_credit", "init_args": recipe}})
    assert settings.recipe.credit == EnsembleCredit(VariancePenalty(0.5, ddof=0))
