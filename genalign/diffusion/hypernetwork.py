"""Hypernetworks (HyperAlign, arXiv 2601.15968): a network that makes gates for the ranks of every LoRA layer.

The change of a layer's weights is dW = s B diag(g) A with gates g (rank,) of each sample, which the network computes
from the latents, the text and the noise level of the call. It starts at the plain LoRA, g = 1.

B counts the rows of one call of the denoiser, two for each sample under classifier-free guidance.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from genalign.diffusion.lora import ADAPTER
from genalign.diffusion.noise import derived_seed
from genalign.types import NoiseLevel

HYPERNETWORK = "hypernetwork"
"""The name of the network that makes the gates, as a module of the denoiser."""

_FREQUENCIES = 8  # of the noise level
_GATES = "genalign_gates"  # the attribute of a LoRA's first matrix that holds the gates of the call


@dataclass(frozen=True)
class Hypernetwork:
    """A network that makes the gates of a LoRA.

    Args:
        condition_on: What the gates depend on. "state": latents, text and noise level, recomputed at every step
            (HyperAlign-S). "prompt": only the text, so they are the same at all steps (like HyperAlign-I, which also
            reads the initial noise).
        width: Width of its two hidden layers.
    """

    condition_on: Literal["state", "prompt"] = "state"
    width: int = 128

    def __post_init__(self) -> None:
        if self.condition_on not in ("state", "prompt"):
            raise ValueError(f'hypernetwork.condition_on must be "state" or "prompt", not {self.condition_on!r}')
        if self.width < 1:
            raise ValueError(f"hypernetwork.width must be at least 1, not {self.width}")


class GateNetwork(nn.Module):
    """Gates (B, rank) of every LoRA layer of a denoiser.

    Latents and texts of any size are read through fixed random projections to ``width`` numbers, which follow from the
    names and sizes of the tensors: families differ in them, and a checkpoint need not hold them. Latents are read as
    the mean and the variance of each channel, texts as the mean over their tokens, without padding.

    Args:
        settings: What it reads, and its width.
        layers: The first matrix of the LoRA of every layer, which is not a part of this network.
    """

    def __init__(self, settings: Hypernetwork, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.settings, self.layers, width = settings, tuple(layers), settings.width
        self.ranks = [len(cast(Tensor, layer.weight)) for layer in layers]
        size = width if settings.condition_on == "prompt" else 2 * width + _FREQUENCIES
        self.hidden = nn.Sequential(nn.Linear(size, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.gates = nn.Linear(width, sum(self.ranks))
        nn.init.zeros_(self.gates.weight)
        nn.init.zeros_(self.gates.bias)
        self._projections: dict[tuple[str, int], Tensor] = {}

    def forward(self, x: Tensor, level: NoiseLevel, texts: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Compute the gates of every layer.

        Args:
            x: Latents (B, C, ...), in the scale that the denoiser takes.
            level: Their noise level, of all rows, or of each sample where B repeats the samples.
            texts: The conditioning, by name; integers and masks are not read.
        """
        embeddings = {name: text for name, text in texts.items() if text.is_floating_point() and text.ndim > 1}
        inputs = [torch.stack([self._projected(name, _pooled(text)) for name, text in embeddings.items()]).sum(0)]
        if self.settings.condition_on == "state":
            levels = level.alpha, level.sigma  # () of all rows, or (n,)
            alpha, sigma = (value.repeat(len(x) // len(value)) if value.ndim else value for value in levels)
            flat = x.float().flatten(2)
            inputs.append(self._projected("latents", torch.cat([flat.mean(2), flat.var(2, correction=0)], dim=1)))
            share = (sigma / (alpha + sigma)).float().to(x.device, non_blocking=True).expand(len(x))
            inputs.append((math.pi * share[:, None] * torch.arange(_FREQUENCIES, device=x.device)).cos())
        gates: Tensor = 1 + self.gates(self.hidden(torch.cat(inputs, dim=1)))
        return torch.split(gates, self.ranks, dim=1)

    def _projected(self, name: str, vector: Tensor) -> Tensor:
        """Project vectors (B, n) to (B, width), with the same variance."""
        key, size = (name, vector.shape[1]), self.settings.width
        if key not in self._projections or self._projections[key].device != vector.device:
            generator = torch.Generator().manual_seed(derived_seed(HYPERNETWORK, name, *vector.shape[1:], size))
            drawn = torch.randn(vector.shape[1], size, generator=generator) / vector.shape[1] ** 0.5
            self._projections[key] = drawn.to(vector.device)
        return vector @ self._projections[key]


def _pooled(text: Tensor) -> Tensor:
    """Average the tokens of texts (B, ..., n) that are not padding, which is zero, to vectors (B, n) of variance 1."""
    tokens = text.float().flatten(1, -2) if text.ndim > 2 else text.float()[:, None]
    count = (tokens != 0).any(2).sum(1, keepdim=True).clamp(min=1)
    return nn.functional.layer_norm(tokens.sum(1) / count, tokens.shape[2:])


def hypernetwork_of(network: nn.Module) -> GateNetwork | None:
    """Return the hypernetwork of a denoiser's adapter; None without one."""
    return next((child for child in network.children() if isinstance(child, GateNetwork)), None)


def add_hypernetwork(network: nn.Module, settings: Hypernetwork) -> GateNetwork:
    """Give the adapter ADAPTER of ``network`` gates, which are 1 at first.

    Gradient checkpointing of its blocks, if it is on, computes them again with the gates of the call.
    """
    from peft.tuners.lora import LoraLayer  # takes seconds

    adapted = [module for module in network.modules() if isinstance(module, LoraLayer) and ADAPTER in module.lora_A]
    layers = [module.lora_A[ADAPTER] for module in adapted]
    gates = GateNetwork(settings, layers).to(layers[0].weight.device)
    for layer in layers:
        setattr(layer, _GATES, None)
        layer.register_forward_hook(_multiply_by_gates)
    network.add_module(HYPERNETWORK, gates)
    for module in network.modules():
        if getattr(module, "gradient_checkpointing", False):
            untyped: Any = module
            untyped._gradient_checkpointing_func = with_gates(network, untyped._gradient_checkpointing_func)
    return gates


def _multiply_by_gates(first: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Multiply what a LoRA's first matrix returns by the gates of each row: a forward hook."""
    gates: Tensor | None = getattr(first, _GATES)
    if gates is None:
        raise ValueError(
            "the adapter has a hypernetwork, which this call of the denoiser does not run: call it through the"
            " pipeline's predict, and switch gradient checkpointing on by model.memory.checkpointing"
        )
    if len(gates) != len(output):
        raise ValueError(
            f"a layer of the adapter has {len(output)} rows for a batch of {len(gates)}, so it has no gates of"
            " its own for each sample: leave this layer out of lora.targets, or lora.hypernetwork"
        )
    middle = [1] * (output.ndim - 2)
    shape = (len(gates), -1, *middle) if isinstance(first, nn.Conv2d) else (len(gates), *middle, -1)
    return output * gates.to(output.dtype).view(shape)


@contextlib.contextmanager
def _set_gates(layers: Sequence[nn.Module], gates: Sequence[Tensor | None]) -> Iterator[None]:
    """Set the gates of LoRAs' first matrices within the context."""
    before = [getattr(first, _GATES) for first in layers]
    for first, own in zip(layers, gates, strict=True):
        setattr(first, _GATES, own)
    try:
        yield
    finally:
        for first, own in zip(layers, before, strict=True):
            setattr(first, _GATES, own)


@contextlib.contextmanager
def gated(network: nn.Module, x: Tensor, level: NoiseLevel, texts: Mapping[str, Tensor]) -> Iterator[None]:
    """Set the gates of a call of ``network`` within the context; nothing without a hypernetwork.

    Enter it before autocast: gates are computed in float32.

    Args:
        network: The denoiser.
        x: Latents (B, C, ...), in the scale that the denoiser takes.
        level: Their noise level, of all rows, or of each sample where B repeats the samples.
        texts: The conditioning of B rows, by name.
    """
    hypernetwork = hypernetwork_of(network)
    if hypernetwork is None:
        yield
        return
    with _set_gates(hypernetwork.layers, hypernetwork(x, level, texts)):
        yield


@contextlib.contextmanager
def gates_of_rows(network: nn.Module, rows: Tensor) -> Iterator[None]:
    """Set the gates of some rows (n,) of a call within the context, which runs ``network`` on these alone."""
    hypernetwork = hypernetwork_of(network)
    if hypernetwork is None:
        yield
        return
    gates = [getattr(layer, _GATES) for layer in hypernetwork.layers]
    with _set_gates(hypernetwork.layers, [None if own is None else own[rows] for own in gates]):
        yield


@dataclass(frozen=True)
class GatedBlock:
    """A block of a denoiser with the gates of one call, whenever it is run."""

    block: Callable[..., Any]
    layers: Sequence[nn.Module]
    gates: Sequence[Tensor | None]

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        with _set_gates(self.layers, self.gates):
            return self.block(*inputs, **named)


def with_gates(network: nn.Module, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function that checkpoints a block, so the block is computed again with the gates of its call.

    The block is computed again in the backward pass, when other calls may have set other gates since. The function gets
    a ``GatedBlock`` in place of the block.
    """
    hypernetwork = hypernetwork_of(network)
    if hypernetwork is None:
        return checkpoint
    layers = hypernetwork.layers

    def checkpointed(block: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
        return checkpoint(GatedBlock(block, layers, [getattr(layer, _GATES) for layer in layers]), *inputs, **named)

    return checkpointed


def without_hypernetwork(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of an adapter without those of its hypernetwork."""
    return {name: tensor for name, tensor in state.items() if not name.startswith(f"{HYPERNETWORK}.")}
