"""A LoRA with a hypernetwork, on a tiny checkpoint of every family: guided batches, gradients, checkpointing, files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import pipelines
from genalign.diffusion.hypernetwork import Hypernetwork, hypernetwork_of
from genalign.diffusion.policy import Lora, Policy
from genalign.diffusion.rollout import RolloutInputs, rollout
from genalign.diffusion.transitions import ODE, transition
from genalign.runtime.memory_options import Memory
from pipelines.base import DiffusersPipeline
from tests.pipelines.tiny_checkpoints import FAMILIES, FolderOf

pytestmark = [
    pytest.mark.slow,
    # torch's older weight_norm, which diffusers' AutoencoderOobleck uses
    pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword"),
]
PROMPTS = ["a red circle", "two big blue squares"]


def _opened(folder: Path, family: str, checkpointing: bool = False) -> tuple[DiffusersPipeline, Policy]:
    options = {**FAMILIES[family].options, "memory": Memory(checkpointing=checkpointing)}
    pipeline = pipelines.load(folder, **options)
    policy = Policy(pipeline.denoiser, Lora(rank=2, alpha=2, hypernetwork=Hypernetwork(width=8)))
    return pipeline, policy


def _randomize(policy: Policy) -> None:
    for parameter in policy.parameters:
        nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(parameter.numel()))


def _two_steps(pipeline: DiffusersPipeline) -> Tensor:
    """Two steps by the ODE, with a gradient: the gates of the second differ from those of the first."""
    conditioning, grid, x = pipeline.encode(PROMPTS), pipeline.grid(2), pipeline.initial_noise([1, 2])
    guidance = pipeline.guidance_scale(None)
    for index in range(2):
        prediction = pipeline.predict(x, grid[index], conditioning, guidance)
        x = transition(pipeline.path, ODE(), x, prediction, grid[index]).mean
    return x


@pytest.mark.parametrize("family", FAMILIES)
def test_a_hypernetwork_samples_learns_and_is_saved(family: str, folder_of: FolderOf, tmp_path: Path) -> None:
    plain = pipelines.load(folder_of(family), **FAMILIES[family].options)
    with torch.no_grad():
        base = _two_steps(plain)
    gradients = []
    for checkpointing in (False, True):
        pipeline, policy = _opened(folder_of(family), family, checkpointing)
        with torch.no_grad():
            assert torch.equal(_two_steps(pipeline), base)
        _randomize(policy)
        _two_steps(pipeline).square().mean().backward()
        # the last block of some families leaves the text tokens unused
        own = [torch.zeros_like(p) if p.grad is None else p.grad for p in policy.parameters]
        gradients.append(torch.cat([gradient.flatten() for gradient in own]))
        gates = hypernetwork_of(pipeline.denoiser)
        assert gates is not None and all(p.grad is not None and bool(p.grad.any()) for p in gates.parameters())
    assert float((gradients[0] - gradients[1]).norm() / gradients[0].norm()) < 1e-4

    inputs = RolloutInputs(pipeline.encode(PROMPTS), torch.tensor([0, 1]), (1, 2), (3, 4))
    arguments = (pipeline.grid(2), [ODE()] * 2, pipeline.guidance_scale(None))
    together = rollout(pipeline, inputs, *arguments).final
    alone = torch.cat([rollout(pipeline, part, *arguments).final for part in inputs.split(1)])
    assert torch.allclose(together, alone, rtol=1e-3, atol=1e-4 * float(alone.abs().max()))
    assert not torch.allclose(together, base, rtol=1e-3)

    assert policy.config is not None
    pipeline.save_lora(tmp_path / "lora", policy.adapter_state(), policy.config)
    plain.load_lora(tmp_path)
    assert torch.equal(rollout(plain, inputs, *arguments).final, together)
