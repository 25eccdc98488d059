"""Gates of a LoRA: the product that they mean (fixture F21), what they read, and when they are set."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from genalign.diffusion.hypernetwork import Hypernetwork, add_hypernetwork, gated, hypernetwork_of
from genalign.diffusion.lora import ADAPTER
from genalign.diffusion.policy import Lora, Policy
from genalign.runtime.memory_options import Memory
from genalign.types import NoiseLevel
from pipelines import SD3
from tests.genalign.algorithms.updates import randn


class OneLayer(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.layer(x))


LEVEL = NoiseLevel(*(torch.tensor(value, dtype=torch.float64) for value in (500.0, 0.5, 0.5)))


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_gates_scale_the_ranks_of_each_sample(kind: str) -> None:
    """dW = s B diag(g) A for every row, which one product of matrices cannot be for all rows."""
    base: nn.Module = nn.Linear(4, 3, dtype=torch.float64)
    if kind == "conv":
        base = nn.Conv2d(4, 3, kernel_size=1, dtype=torch.float64)
    network = OneLayer(base)
    Policy(network, Lora(2, 3, ["layer"]))
    hypernetwork = add_hypernetwork(network, Hypernetwork())
    layer = cast(LoraLayer, network.layer)
    a, b = (factors[ADAPTER].weight for factors in (layer.lora_A, layer.lora_B))
    a.data, b.data = randn(*a.shape, seed=1), randn(*b.shape, seed=2)
    gates = torch.tensor([[0.0, 1.0], [2.0, -0.5]], dtype=torch.float64)
    hypernetwork.forward = lambda *_: (gates,)
    x = randn(2, 4, 5, 5, seed=3) if kind == "conv" else randn(2, 5, 4, seed=3)
    with torch.no_grad(), gated(network, x, LEVEL, {}):
        output = network(x)
        plain = layer.get_base_layer()(x)
    for row, own in enumerate(gates):
        change = 1.5 * b.flatten(1) @ own.diag() @ a.flatten(1)
        features = x[row].flatten(1).T if kind == "conv" else x[row]
        expected = features @ change.T
        added = output[row] - plain[row]
        assert torch.allclose(added.flatten(1).T if kind == "conv" else added, expected, atol=1e-12)


def _texts(rows: int, tokens: int, padding: int = 0) -> dict[str, Tensor]:
    made = randn(rows, tokens, 6, seed=5).float()
    return {"prompt": nn.functional.pad(made, (0, 0, 0, padding)), "mask": torch.ones(rows, tokens, dtype=torch.long)}


def _hypernetwork(condition_on: str) -> nn.Module:
    network = OneLayer(nn.Linear(4, 3))
    Policy(network, Lora(2, 3, ["layer"], Hypernetwork(condition_on)))
    made = hypernetwork_of(network)
    assert made is not None
    nn.init.normal_(made.gates.weight, generator=torch.Generator().manual_seed(0))
    return made


def test_gates_of_the_state_read_latents_text_and_level_but_no_padding() -> None:
    made, x = _hypernetwork("state"), randn(2, 3, 4, 4, seed=1).float()
    (gates,) = made(x, LEVEL, _texts(2, 3))
    later = NoiseLevel(LEVEL.timestep, LEVEL.alpha + 0.2, LEVEL.sigma - 0.2)
    assert gates.shape == (2, 2)
    assert torch.equal(gates, made(x, LEVEL, _texts(2, 3, padding=4))[0])
    others = [(2 * x, LEVEL, _texts(2, 3)), (x, later, _texts(2, 3)), (x, LEVEL, _texts(2, 2))]
    assert all(not torch.allclose(gates, made(*other)[0]) for other in others)
    per_sample = NoiseLevel(*(torch.stack([value, value]) for value in (LEVEL.timestep, LEVEL.alpha, LEVEL.sigma)))
    guided = made(torch.cat([x, x]), per_sample, {name: torch.cat([t, t]) for name, t in _texts(2, 3).items()})
    assert torch.allclose(guided[0], torch.cat([gates, gates]))
    (many,) = made(x, LEVEL.rows(torch.tensor([0, 0])), {"prompt": _texts(2, 3)["prompt"].double()})
    assert torch.allclose(many, gates)


def test_gates_of_the_prompt_are_the_same_at_all_steps() -> None:
    made, x = _hypernetwork("prompt"), randn(2, 3, 4, 4, seed=1).float()
    later = NoiseLevel(LEVEL.timestep, LEVEL.alpha + 0.2, LEVEL.sigma - 0.2)
    (gates,) = made(x, LEVEL, _texts(2, 3))
    assert torch.equal(gates, made(2 * x, later, _texts(2, 3))[0])
    assert not torch.allclose(gates[0], gates[1])


def _opened(folder: Path, checkpointing: bool = False, condition_on: str = "state") -> tuple[SD3, Policy]:
    tiny = SD3.load(folder, height=32, width=32, memory=Memory(checkpointing=checkpointing))
    policy = Policy(tiny.denoiser, Lora(rank=2, alpha=4, hypernetwork=Hypernetwork(condition_on, width=8)))
    return tiny, policy


def _randomize(policy: Policy) -> None:
    for parameter in policy.parameters:
        nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(parameter.numel()))


def _predicted(tiny: SD3, guidance: float = 1.0, level: NoiseLevel = LEVEL) -> Tensor:
    x, conditioning = tiny.initial_noise([1, 2]), tiny.encode(["a circle", "two squares"])
    return tiny.predict(x, level, conditioning, guidance)


def test_it_starts_at_the_reference_and_belongs_to_the_policy(tiny_folder: Path) -> None:
    tiny = SD3.load(tiny_folder, height=32, width=32)
    with torch.no_grad():
        base = _predicted(tiny, 2.0)
        policy = Policy(tiny.denoiser, Lora(rank=2, alpha=4, hypernetwork=Hypernetwork(width=8)))
        assert torch.equal(_predicted(tiny, 2.0), base)
        names = [name for name, parameter in tiny.denoiser.named_parameters() if parameter.requires_grad]
        assert any(name.startswith("hypernetwork.") for name in names) and len(names) == len(policy.parameters)
        first = policy.snapshot()
        _randomize(policy)
        assert not torch.allclose(_predicted(tiny, 2.0), base)
        with policy.reference():
            assert torch.equal(_predicted(tiny, 2.0), base)
        with policy.using(first):
            assert torch.equal(_predicted(tiny, 2.0), base)


def test_rows_of_a_guided_batch_have_gates_of_their_own(tiny_folder: Path) -> None:
    tiny, policy = _opened(tiny_folder)
    _randomize(policy)
    with torch.no_grad():
        guided, conditional = _predicted(tiny, 3.0), _predicted(tiny)
        x, empty = tiny.initial_noise([1, 2]), tiny.encode(["", ""])
        unconditional = tiny.predict(x, LEVEL, empty, 1.0)
    assert torch.allclose(guided, unconditional + 3.0 * (conditional - unconditional), atol=1e-4)


def test_gradient_checkpointing_computes_blocks_again_with_the_gates_of_their_call(tiny_folder: Path) -> None:
    """The backward pass of two calls, whose gates differ, after both of them."""
    gradients = []
    for checkpointing in (False, True):
        tiny, policy = _opened(tiny_folder, checkpointing)
        _randomize(policy)
        later = NoiseLevel(LEVEL.timestep / 2, LEVEL.alpha + 0.25, LEVEL.sigma - 0.25)
        (_predicted(tiny).square().mean() + _predicted(tiny, level=later).square().mean()).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters if p.grad is not None]))
        assert all(p.grad is not None and bool(p.grad.any()) for p in hypernetwork_of(tiny.denoiser).parameters())
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-7)


def test_a_call_past_the_pipeline_and_layers_without_rows_of_samples_are_refused() -> None:
    network = OneLayer(nn.Linear(4, 3))
    Policy(network, Lora(2, 3, ["layer"], Hypernetwork()))
    with pytest.raises(ValueError, match="call it through the pipeline's predict"):
        network(torch.zeros(2, 4))
    x, texts = torch.zeros(2, 4, 3), {"prompt": torch.zeros(2, 5)}
    with pytest.raises(ValueError, match="8 rows for a batch of 2"), gated(network, x, LEVEL, texts):
        network(torch.zeros(8, 4))


def test_settings_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match=r'hypernetwork\.condition_on must be "state" or "prompt"'):
        Hypernetwork("step")
    with pytest.raises(ValueError, match=r"hypernetwork\.width must be at least 1"):
        Hypernetwork(width=0)
