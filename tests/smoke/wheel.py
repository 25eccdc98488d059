"""Run by the python of a clean environment, from another directory: the installed wheel works on its own."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import genalign
import pipelines
import rewards
from genalign import assets
from genalign.cli.main import main
from genalign.worlds import shapes

for package in (genalign, pipelines, rewards):
    location = Path(package.__file__ or "").resolve()
    assert "site-packages" in location.parts, f"{package.__name__} comes from {location}, not from the wheel"

command = Path(sys.executable).with_name("genalign")
assert "train" in subprocess.run([command, "--help"], capture_output=True, text=True, check=True).stdout
assert "shapes-sd3" in assets.names() and "sdxl-80gb" in assets.presets()
assert "stable-diffusion-xl" in assets.preset("sdxl-80gb").read_text(encoding="utf-8")

from diffusers import StableDiffusion3Pipeline  # noqa: E402  # after the cheap checks

pipe = StableDiffusion3Pipeline.from_pretrained(assets.resolve("shapes-sd3"))
made = pipe("a red circle", num_inference_steps=2, guidance_scale=1.0, max_sequence_length=8, output_type="pt").images
assert made.shape == (1, 3, 64, 64) and bool(torch.isfinite(made).all())

with tempfile.TemporaryDirectory() as folder:
    arguments = [
        "--prompts",
        "shapes:len",
        "--samples_per_task",
        "6",
        "--seeds",
        "1",
        "--batch_size",
        "6",
        "--output",
        folder,
    ]
    assert main(["evaluate", "shapes", *arguments]) == 0
    assert (Path(folder) / "summary.json").is_file()
    small = ["--training.rounds", "1", "--training.prompts_per_round", "2", "--training.group_size", "4"]
    small += ["--training.batch_size", "4", "--before_after", "null", "--held_out.every", "0"]
    assert main(["demo", "--output", f"{folder}/run", *small]) == 0
    pipe.load_lora_weights(f"{folder}/run/lora")
    steer = [
        "--model.path",
        "shapes-sd3",
        "--prompts",
        "shapes:val:position",
        "--limit",
        "1",
        "--sampling.num_steps",
        "4",
        "--budget.nfe",
        "12",
    ]
    steer += ["--rewards.partial.function", "rewards.shapes.ShapesReward", "--strategy", "genalign.BestOfN"]
    assert main(["steer", "--output", f"{folder}/found", *steer]) == 0
    assert (Path(folder) / "found" / "report.html").is_file()
assert len(shapes.prompts("comp")) == 1020
print("the wheel works")
