"""A network under torch.compile samples and learns as the plain one does, up to rounding."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from genalign.diffusion.policy import Lora, Policy
from genalign.diffusion.rollout import ReplayBatch, Rollout, RolloutInputs, kernel_per_step, replay, rollout
from genalign.diffusion.transitions import FlowSDE
from pipelines import SD3

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU"),
    pytest.mark.filterwarnings("ignore"),  # the compiler's own
]
KERNEL = FlowSDE(0.7)


def _sample(tiny: SD3) -> Rollout:
    start = RolloutInputs(tiny.encode(["a circle"]), torch.zeros(4, dtype=torch.long), (1, 2, 3, 4), (5, 6, 7, 8))
    return rollout(tiny, start, tiny.grid(3), kernel_per_step(KERNEL, (0, 1), 3), 1.0, (0, 1))


def _gradient(tiny: SD3, policy: Policy, sampled: Rollout) -> tuple[Tensor, Tensor]:
    """Log-ratios before the weights move, and the gradient of their sum afterwards."""
    first = replay(tiny, sampled, tiny.grid(3), KERNEL, ReplayBatch.of_step(1, 4), 1.0).log_ratio.detach()
    for parameter in policy.parameters:
        torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(parameter.numel()))
    again = replay(tiny, sampled, tiny.grid(3), KERNEL, ReplayBatch.of_step(1, 4), 1.0)
    again.log_ratio.sum().backward()
    return first, torch.cat([p.grad.flatten() for p in policy.parameters if p.grad is not None])


def test_it_samples_and_learns_as_the_plain_one(tiny_folder: Path) -> None:
    plain, fast = SD3.load(tiny_folder), SD3.load(tiny_folder, compiled=True)
    policies = [Policy(tiny.denoiser, Lora(rank=2, alpha=4)) for tiny in (plain, fast)]
    sampled = _sample(plain)
    compiled = _sample(fast)
    assert fast.denoiser._compiled_call_impl is not None
    torch.testing.assert_close(compiled.final, sampled.final, rtol=0, atol=1e-4)
    (_, expected), (ratios, gradient) = (
        _gradient(tiny, policy, samples)
        for tiny, policy, samples in zip((plain, fast), policies, (sampled, compiled), strict=True)
    )
    assert float(ratios.abs().max()) < 1e-5
    assert float((gradient - expected).norm()) < 1e-3 * float(expected.norm())
    with torch.no_grad(), policies[1].reference():
        base = replay(fast, compiled, fast.grid(3), KERNEL, ReplayBatch.of_step(1, 4), 1.0)
    assert float(base.log_ratio.abs().max()) < 1e-5
