"""Export of the weights of a run, as a LoRA, a merged network or a pipeline, with a model card."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, SD3Transformer2DModel

from genalign.cli.main import main
from genalign.diffusion.policy import Lora, Policy
from pipelines import SD3

PROMPTS = ["a red circle", "a blue square"]
ESTIMATE = {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 12}


@pytest.fixture
def run(tiny: SD3, tiny_folder: Path, tmp_path: Path) -> Path:
    """Write a run folder as training does, with an adapter that changes predictions."""
    policy = Policy(tiny.denoiser, Lora(rank=4))
    for parameter in policy.parameters:
        torch.nn.init.normal_(parameter, std=0.1)
    folder = tmp_path / "run"
    tiny.save_lora(folder / "lora", policy.adapter_state(), policy.config)  # it has one
    reward = {"class_path": "rewards.shapes.ShapesReward", "init_args": {"score": "strict"}}
    settings = {
        "model": {"path": str(tiny_folder)},
        "recipe": {"class_path": "genalign.flow_grpo", "init_args": {"window": 2}},
        "rewards": {"strict": {"function": reward, "weight": 1.0}},
        **{name: {} for name in ("prompts", "sampling", "training", "lora")},
    }
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "environment.json").write_text('{"torch": "2.9"}')
    (folder / "gain.json").write_text(json.dumps({"strict": ESTIMATE}))
    for name in ("before", "after"):
        summary = {"overall": {"strict": ESTIMATE}, "protocol": {"suite": "comp"}, "protocol_hash": "abc"}
        (folder / name).mkdir()
        (folder / name / "summary.json").write_text(json.dumps(summary))
    return folder


def _export(run: Path, form: str) -> Path:
    output = run.parent / form
    assert main(["export", "--run", str(run), "--output", str(output), "--form", form]) == 0
    return output


def _assert_same_predictions(tiny: SD3, other: SD3) -> None:
    x, conditioning, step = tiny.initial_noise([1, 2]), tiny.encode(PROMPTS), tiny.grid(4)[1]
    with torch.no_grad():
        tuned, exported = (model.predict(x, step, conditioning, 1.0) for model in (tiny, other))
    torch.testing.assert_close(tuned, exported, rtol=0, atol=1e-5 * float(tuned.abs().max()))


def test_a_pipeline_has_the_adapter_in_its_weights(tiny: SD3, run: Path) -> None:
    output = _export(run, "pipeline")
    _assert_same_predictions(tiny, SD3.load(output))
    assert not (output / "lora").exists()


def test_a_merged_network_loads_by_its_class(tiny: SD3, tiny_folder: Path, run: Path) -> None:
    network = SD3Transformer2DModel.from_pretrained(_export(run, "merged"))
    _assert_same_predictions(tiny, SD3(DiffusionPipeline.from_pretrained(tiny_folder, transformer=network)))


def test_a_lora_is_exported_with_a_card(tiny: SD3, tiny_folder: Path, run: Path) -> None:
    output = _export(run, "lora")
    other = SD3.load(tiny_folder)
    other.load_lora(output)
    _assert_same_predictions(tiny, other)
    card = (output / "README.md").read_text()
    assert card.startswith(f"---\nbase_model: {tiny_folder}\nbase_model_relation: adapter\n")
    assert "| strict | 1 | `ShapesReward(score=strict)` |" in card and "flow_grpo(window=2)" in card
    assert "| strict | 0.500 | 0.500 | +0.500 (+0.400 to +0.600) | 12 |" in card and "Protocol abc: suite comp." in card


def test_a_whole_trained_network_has_no_lora_to_export(tiny_folder: Path, run: Path, error: Callable[..., str]) -> None:
    (run / "lora").rename(run / "elsewhere")
    merged = run.parent / "tuned"
    arguments = ["export", "--run", str(run), "--output", str(merged)]
    assert "has neither lora/ nor denoiser/: training did not finish a round" in error(*arguments)
    changed = SD3.load(tiny_folder)
    with torch.no_grad():
        for parameter in changed.denoiser.parameters():
            parameter.mul_(1.1)
    changed.save_denoiser(run / "denoiser")
    assert "trained the whole network: export it with --form merged or pipeline" in error(*arguments)
    assert main([*arguments, "--form", "pipeline"]) == 0
    _assert_same_predictions(changed, SD3.load(merged))
    assert "exists: choose another output" in error(*arguments, "--form", "pipeline")
