"""genalign calibrate from the command line on the tiny pipeline."""

from __future__ import annotations

import json
from pathlib import Path

from genalign.cli.main import main
from tests.genalign.training.toy_runs import write_config


def test_a_calibration_is_written_and_used(tiny_folder: Path, tmp_path: Path) -> None:
    training = {"rounds": 1, "batch_size": 4, "updates_per_round": 1}
    sections = {"sampling": {"num_steps": 3, "sigmas": [1.0, 0.6, 0.3]}}
    write_config(tmp_path / "base.json", tiny_folder, "rewards.shapes.ShapesReward", training, **sections)
    base, levels = str(tmp_path / "base.json"), tmp_path / "levels.json"
    short = ["--calibration.iterations", "2", "--output", str(levels)]
    assert main(["calibrate", "--config", base, *short]) == 0
    assert len(json.loads(levels.read_text())["levels"]) == 3
    kernel = f"--recipe.kernel={{class_path: genalign.calibrated, init_args: {{path: {levels}}}}}"
    run = ["--output", str(tmp_path / "run"), "--before_after", "null", "--training.rounds", "1"]
    assert main(["train", "--config", base, kernel, *run]) == 0
    other = ["--sampling.sigmas", "[1.0, 0.5, 0.3]", "--output", str(tmp_path / "other")]
    assert main(["train", "--config", base, kernel, *other]) == 2
