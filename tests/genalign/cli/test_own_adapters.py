"""Adapters that are no plain LoRA, from training to export: noise hypernetworks, and LoRAs with a hypernetwork."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

import genalign
from genalign.cli.main import main
from genalign.diffusion.rollout import generate
from pipelines import SD3
from tests.genalign.training.toy_runs import redness

PROMPTS = ["a red circle", "two blue squares"]
SAMPLING = genalign.Sampling(2, (1.0, 0.5))
KINDS = {
    "a noise hypernetwork": ("noise_hypernetwork", genalign.Lora(rank=2)),
    "a LoRA with a hypernetwork": ("draft", genalign.Lora(rank=2, hypernetwork=genalign.Hypernetwork(width=8))),
}


def _samples(model: SD3) -> Tensor:
    (samples,) = generate(model, PROMPTS, [1, 2], SAMPLING.grid(model), 1.0, 2)
    return samples


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_adapter_samples_as_the_trained_one(
    kind: str, tiny_folder: Path, tmp_path: Path, error: Callable[..., str]
) -> None:
    tiny, (recipe, lora) = SD3.load(tiny_folder), KINDS[kind]
    base, settings = _samples(tiny), genalign.TrainerSettings(rounds=2, group_size=2, learning_rate=0.05)
    genalign.train(
        tiny, redness, PROMPTS, getattr(genalign, recipe)(), settings, SAMPLING, lora, output=tmp_path / "run"
    )
    (file,) = (tmp_path / "run" / "lora").glob("*.safetensors")
    assert file.name == "genalign_adapter.safetensors" and not (tmp_path / "run" / "peft").exists()
    again = SD3.load(tiny_folder)
    again.load_lora(tmp_path / "run")
    assert torch.equal(_samples(again), _samples(tiny)) and not torch.equal(_samples(tiny), base)
    with pytest.raises(ValueError, match=f"{kind} cannot be merged into the weights"):
        again.save_merged(tmp_path / "merged", whole=False)
    with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):
        StableDiffusion3Pipeline.from_pretrained(tiny_folder).load_lora_weights(file.parent)
    soup = ["soup", "--adapters", f'["{file}", "{file}"]', "--weights", "[0.5, 0.5]", "--output", str(tmp_path / "s")]
    assert f"is {kind}, which acts differently on each sample" in error(*soup)


def _arguments(kind: str, tiny_folder: Path, output: Path) -> list[str]:
    recipe, _ = KINDS[kind]
    values: dict[str, Any] = {
        "output": output,
        "model.path": tiny_folder,
        "recipe": f"genalign.{recipe}",
        "rewards.red.function": "tests.genalign.training.toy_runs.redness",
        "sampling": '{"num_steps": 2, "sigmas": [1.0, 0.5]}',
        "training": '{"rounds": 1, "group_size": 2, "learning_rate": 0.05}',
        "lora.rank": 2,
        "prompts": output.parent / "prompts.txt",
    }
    if "with" in kind:
        values |= {"lora.hypernetwork": '{"condition_on": "state", "width": 8}'}
    (output.parent / "prompts.txt").write_text("\n".join(PROMPTS))
    return ["train", *(f"--{name}={value}" for name, value in values.items())]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_resumed_and_exported_in_one_form(
    kind: str, tiny_folder: Path, tmp_path: Path, error: Callable[..., str]
) -> None:
    run = tmp_path / "run"
    assert main([*_arguments(kind, tiny_folder, run), "--before_after.seeds=1"]) == 0
    assert main(["train", "--resume", str(run), "--training.rounds", "2"]) == 0
    export = ["export", "--run", str(run), "--output", str(tmp_path / "adapter"), "--format"]
    for format in ("lora", "comfy", "kohya", "merged", "pipeline"):
        message = error(*export, format)
        assert f"trained {kind}" in message and "export it with --format genalign" in message
    assert main([*export, "genalign"]) == 0
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert f"This is {kind}, not a plain LoRA" in card and "library_name: genalign" in card
    code = card.split("```python\n")[1].split("```")[0].replace(f"path/to/{tiny_folder.name}", str(tiny_folder))
    names: dict[str, Any] = {}
    exec(code.replace('load_lora("adapter")', f'load_lora("{tmp_path / "adapter"}")'), names)
    assert names["samples"].shape[0] == 1
    expected = SD3.load(tiny_folder)
    expected.load_lora(run)
    (plain,) = generate(expected, names["prompts"], [0], names["grid"], names["guidance"], 1)
    assert torch.equal(names["samples"], plain)


def test_a_noise_hypernetwork_is_steered_and_is_not_trained_on_by_another_recipe(
    tiny_folder: Path, tmp_path: Path, error: Callable[..., str]
) -> None:
    run, kind = tmp_path / "run", "a noise hypernetwork"
    assert main(_arguments(kind, tiny_folder, run)) == 0
    other = _arguments("a LoRA with a hypernetwork", tiny_folder, tmp_path / "other")
    assert "the adapter on this model is a noise hypernetwork" in error(*other, f"--init_lora={run}")
    steered = {
        "output": tmp_path / "steered",
        "model.path": tiny_folder,
        "lora": run,
        "prompts": tmp_path / "prompts.txt",
        "rewards.red.function": "tests.genalign.training.toy_runs.redness",
        "sampling": '{"num_steps": 2, "sigmas": [1.0, 0.5]}',
        "strategy": '{"class_path": "genalign.BestOfN", "init_args": {"candidates": 2}}',
    }
    assert main(["steer", *(f"--{name}={value}" for name, value in steered.items())]) == 0
    (row, *_) = (json.loads(line) for line in (tmp_path / "steered" / "scores.jsonl").read_text().splitlines())
    assert row["calls"]["nfe"] == 2 * (2 + 2)  # two candidates of two steps, and two calls for the shift of each


def test_a_plan_counts_the_memory_of_a_hypernetwork(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = _arguments("a LoRA with a hypernetwork", tiny_folder, tmp_path / "run")[1:]
    own = ["--recipe=genalign.flow_grpo", "--model.memory.checkpointing=true", "--training.rounds=1"]
    assert main(["plan", *arguments, *own]) == 0
    assert "peak of rank 0" in capsys.readouterr().out
