"""The optimizer of reward models: its schedule, its float32 weights, and its exact resumption."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from genalign.reward_learning.fitting import FitSettings, Fitter


def _layer(dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2, dtype=dtype)


def _loss(layer: nn.Linear, step: int) -> Tensor:
    inputs = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
    output: Tensor = layer(inputs)
    return output.square().mean() + output.sum()


def test_the_steps_are_those_of_adamw_with_a_linear_schedule_and_clipping() -> None:
    ours, reference = _layer(), _layer()
    settings = FitSettings(learning_rate=0.1, weight_decay=0.2, last=0.5, clip=0.3)
    fitter = Fitter(dict(ours.named_parameters()), settings, steps=6)
    optimizer = torch.optim.AdamW(reference.parameters(), 0.1, weight_decay=0.2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5, 6)
    for step in range(8):
        norm = fitter.step(_loss(ours, step))
        optimizer.zero_grad()
        torch.autograd.backward(_loss(reference, step))
        assert float(norm) == float(nn.utils.clip_grad_norm_(reference.parameters(), 0.3))
        optimizer.step()
        schedule.step()
        torch.testing.assert_close(ours.weight, reference.weight)


def test_warmup_raises_the_rate_and_no_number_of_steps_leaves_it_constant() -> None:
    settings = FitSettings(learning_rate=1.0, warmup=3, last=0.0)
    assert [settings.rate(step, None) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert settings.rate(8, 10) == pytest.approx(0.2)
    assert settings.rate(20, 10) == 0.0


def test_a_resumed_fit_makes_the_same_steps_bit_for_bit() -> None:
    whole, first, second = _layer(), _layer(), _layer()
    settings = FitSettings(warmup=2)
    fitter = Fitter(dict(whole.named_parameters()), settings, steps=10)
    for step in range(10):
        fitter.step(_loss(whole, step))
    half = Fitter(dict(first.named_parameters()), settings, steps=10)
    for step in range(4):
        half.step(_loss(first, step))
    saved = half.tensors()
    half.step(_loss(first, 4))  # what is saved are copies
    rest = Fitter(dict(second.named_parameters()), settings, steps=10)
    rest.load_tensors(saved)
    for step in range(4, 10):
        rest.step(_loss(second, step))
    assert torch.equal(whole.weight, second.weight)
    assert all(torch.equal(value, rest.tensors()[name]) for name, value in fitter.tensors().items())


def test_weights_are_float32_and_unused_ones_get_a_gradient_of_zero() -> None:
    layer, unused = _layer(torch.bfloat16), nn.Parameter(torch.ones(2))
    fitter = Fitter(dict(layer.named_parameters()) | {"unused": unused}, FitSettings(weight_decay=0.0))
    fitter.step(_loss(layer, 0))
    assert layer.weight.dtype == torch.float32
    assert torch.equal(unused, torch.ones(2))


def test_bad_input_is_named() -> None:
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    with pytest.raises(ValueError, match="requires a gradient"):
        Fitter({"frozen": frozen}, FitSettings())
    with pytest.raises(ValueError, match="learning_rate must be positive"):
        FitSettings(learning_rate=0)
    with pytest.raises(ValueError, match="clip must be positive"):
        FitSettings(clip=0)
    fitter = Fitter(dict(_layer().named_parameters()), FitSettings())
    with pytest.raises(ValueError, match="of other weights"):
        fitter.load_tensors({"count": torch.tensor(0)})
