"""Files that are whole or absent."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from genalign.runtime.files import load_state, save_state, write_json
from genalign.runtime.state import load_optimizer_tensors, optimizer_tensors


def test_state_goes_round(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6).view(2, 3).t(), "b": torch.tensor(1.5)}
    save_state(tmp_path / "deep" / "s.safetensors", tensors, {"step": 3})
    loaded, meta = load_state(tmp_path / "deep" / "s.safetensors")
    assert meta == {"step": 3} and torch.equal(loaded["a"], tensors["a"]) and torch.equal(loaded["b"], tensors["b"])
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["s.safetensors"]


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Muon])
def test_a_resumed_optimiser_goes_on_as_the_first(kind: type[torch.optim.Optimizer]) -> None:
    def fresh() -> tuple[nn.Linear, torch.optim.Optimizer]:
        torch.manual_seed(0)
        layer = nn.Linear(3, 2, bias=False)
        return layer, kind(layer.parameters(), lr=0.1)

    def step(layer: nn.Linear, optimizer: torch.optim.Optimizer) -> None:
        layer(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    first, optimizer = fresh()
    step(first, optimizer)
    second, resumed = fresh()
    second.load_state_dict(first.state_dict())
    load_optimizer_tensors(resumed, {k: v.clone() for k, v in optimizer_tensors(optimizer).items()})
    step(first, optimizer)
    step(second, resumed)
    assert torch.equal(first.weight, second.weight)


def test_nan_is_not_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        write_json(tmp_path / "x.json", {"a": float("nan")})
    assert not (tmp_path / "x.json").exists()
