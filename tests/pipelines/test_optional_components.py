"""Components that a checkpoint leaves out, or whose folders are missing and not needed, for loading and planning."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from diffusers import StableDiffusion3Pipeline
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

import pipelines
from genalign.diffusion.rollout import RolloutInputs, rollout
from genalign.diffusion.transitions import ODE
from pipelines.meta_device import outline
from tests.pipelines.tiny_checkpoints import FolderOf

PROMPTS = ["a red circle", "two big blue squares"]


def _name_in_index(folder: Path, **entries: Any) -> None:
    path = folder / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


@pytest.fixture
def sd15(folder_of: FolderOf, tmp_path: Path) -> Path:
    """A checkpoint with a safety checker and its preprocessor, as the published ones have them."""
    folder = Path(shutil.copytree(folder_of("sd15"), tmp_path / "sd15"))
    side = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.CLIPConfig(vision_config={**side, "image_size": 8, "patch_size": 4}, text_config=side)
    StableDiffusionSafetyChecker(config).save_pretrained(folder / "safety_checker")
    transformers.CLIPImageProcessor().save_pretrained(folder / "feature_extractor")
    _name_in_index(
        folder,
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
        requires_safety_checker=True,
    )
    return folder


def _prediction(folder: Path) -> torch.Tensor:
    pipeline = pipelines.load(folder)
    with torch.no_grad():
        return pipeline.predict(pipeline.initial_noise([1, 2]), pipeline.grid(2)[0], pipeline.encode(PROMPTS), 2.0)


@pytest.mark.parametrize(
    "missing", [["safety_checker"], ["feature_extractor"], ["safety_checker", "feature_extractor"]]
)
def test_a_missing_safety_checker_is_not_needed(sd15: Path, missing: list[str]) -> None:
    whole = _prediction(sd15)
    assert pipelines.load(sd15).pipe.safety_checker is not None  # it goes into exports
    for name in missing:
        shutil.rmtree(sd15 / name)
    assert torch.equal(_prediction(sd15), whole)
    assert outline(sd15).pipeline.sample_shape == pipelines.load(sd15).sample_shape


def test_a_missing_text_encoder_is_needed(sd15: Path) -> None:
    shutil.rmtree(sd15 / "text_encoder")
    for opened in (pipelines.load, outline):
        with pytest.raises(FileNotFoundError, match=r"lacks text_encoder/, which its model_index\.json names"):
            opened(sd15)


def test_sd3_without_t5_equals_diffusers(folder_of: FolderOf, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folder_of("sd3"), tmp_path / "sd3"))
    for name in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(folder / name)
    _name_in_index(folder, text_encoder_3=[None, None], tokenizer_3=[None, None])
    ours = pipelines.load(folder)
    vanilla: Any = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    vanilla.set_progress_bar_config(disable=True)
    noise = ours.initial_noise([1, 2])
    options = {"num_inference_steps": 2, "output_type": "pt", "return_dict": False}
    theirs = vanilla(PROMPTS, latents=noise, guidance_scale=ours.guidance, **options)[0]
    start = RolloutInputs(ours.encode(PROMPTS), torch.arange(2), (1, 2), (1, 2))
    with torch.no_grad():
        samples = ours.decode(rollout(ours, start, ours.grid(2), [ODE()] * 2, ours.guidance).final)
    torch.testing.assert_close(samples, theirs, rtol=0, atol=1e-4)
    planned = outline(folder)
    assert "text_encoder_3" not in {network.name for network in planned.networks}
    assert (
        planned.pipeline.longest_conditioning(1)["context"].shape == ours.encode(PROMPTS[:1]).tensors["context"].shape
    )


def test_planning_refuses_the_settings_that_loading_refuses(folder_of: FolderOf, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folder_of("sd21"), tmp_path / "sd21"))
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "thresholding": True}))
    for opened in (pipelines.load, outline):
        with pytest.raises(ValueError, match=r"^the DDIMScheduler has thresholding True, which is not supported"):
            opened(folder)
    path.write_text(json.dumps({**json.loads(path.read_text()), "thresholding": False}))
    _name_in_index(folder, requires_aesthetics_score=True)
    for opened in (pipelines.load, outline):
        with pytest.raises(ValueError, match=r"model_index\.json has requires_aesthetics_score True"):
            opened(folder)
