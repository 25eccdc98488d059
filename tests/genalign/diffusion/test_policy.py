"""One network, several weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from genalign.diffusion.policy import Lora, Policy
from tests.fake_cuda import FakeCuda


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def _disturb(policy: Policy) -> None:
    with torch.no_grad():
        for parameter in policy.parameters:
            parameter.add_(0.1)


@pytest.mark.parametrize("lora", [Lora(rank=2, alpha=4, targets=("0", "2")), None])
def test_reference_is_where_training_started(lora: Lora | None) -> None:
    network, x = _network(), torch.ones(1, 4)
    first = network(x).detach()
    policy = Policy(network, lora)
    assert torch.equal(network(x), first)
    _disturb(policy)
    assert not torch.allclose(network(x), first)
    with policy.reference():
        assert torch.equal(network(x), first)
    assert not torch.allclose(network(x), first)


def test_only_adapters_are_trained_and_in_float32() -> None:
    network = _network().to(torch.bfloat16)
    policy = Policy(network, Lora(rank=2, targets=("0",)))
    trained = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    assert {parameter.dtype for parameter in policy.parameters} == {torch.float32}


def test_average_follows_and_can_be_borrowed() -> None:
    network = _network()
    policy = Policy(network, Lora(rank=2, targets=("0",)), ema_decay=0.5)
    start = [parameter.detach().clone() for parameter in policy.parameters]
    _disturb(policy)
    policy.update_average()  # decay is min(0.5, 2 / 11)
    for average, before in zip(policy.average.tensors, start, strict=True):
        torch.testing.assert_close(average, before + 0.1 * (1 - 2 / 11))
    current = [parameter.detach().clone() for parameter in policy.parameters]
    with policy.averaged():
        assert torch.equal(policy.parameters[0], policy.average.tensors[0])
    for parameter, expected in zip(policy.parameters, current, strict=True):
        assert torch.equal(parameter, expected)


def test_adapters_are_seeded() -> None:
    first, second, other = (Policy(_network(), Lora(rank=2, targets=("0",)), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.parameters[0], second.parameters[0])
    assert not torch.equal(first.parameters[0], other.parameters[0])


def test_state_goes_round() -> None:
    policy = Policy(_network(), Lora(rank=2, targets=("0",)))
    _disturb(policy)
    policy.update_average()
    other = Policy(_network(), Lora(rank=2, targets=("0",)))
    other.load_tensors(policy.tensors(), policy.updates)
    assert other.updates == 1
    for a, b in zip(policy.tensors().values(), other.tensors().values(), strict=True):
        assert torch.equal(a, b)


def test_the_drift_of_a_lora_is_that_of_its_product() -> None:
    """|s B A|^2 over the layers, by value and by gradient, without forming B A (fixture F14)."""
    policy = Policy(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), Lora(rank=2, alpha=5, targets=("0", "1")))
    generator = torch.Generator().manual_seed(0)
    for parameter in policy.parameters:
        nn.init.normal_(parameter, generator=generator)
    pairs = zip(policy.parameters[::2], policy.parameters[1::2], strict=True)  # A, B of each layer
    product = torch.stack([(2.5 * b @ a).square().sum() for a, b in pairs]).sum()
    torch.testing.assert_close(policy.drift(), product)
    expected = torch.autograd.grad(product, policy.parameters)
    torch.testing.assert_close(torch.autograd.grad(policy.drift(), policy.parameters), expected)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"no layer named nope: change lora\.targets"):
        Policy(_network(), Lora(targets=("nope",)))
    with pytest.raises(ValueError, match="LoRA rank must be at least 1, not 0"):
        Lora(rank=0)


def test_a_whole_network_on_a_gpu_leaves_its_snapshots_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)  # needs a driver
    with FakeCuda() as cuda:
        network = nn.Linear(1024, 1024, bias=False, device="cuda", dtype=torch.bfloat16)
        policy = Policy(network, None)
        old, count = policy.snapshot(), 1024 * 1024
        optimizer = torch.optim.AdamW(policy.parameters)
        assert cuda.live == 4 * count
        for _ in range(2):
            network(torch.ones(1, 1024, device="cuda")).sum().backward()
            cuda.reset_peak()
            optimizer.step()
            assert cuda.live - 16 * count < 10**5  # weights, gradients and two moments
            optimizer.zero_grad()
            policy.update_average()
            for snapshot in (old, policy.average):
                cuda.reset_peak()
                with policy.using(snapshot):
                    network(torch.ones(1, 1024, device="cuda"))
                assert cuda.peak - 12 * count < 10**5  # nothing of their size is held beside the weights
        assert {tensor.device.type for snapshot in (old, policy.average) for tensor in snapshot.tensors} == {"cpu"}
