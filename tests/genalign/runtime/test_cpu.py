"""What is freed is kept, and used again without being asked of the system; and how attention is computed."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from genalign.runtime import cpu

FAULTS = """
import resource, sys, torch
from genalign.runtime.cpu import retain_freed_memory
assert retain_freed_memory() is (sys.argv[1] == "kept")
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(16 * 2**20)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


def _faults(environment: dict[str, str], name: str) -> int:
    done = subprocess.run([sys.executable, "-c", FAULTS, name], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
def test_freed_memory_is_used_again() -> None:
    kept, given_back = _faults({}, "kept"), _faults({"MALLOC_TOP_PAD_": "131072"}, "as it was")
    assert kept < 100 < given_back


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu.sys, "platform", "darwin")
    assert not cpu.retain_freed_memory()


MASKS = {
    "none": None,
    "added": torch.randn(2, 1, 5, 7, dtype=torch.float64),
    "of truth values": torch.rand(5, 7) > 0.3,
    "causal": "causal",
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("at_once", [1, 2**18])
@pytest.mark.parametrize("key_heads", [6, 2])
def test_attention_gradients_are_those_of_the_formula(
    name: str, scale: float | None, at_once: int, key_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "_SCORES_AT_ONCE", at_once)
    cpu.use_faster_attention_backward()
    torch.manual_seed(0)
    causal, mask = name == "causal", MASKS[name]
    sizes = (5, 5, 5) if causal else (5, 7, 7)
    heads = 6, key_heads, key_heads
    inputs = [torch.randn(2, n, h, 4, dtype=torch.float64).transpose(1, 2) for n, h in zip(sizes, heads, strict=True)]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    mask = None if causal else mask

    def gradients(backend: SDPBackend) -> tuple[Tensor, ...]:
        with sdpa_kernel(backend):
            output = F.scaled_dot_product_attention(
                *inputs, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=True
            )
        assert ("Flash" in output.grad_fn.name()) == (backend is SDPBackend.FLASH_ATTENTION)
        weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view_as(output)
        return torch.autograd.grad(output, inputs, weights)

    for ours, expected in zip(gradients(SDPBackend.FLASH_ATTENTION), gradients(SDPBackend.MATH), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attention_gradients_have_the_strides_that_a_compiled_model_expects(kv_heads: int) -> None:
    """torch.compile plans with the strides of the operator's kernel for meta tensors, and asserts them."""
    query, grad, output = (torch.randn(2, 5, 4, 8).transpose(1, 2) for _ in range(3))
    key, value = (torch.randn(2, 7, kv_heads, 8).transpose(1, 2) for _ in range(2))
    arguments = grad, query, key, value, output, torch.randn(2, 4, 5), 0.0, False
    operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    planned = operator(*(a.to("meta") if isinstance(a, Tensor) else a for a in arguments))
    computed = cpu.attention_backward(*arguments)
    assert [tensor.stride() for tensor in computed] == [tensor.stride() for tensor in planned]


@pytest.mark.parametrize("size", [1.0, 2.5])
def test_attention_gradients_in_bfloat16_are_as_precise_as_their_dtype(size: float) -> None:
    """Scores that were rounded to bfloat16 would miss the gradients of large queries and keys by 2 %."""
    cpu.use_faster_attention_backward()
    torch.manual_seed(0)
    inputs = [(scale * torch.randn(4, 2, 84, 64)).bfloat16() for scale in (size, size, 1.0)]
    weights = torch.randn(4, 2, 84, 64)

    def gradients(dtype: torch.dtype, backend: SDPBackend) -> tuple[Tensor, ...]:
        own = [tensor.to(dtype).requires_grad_() for tensor in inputs]
        with sdpa_kernel(backend):
            output = F.scaled_dot_product_attention(*own)
        return torch.autograd.grad(output, own, weights.bfloat16().to(dtype))

    ours = gradients(torch.bfloat16, SDPBackend.FLASH_ATTENTION)
    for gradient, expected in zip(ours, gradients(torch.float64, SDPBackend.MATH), strict=True):
        assert float((gradient.double() - expected).norm() / expected.norm()) < 0.006
