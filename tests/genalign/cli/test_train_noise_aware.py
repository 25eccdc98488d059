"""genalign train-noise-aware from the command line on the tiny pipeline, and a search by what it trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from genalign.cli.main import main
from tests.genalign.cli.test_steer import STEER, config_file, scores_in

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

REWARD = "--rewards={clip: {function: {class_path: rewards.clip.ClipReward, init_args: {model: shapes-clip}}}}"


@pytest.mark.parametrize(
    "student",
    [
        "LatentImageDistilled\n  init_args: {channels: 4, scale: 4, width: 16, depth: 1, lora_rank: 2}",
        "SelfDistilled\n  init_args: {lora_rank: 2}",
    ],
    ids=["latents", "samples"],
)
def test_train_noise_aware_then_steer(
    tiny_folder: Path, tmp_path: Path, student: str, error: Callable[..., str]
) -> None:
    assert (
        main(["train-noise-aware", "--config", config_file(tmp_path, AWARE, model=tiny_folder, student=student)]) == 0
    )
    made = tmp_path / "aware" / "scorer.safetensors"
    scorer = f"{{class_path: rewards.noise_aware.load_scorer, init_args: {{path: {made}, least_tau: -1.0}}}}"
    steer = ["steer", "--config", config_file(tmp_path, STEER, model=tiny_folder), f"--strategy.scorer={scorer}"]
    assert main([*steer, REWARD]) == 0
    (first, _) = scores_in(tmp_path / "found")
    assert first["calls"]["reward/noise-aware"] > 0
    message = error(*steer, f"--output={tmp_path}/other")
    assert (
        "selects by 'partial', rewards.shapes.ShapesReward, and the scorer was trained for rewards.clip.Clip" in message
    )


def test_a_student_of_two_rewards_is_refused(tiny_folder: Path, tmp_path: Path, error: Callable[..., str]) -> None:
    config = config_file(tmp_path, AWARE, model=tiny_folder, student="SelfDistilled")
    message = error("train-noise-aware", "--config", config, "--rewards.strict.function=rewards.shapes.ShapesReward")
    assert "a student predicts one reward, not partial, strict: give one, and train a student for each" in message


@pytest.mark.slow
def test_train_noise_aware_is_deterministic(tiny_folder: Path, tmp_path: Path) -> None:
    student = "SelfDistilled\n  init_args: {lora_rank: 2}"
    weights = []
    for seed in (0, 0, 1):
        folder = tmp_path / str(len(weights))
        folder.mkdir()
        config = config_file(folder, AWARE, model=tiny_folder, student=student)
        assert main(["train-noise-aware", "--config", config, "--seed", str(seed)]) == 0
        weights.append((folder / "aware" / "scorer.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]
