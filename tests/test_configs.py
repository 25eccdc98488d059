"""Every shipped configuration of a training run is one that the command takes."""

from __future__ import annotations

import pytest
import yaml

from genalign.cli.config import Train, parse
from genalign.runtime.fsdp import Sharding, sharding_from_environment
from tests.packages import ROOT

CONFIGS = ROOT / "scripts" / "configs"
LARGE = (
    "train/sd35_medium_flow_grpo_geneval",
    "train/sd35_medium_flow_grpo_ocr",
    "train/sd35_medium_flow_grpo_pickscore",
    "train/flux_dev_flow_grpo_pickscore",
    "train/sdxl_flow_grpo_pickscore",
)
TRAINING = (
    *LARGE,
    "train/sd15_flow_grpo_aesthetic",
    "train/shapes_flow_grpo_partial",
    "compare/base_shapes",
    "compare/base_tones",
)


@pytest.mark.parametrize("name", TRAINING)
def test_a_training_configuration_is_taken(name: str) -> None:
    settings, plain = parse(Train, ["--config", str(CONFIGS / f"{name}.yaml")], "train")
    written = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    assert plain["model"]["path"] == written["model"]["path"] and settings.rewards.keys() == written["rewards"].keys()


@pytest.mark.parametrize("name", [*LARGE, "train/sd15_flow_grpo_aesthetic", "train/sd35_medium_flow_grpo_own_reward"])
def test_what_was_never_run_says_so(name: str) -> None:
    head = (CONFIGS / f"{name}.yaml").read_text().splitlines()[:3]
    assert any("NOT RUN" in line and "Sized for" in line for line in head)


ACCELERATE = {
    "ddp": (8, None),
    "two_nodes": (16, None),
    "fsdp2": (8, Sharding(8, reshard_after_forward=True)),
    "zero2": (8, Sharding(8, reshard_after_forward=False)),
}


@pytest.mark.parametrize("name", ACCELERATE)
def test_what_accelerate_hands_on(name: str) -> None:
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    config = str(CONFIGS / "accelerate" / f"{name}.yaml")
    asked, _, _ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", config, "train.py"]))
    assert asked.multi_gpu or asked.use_fsdp
    processes, sharding = ACCELERATE[name]
    assert asked.num_processes == processes
    assert sharding_from_environment(prepare_multi_gpu_env(asked), processes) == sharding
