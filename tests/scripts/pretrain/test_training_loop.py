"""The pretraining loop and its data."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from scripts.pretrain import training_loop
from scripts.pretrain.t5 import WIDTH, build_t5
from scripts.pretrain.training_loop import Fit, OutOfTimeError, contrastive, fit

MOVED = (("encoder", "encoder.final_layer_norm.weight"), ("head", "weight"))


def _fit(steps: int, state: Path, stop: int | None = None) -> Tensor:
    torch.manual_seed(0)
    model = nn.Linear(4, 4)  # the matrix by Muon, the bias by AdamW

    def loss(step: int) -> Tensor:
        if step == stop:
            raise KeyboardInterrupt
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        return (model(x) - x).square().mean()

    fit(model, loss, Fit(steps, 1e-2, muon=1e-2, save_every=5), state, (model.weight,))
    return model.weight.detach()


def test_a_resumed_fit_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = _fit(20, tmp_path / "whole.safetensors")
    with pytest.raises(KeyboardInterrupt):
        _fit(20, tmp_path / "parts.safetensors", stop=12)
    assert torch.equal(_fit(20, tmp_path / "parts.safetensors"), whole)


def test_a_fit_stops_in_time_and_goes_on(tmp_path: Path) -> None:
    whole, parts = (nn.Linear(2, 2, bias=False) for _ in range(2))
    parts.load_state_dict(whole.state_dict())
    settings = Fit(3, 1e-2)

    def train(model: nn.Module, settings: Fit, name: str) -> None:
        fit(model, lambda step: model(torch.full((1, 2), float(step))).square().sum(), settings, tmp_path / name)

    train(whole, settings, "whole")
    for _ in range(2):
        with pytest.raises(OutOfTimeError, match="of 3 steps; run this again to go on"):
            train(parts, replace(settings, minutes=1e-9), "parts")
    train(parts, settings, "parts")
    assert torch.equal(parts.weight, whole.weight)


def test_samples_of_one_caption_are_all_right() -> None:
    captions = torch.tensor([0, 0, 1])
    best = 50.0 * (captions[:, None] == captions[None])
    assert float(contrastive(best, best, captions)) == pytest.approx(2 / 3 * math.log(2), abs=1e-5)


def test_it_learns(tmp_path: Path) -> None:
    weight = _fit(300, tmp_path / "s.safetensors")
    assert float((weight - torch.eye(4)).abs().max()) < 0.2


def test_one_cycle_rises_and_falls_to_zero() -> None:
    rates = [training_loop.one_cycle(step, Fit(100, 1.0)) for step in range(100)]
    assert rates[0] == 0.1 and max(rates) == rates[9] == 1.0 and rates[99] == pytest.approx(0.0, abs=1e-3)
    twice = Fit(200, 1.0, cycles=2)
    assert [training_loop.one_cycle(step, twice) for step in range(200)] == 2 * rates
    with pytest.raises(ValueError, match="multiple of the 2 cycles, not 201"):
        Fit(201, 1.0, cycles=2)


def test_a_text_encoder_has_a_learning_rate_of_its_own(tmp_path: Path) -> None:
    """By Adam the first update is as large as the rate, for every weight."""
    model = nn.ModuleDict({"encoder": build_t5(8), "head": nn.Linear(WIDTH, 1)})
    before = [model[name].get_parameter(weight).detach().clone() for name, weight in MOVED]

    def loss(step: int) -> Tensor:
        hidden: Tensor = model["encoder"](torch.tensor([[1, 2, 3]])).last_hidden_state
        return model["head"](hidden).sum()

    fit(model, loss, Fit(1, 1e-2, t5=1e-4, averaging=0.0, warm_up=1.0), tmp_path / "state.safetensors")
    moved = [
        float((model[name].get_parameter(weight).detach() - old).abs().max())
        for (name, weight), old in zip(MOVED, before, strict=True)
    ]
    assert moved == pytest.approx([1e-4, 1e-2], rel=0.02)
