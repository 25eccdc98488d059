"""A family that a user defines, by the example of the documentation, is sampled, searched with, trained and planned."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

import pipelines
from genalign.cli.main import main
from pipelines.base import DiffusersPipeline
from pipelines.meta_device import outline
from scripts.pretrain.shapes_models import build_t5
from scripts.pretrain.shapes_tokenizers import t5_tokenizer
from tests.packages import ROOT
from tests.pipelines.tiny_checkpoints import HEADS, kl

PROMPTS = ["a red circle", "two big blue squares"]
FAMILY = "my_families.AuraFlow"
STEPS = 4
CODE, COMPARE = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "families.md").read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny AuraFlow with random weights."""
    torch.manual_seed(0)
    tokenizer = t5_tokenizer()
    t5 = build_t5(len(tokenizer))
    network = diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=HEADS["num_attention_heads"],
        joint_attention_dim=t5.config.d_model,
        caption_projection_dim=16,
        pos_embed_max_size=64,
    )
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.05)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.73)
    folder = tmp_path_factory.mktemp("aura_flow")
    diffusers.AuraFlowPipeline(tokenizer, t5, kl(4), network, scheduler).save_pretrained(folder)
    return folder


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Change to a working directory with the module of the page."""
    (tmp_path / "my_families.py").write_text(CODE)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    yield tmp_path
    sys.modules.pop("my_families", None)


@pytest.mark.parametrize("negative", ["", "three green rings"])
@pytest.mark.usefixtures("work")
def test_samples_equal_those_of_diffusers(checkpoint: Path, negative: str) -> None:
    scope: dict[str, Any] = {}
    exec(COMPARE, scope)
    ours = pipelines.load(checkpoint, family=FAMILY, max_sequence_length=8, negative_prompt=negative)
    vanilla = diffusers.AuraFlowPipeline.from_pretrained(checkpoint)
    vanilla.set_progress_bar_config(disable=True)
    theirs = vanilla(
        PROMPTS,
        negative_prompt=[negative] * 2,
        latents=ours.initial_noise(range(2)),
        num_inference_steps=STEPS,
        guidance_scale=ours.guidance,
        max_sequence_length=8,
        height=16,
        width=16,
        output_type="pt",
    ).images
    torch.testing.assert_close(scope["samples"](ours, PROMPTS, STEPS, 3.5), theirs, rtol=0, atol=1e-4)


@pytest.mark.usefixtures("work")
def test_an_outline_has_its_shapes(checkpoint: Path) -> None:
    meta, real = (opened(checkpoint, family=FAMILY) for opened in (outline, pipelines.load))
    assert isinstance(real, DiffusersPipeline) and isinstance(meta.pipeline, type(real))
    assert meta.pipeline.latent_shape == real.latent_shape == (4, 8, 8)
    tensors = meta.pipeline.longest_conditioning(2)
    assert tensors["context"].shape == real.encode(PROMPTS).tensors["context"].shape == (2, 256, 128)


def test_commands_take_it_by_its_import_path(checkpoint: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = [f"--model.path={checkpoint}", f"--model.family={FAMILY}", "--prompts=prompts.txt"]
    model += ["--rewards.light.function=tests.pipelines.test_own_family.brightness", "--sampling.num_steps=3"]
    training = ["--recipe=genalign.flow_grpo", "--lora.rank=2", '--training={"rounds": 1, "group_size": 2}']
    assert main(["plan", "--output=run", *model, *training]) == 0
    assert "3 x 16 x 16" in capsys.readouterr().out
    assert main(["train", "--output=run", *model, *training]) == 0
    assert json.loads((work / "run" / "config.json").read_text())["model"]["family"] == FAMILY
    assert main(["train", "--resume", "run", "--training.rounds", "2"]) == 0
    assert main(["export", "--run", "run", "--output", "exported", "--format", "pipeline"]) == 0
    assert diffusers.AuraFlowPipeline.from_pretrained(work / "exported").transformer is not None
    search = ["--strategy=genalign.BestOfN", "--strategy.candidates=2", "--lora=run"]
    assert main(["steer", "--output=found", *model, *search]) == 0


def brightness(samples: Tensor, prompts: list[str]) -> Tensor:
    return samples.flatten(1).mean(1)
