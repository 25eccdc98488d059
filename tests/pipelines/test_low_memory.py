"""A quantised base under a LoRA."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from genalign.diffusion.policy import Lora, Policy
from genalign.runtime.memory_options import Memory
from pipelines import SD3

PROMPTS = ["a red circle", "a blue square"]


def test_a_lora_is_trained_on_an_int8_base(tiny: SD3, tiny_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchao", reason="the extra genalign[memory] is not installed")
    small = SD3.load(tiny_folder, memory=Memory(quantization="int8"))
    policy = Policy(small.denoiser, Lora(rank=4))
    for parameter in policy.parameters:
        torch.nn.init.normal_(parameter, std=0.1)
    x, conditioning, step = tiny.initial_noise([1, 2]), tiny.encode(PROMPTS), tiny.grid(4)[1]
    small.predict(x, step, conditioning, 1.0).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in policy.parameters[:4])
    with torch.no_grad(), policy.reference():
        rounded, exact = (pipeline.predict(x, step, conditioning, 1.0) for pipeline in (small, tiny))
    error = float((rounded - exact).norm() / exact.norm())
    assert 0 < error < 0.02  # 8 bits of weights
    small.save_lora(tmp_path, policy.adapter_state(), policy.config)  # it has one
    tiny.load_lora(tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is refused without a GPU")
def test_nf4_needs_a_gpu(tiny_folder: Path) -> None:
    with pytest.raises(ValueError, match="'nf4' needs a CUDA device: take 'int8', or none, on this machine"):
        SD3.load(tiny_folder, memory=Memory(quantization="nf4"))
