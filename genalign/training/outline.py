"""The outline of a checkpoint: its networks on torch's meta device, with shapes but no values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from genalign.runtime.memory_options import Memory
from genalign.types import Pipeline

_QUANTIZED = {"nf4": 0.5 + 4 / 64, "int8": 1.0}  # bytes per number; nf4 has a float32 for every 64 numbers


class MetaPipeline(Pipeline, Protocol):
    """A diffusers pipeline whose networks are on the meta device, with shapes but no values."""

    pipe: Any

    @property
    def sample_shape(self) -> tuple[int, ...]: ...

    @property
    def latent_shape(self) -> tuple[int, ...]: ...

    @property
    def sample_rate(self) -> int | None: ...

    def longest_conditioning(self, count: int) -> Mapping[str, Tensor]: ...

    def run_denoiser(self, x: Tensor, timestep: Tensor, tensors: Mapping[str, Tensor]) -> Tensor: ...

    def run_vae(self, latents: Tensor) -> Tensor: ...

    def zeros(self, *shape: int) -> Tensor: ...

    def encode_longest(self, count: int) -> None:
        """Run the text encoders on ``count`` texts of maximum length."""


@dataclass(frozen=True)
class NetworkSize:
    """A network without an adapter.

    Attributes:
        name: The name of the component.
        parameters: The number of its parameters.
        linear: The number of weights in linear layers, which quantization applies to.
        nbytes: The bytes of its parameters and buffers, without quantization.
        largest: The bytes of the largest linear layer's weight, which is briefly held without quantization.
        kind: Whether it is trained, encodes texts, or decodes latents.
    """

    name: str
    parameters: int
    linear: int
    nbytes: int
    largest: int
    kind: Literal["denoiser", "text encoder", "decoder"]

    def quantized(self, quantization: str | None) -> float:
        """Return the bytes with the weights of linear layers quantized; "fp8" stores them in their own dtype, too."""
        if quantization not in _QUANTIZED:
            return self.nbytes
        return self.nbytes - self.linear * (round(self.nbytes / self.parameters) - _QUANTIZED[quantization])


@dataclass(frozen=True)
class Outline:
    """A checkpoint opened without its weights.

    Attributes:
        pipeline: The pipeline, on the meta device.
        networks: The sizes of its networks without an adapter, the denoiser first.
        memory: The memory options of the run.
        autocast: The dtype of mixed precision; None for none.
    """

    pipeline: MetaPipeline
    networks: Sequence[NetworkSize]
    memory: Memory
    autocast: torch.dtype | None = None


def always_resident(network: NetworkSize, memory: Memory) -> bool:
    """Return whether a network is on the device during the whole run, or only while it is used."""
    waiting = {"none": (), "text": ("text encoder",), "all": ("text encoder", "decoder")}
    return network.kind not in waiting[memory.offload]
