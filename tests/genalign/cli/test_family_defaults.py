"""Guidance and kernel of the model's family: sampled with, and recorded, in runs of the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from genalign.__main__ import main
from genalign.algorithms.recipe_changes import with_credit
from genalign.algorithms.recipes import flow_grpo
from genalign.cli.family_defaults import with_family_defaults, with_recorded_defaults
from genalign.diffusion.paths import EDMPath, FlowPath, VPPath
from genalign.diffusion.sampling import Sampling
from genalign.diffusion.transitions import DDIM, DPMSDE, FlowSDE
from genalign.evaluation.evaluate import load_evaluation
from genalign.training.dry_run import ToyPipeline
from tests.pipelines.tiny_checkpoints import FAMILIES

REWARDS = """
def brightness(samples, prompts):
    return samples.flatten(1).mean(1)
"""
# What diffusers does itself
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword"),
    pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning"),
]


@pytest.fixture
def own_rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "family_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "prompts.txt").write_text("a red circle\ntwo big blue squares\n")
    return tmp_path


def _settings(folder: Path, family: str, **model: Any) -> dict[str, Any]:
    checkpoint = FAMILIES[family].save(folder / family)
    return {
        "output": str(folder / "run"),
        "model": {"path": str(checkpoint), **model},
        "prompts": str(folder / "prompts.txt"),
        "rewards": {"bright": {"function": "family_rewards.brightness"}},
        "recipe": {"class_path": "genalign.flow_grpo"},
        "sampling": {"num_steps": 3},
        "training": {"rounds": 1, "prompts_per_round": 2, "group_size": 2, "batch_size": 4, "updates_per_round": 1},
        "lora": {"rank": 2},
    }


def _train(folder: Path, settings: dict[str, Any], *arguments: str) -> dict[str, Any]:
    path = folder / "train.yaml"
    path.write_text(yaml.safe_dump(settings))
    assert main(["train", "--config", str(path), *arguments]) == 0
    recorded: dict[str, Any] = json.loads((folder / "run" / "config.json").read_text())
    return recorded


@pytest.mark.parametrize(
    ("family", "kernel", "guidance", "nfe"),
    [
        ("sd15", "DDIM", 7.5, 56),
        ("sdxl", "DDIM", 5.0, 56),
        ("stable_audio", "DPMSDE", 7.0, 56),
        ("sd3", "FlowSDE", 3.5, 48),
    ],
)
def test_the_default_recipe_trains_every_family(
    family: str, kernel: str, guidance: float, nfe: int, own_rewards: Path
) -> None:
    recorded = _train(own_rewards, _settings(own_rewards, family))
    assert recorded["recipe"]["init_args"]["kernel"]["class_path"].endswith(f".{kernel}")
    assert recorded["sampling"]["guidance"] == guidance
    (row,) = [json.loads(line) for line in (own_rewards / "run" / "metrics.jsonl").read_text().splitlines()]
    assert row["nfe"] == nfe


def test_a_run_is_resumed_with_the_recorded_or_the_original_settings(own_rewards: Path) -> None:
    settings = _settings(own_rewards, "sd15")
    first = _train(own_rewards, settings)
    assert main(["train", "--resume", str(own_rewards / "run"), "--training.rounds", "2"]) == 0
    settings["training"]["rounds"] = 3
    again = _train(own_rewards, settings, "--resume")
    assert again["recipe"] == first["recipe"] and again["sampling"] == first["sampling"]
    assert len((own_rewards / "run" / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_negative_prompt_is_sampled_with_and_recorded(own_rewards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = _settings(own_rewards, "sd15", negative_prompt="dark, blurry")
    settings["before_after"] = {"prompts": settings["prompts"], "samples_per_task": 2, "batch_size": 2}
    recorded = _train(own_rewards, settings)
    assert recorded["model"]["negative_prompt"] == "dark, blurry"
    with_negative = load_evaluation(own_rewards / "run" / "before")
    assert with_negative.protocol.negative_prompt == "dark, blurry" and with_negative.protocol.guidance == 7.5

    plain = {**settings, "output": str(own_rewards / "plain"), "model": {"path": settings["model"]["path"]}}
    path = own_rewards / "plain.yaml"
    path.write_text(yaml.safe_dump(plain))
    assert main(["train", "--config", str(path)]) == 0
    without = load_evaluation(own_rewards / "plain" / "before")
    assert without.protocol.hash != with_negative.protocol.hash and "negative_prompt" not in without.protocol.as_dict()
    scores = [[record.scores["bright"] for record in evaluation.records] for evaluation in (with_negative, without)]
    assert scores[0] != scores[1]

    capsys.readouterr()
    refused = ["train", "--config", str(own_rewards / "train.yaml"), "--output", "none", "--sampling.guidance", "1"]
    for command in (refused, ["plan", *refused[1:]]):
        assert main(command) == 2
        message = "the negative prompt 'dark, blurry' has no effect at guidance 1: set sampling.guidance above 1"
        assert message in capsys.readouterr().err


def test_defaults_are_filled_in_wherever_a_recipe_has_them() -> None:
    kernels = {FlowPath(): FlowSDE(0.7), VPPath(): DDIM(1.0), EDMPath(): DPMSDE()}
    assert {path: flow_grpo().kernel_on(path) for path in kernels} == kernels
    assert flow_grpo(DDIM(0.5)).kernel_on(VPPath()) == DDIM(0.5)
    assert with_credit(flow_grpo(), torch.nn.Identity()).kernel is None
    inner = {"class_path": "genalign.flow_grpo", "init_args": {"kernel": None}}
    plain = {
        "sampling": {"num_steps": 3, "guidance": None},
        "evaluation": {"num_steps": 3, "guidance": 2.0},
        "recipe": {"class_path": "genalign.with_credit", "init_args": {"recipe": inner}},
    }
    samplings = {"sampling": Sampling(3), "evaluation": Sampling(3, guidance=2.0), "held_out": None}
    filled = with_family_defaults(plain, ToyPipeline.flow(3), samplings)
    assert filled["sampling"]["guidance"] == 1.0 and filled["evaluation"]["guidance"] == 2.0
    kernel = filled["recipe"]["init_args"]["recipe"]["init_args"]["kernel"]
    assert kernel == {"class_path": "genalign.diffusion.transitions.FlowSDE", "init_args": {"noise_level": 0.7}}
    assert with_recorded_defaults(plain, filled) == filled
    for untouched in ({"class_path": "genalign.nft", "init_args": {"beta": 1.0}}, {"class_path": "genalign.nft"}):
        assert with_family_defaults({"recipe": untouched}, ToyPipeline.flow(3), {})["recipe"] == untouched


def test_a_search_samples_by_the_familys_guidance_and_a_negative_prompt(own_rewards: Path) -> None:
    checkpoint = FAMILIES["sd15"].save(own_rewards / "sd15")
    texts = {"plain": "", "negative": "two big blue squares"}
    for name, text in texts.items():
        settings = {
            "output": str(own_rewards / name),
            "model": {"path": str(checkpoint), "negative_prompt": text},
            "prompts": str(own_rewards / "prompts.txt"),
            "rewards": {"bright": {"function": "family_rewards.brightness"}},
            "strategy": {"class_path": "genalign.BestOfN", "init_args": {"candidates": 2}},
            "sampling": {"num_steps": 3},
        }
        path = own_rewards / f"{name}.yaml"
        path.write_text(yaml.safe_dump(settings))
        for _ in range(2):  # the second continues the finished search
            assert main(["steer", "--config", str(path)]) == 0
        assert json.loads((own_rewards / name / "config.json").read_text())["sampling"]["guidance"] == 7.5
    rows = {name: (own_rewards / name / "scores.jsonl").read_text().splitlines() for name in texts}
    plain, negative = ([json.loads(line)["scores"] for line in lines] for lines in rows.values())
    assert plain != negative
