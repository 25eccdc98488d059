"""The memory of a GPU, counted on the meta device, against sums worked by hand."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from genalign.runtime.counted_memory import CountedMemory, CudaKernels


def test_storages_are_counted_while_they_live() -> None:
    weight = torch.empty(1000, 1000, device="meta")
    memory = CountedMemory()
    memory.leave_out([weight])
    with memory:
        x = torch.empty(1000, 256, device="meta")
        part, transposed = x[:10], weight.t()
        assert memory.live == memory.peak == 1000 * 256 * 4 and transposed.shape == (1000, 1000)
        del x
        assert memory.live == 1000 * 256 * 4
        del part
        assert memory.live == 0 < memory.peak
        assert memory.reset_peak() == memory.peak == 0
        for _ in range(2):  # the second time from memory
            y = torch.empty(3, device="meta") + 1
            y.add_(1)
        assert memory.live == 512 and memory.peak == 3 * 512


def test_values_are_finite_and_true() -> None:
    with CountedMemory():
        x = torch.zeros(4, 3, device="meta")
        assert x[0, 0].item() == 1.0 and bool((x > 0).all()) and not bool(x.isnan().any())
        assert not bool((~x.isfinite()).any()) and x.tolist() == [[1.0] * 3] * 4
        assert (~x.isfinite()).cpu().tolist() == [[False] * 3] * 4
        assert torch.zeros(4, 3).copy_(x).sum() == 12


def test_numbers_on_the_cpu_are_computed_each_time() -> None:
    """An optimizer counts its steps there: what is done to the first counter is done to the second."""
    with CountedMemory():
        counters = [torch.zeros(()) for _ in range(2)]
        for counter in counters:
            counter += 1
    assert [float(counter) for counter in counters] == [1.0, 1.0]


def test_a_training_step_holds_what_autograd_saves() -> None:
    network = nn.Sequential(nn.Linear(256, 256, bias=False), nn.Tanh(), nn.Linear(256, 256, bias=False)).to("meta")
    memory = CountedMemory()
    memory.leave_out(network.parameters())
    with memory:
        x = torch.zeros(128, 256, device="meta")
        output, one = network(x), 4 * 128 * 256
        assert memory.live == 3 * one  # its input, the output of tanh, and its own; the first layer's is not saved
        output.sum().backward()
        del output
        assert memory.live == one + 2 * 4 * 256 * 256  # the gradients of the weights
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_attention_saves_nothing_quadratic() -> None:
    tokens = 4096
    with CountedMemory() as memory, CudaKernels():
        query = torch.empty(1, 2, tokens, 64, device="meta", dtype=torch.bfloat16, requires_grad=True)
        before = memory.live
        output = F.scaled_dot_product_attention(query, query, query)
        assert output.shape == query.shape
        assert query.nbytes <= memory.live - before < 1.1 * query.nbytes  # and the sums of exponentials
        mask = torch.ones(1, 1, 1, tokens, dtype=torch.bool, device="meta")
        assert F.scaled_dot_product_attention(query, query, query, attn_mask=mask).shape == query.shape


def test_autocast_casts_as_on_cuda_also_in_a_second_forward_pass() -> None:
    layer, dtypes = nn.Linear(4, 4).to("meta"), list[torch.dtype]()
    kernels = CudaKernels(torch.bfloat16)

    def block(x: torch.Tensor) -> torch.Tensor:
        dtypes.append((output := layer(x)).dtype)
        return F.layer_norm(output, (4,))

    with CountedMemory(), kernels:
        x = torch.empty(2, 4, device="meta", requires_grad=True)
        output = kernels.checkpoint(block, x)
        assert output.dtype == torch.float32
        output.sum().backward()
    assert dtypes == [torch.bfloat16] * 2
