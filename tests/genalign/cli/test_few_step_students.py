"""Few-step students from training to export: the guidance in their weights is known wherever these are opened."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from genalign.cli.main import main
from genalign.diffusion.lora import STUDENT_GUIDANCE, adapter_file
from pipelines import SD3

REWARD = "tests.genalign.training.toy_runs.redness"
SIZE = ["--model.height=32", "--model.width=32"]


def _recorded(path: Path) -> str | None:
    with safe_open(adapter_file(path), framework="pt") as file:
        return (file.metadata() or {}).get(STUDENT_GUIDANCE)


@pytest.fixture(scope="module")
def run(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One round of consistency distillation from a guided teacher."""
    folder = tmp_path_factory.mktemp("students")
    (folder / "prompts.txt").write_text("a circle\ntwo squares")
    values = {
        "output": folder / "run",
        "model.path": tiny_folder,
        "prompts": folder / "prompts.txt",
        "recipe": "genalign.consistency",
        "recipe.guidance": 3,
        "recipe.steps": 4,
        "rewards.red.function": REWARD,
        "sampling": '{"num_steps": 2, "kernel": {"class_path": "genalign.CPS", "init_args": {"eta": 1}}}',
        "training": '{"rounds": 1, "group_size": 2, "learning_rate": 0.01}',
        "lora.rank": 2,
    }
    assert main(["train", *(f"--{name}={value}" for name, value in values.items()), *SIZE]) == 0
    return folder / "run"


def test_a_run_records_the_guidance_in_the_weights(run: Path, tiny_folder: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    assert config["sampling"]["guidance"] == 1.0
    assert [_recorded(run / name) for name in ("lora", "peft/adapter", "checkpoints/round-000001/lora")] == ["3"] * 3
    student = SD3.load(tiny_folder, height=32, width=32)
    student.load_lora(run)
    assert (student.student_guidance, student.guidance_scale(None)) == (3.0, 1.0)


def test_a_student_is_not_guided_again(run: Path, tiny_folder: Path, error: Callable[..., str]) -> None:
    common = [f"--model.path={tiny_folder}", f"--rewards.red.function={REWARD}", *SIZE, "--sampling.num_steps=2"]
    message = "into which guidance 3 is distilled: set sampling.guidance to 1 or null, not 4.5"
    commands: dict[str, list[str]] = {
        "evaluate": ["evaluate", "prompts", "--prompts=shapes:val", "--samples_per_task=1"],
        "steer": ["steer", "--prompt=a circle", "--strategy=BestOfN", "--strategy.candidates=1"],
        "collect": ["collect", "--prompts=shapes:val"],
    }
    for name, command in commands.items():
        where = [f"--output={run.parent / name}", f"--lora={run}"]
        assert message in error(*command, *common, *where, "--sampling.guidance=4.5"), name
    assert main([*commands["steer"], *common, f"--output={run.parent / 'plain'}", f"--lora={run}"]) == 0


def test_training_and_evaluations_of_a_student_take_no_guidance(
    run: Path, tmp_path: Path, error: Callable[..., str]
) -> None:
    again = ["train", f"--config={run / 'config.json'}", f"--output={tmp_path / 'again'}"]
    for command in ("train", "plan"):
        assert "set sampling.guidance to 1 or null, not 2" in error(command, *again[1:], "--sampling.guidance=2")
    evaluation = [
        "--evaluation.num_steps=2",
        "--evaluation.guidance=2",
        "--before_after.seeds=1",
        f"--before_after.prompts={run.parent / 'prompts.txt'}",
    ]
    assert "set sampling.guidance to 1 or null, not 2" in error(*again, *evaluation)


@pytest.mark.parametrize("format", ["lora", "comfy", "pipeline"])
def test_exports_say_that_they_are_a_student(run: Path, tiny_folder: Path, format: str) -> None:
    output = run.parent / format
    assert main(["export", f"--run={run}", f"--output={output}", f"--format={format}"]) == 0
    card = (output / "README.md").read_text()
    assert (
        "A few-step student: guidance 3 is distilled into its weights. Sample at guidance 1, in about 2 steps" in card
    )
    assert "guidance_scale=1.0" in card and "stochastic_sampling=True" in card
    opened = SD3.load(output if format == "pipeline" else tiny_folder)
    if format != "pipeline":
        opened.load_lora(output)
    with pytest.raises(ValueError, match="into which guidance 3 is distilled"):
        opened.guidance_scale(2.0)


def test_mixtures_stay_students(run: Path, error: Callable[..., str], tmp_path: Path) -> None:
    other = tmp_path / "other"
    mix = ["soup", f"--output={other}", f"--adapters=[{run}, {run}]", "--weights=[0.5, 0.5]"]
    assert main(mix) == 0 and _recorded(other) == "3"


def test_a_whole_network_is_recorded_in_its_configuration(tiny: SD3, tmp_path: Path) -> None:
    tiny.record_student(5.0)
    tiny.save_denoiser(tmp_path / "denoiser")
    other: Any = SD3(tiny.pipe)
    other.denoiser.register_to_config(_student_guidance=None)
    assert other.student_guidance is None and other.guidance_scale(2.0) == 2.0
    other.load_denoiser(tmp_path / "denoiser")
    assert other.student_guidance == 5.0
