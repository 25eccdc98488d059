"""The memory options of a pipeline: a quantized base under a LoRA, and networks that wait on the CPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.quantizers import PipelineQuantizationConfig
from torch import Tensor, nn

from genalign.runtime.memory_options import Memory

_PACKAGES = {"nf4": "bitsandbytes", "int8": "torchao"}


def quantization_arguments(memory: Memory, component: str, dtype: torch.dtype) -> dict[str, Any]:
    """Return the arguments of ``from_pretrained`` that quantize ``component`` as ``memory.quantization`` says.

    Raises ValueError if the package for it is not installed, or for "nf4" without a CUDA device.
    """
    if memory.quantization is None:
        return {}
    if memory.quantization == "nf4" and not torch.cuda.is_available():
        raise ValueError("quantization 'nf4' needs a CUDA device: take 'int8', or none, on this machine")
    package = _PACKAGES[memory.quantization]
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"quantization {memory.quantization!r} needs {package}: pip install 'genalign[memory]'")
    config: Any
    if memory.quantization == "nf4":
        from diffusers import BitsAndBytesConfig

        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    else:
        from diffusers import TorchAoConfig
        from torchao.quantization import Int8WeightOnlyConfig

        config = TorchAoConfig(Int8WeightOnlyConfig())
    return {"quantization_config": PipelineQuantizationConfig(quant_mapping={component: config})}


def pin_weights(modules: Sequence[nn.Module]) -> None:
    """Move weights on the CPU to pinned memory, from which copies to a CUDA device are fastest."""
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.data = tensor.data.pin_memory()


@contextmanager
def on_device(modules: Sequence[nn.Module], device: torch.device, offload: bool) -> Iterator[None]:
    """Run modules, if ``offload``, on copies of their weights on ``device`` within the context.

    The weights themselves stay on the CPU, and nothing is copied back: they must not change within the context.
    """
    weights = list(_weights(modules)) if offload and device.type != "cpu" else []
    copies: dict[int, Tensor] = {}  # by the weight, which several layers may share
    try:
        for registry, name, weight in weights:
            if id(weight) not in copies:
                copies[id(weight)] = _copy(weight, device)
            registry[name] = copies[id(weight)]
        yield
    finally:
        for registry, name, weight in weights:
            registry[name] = weight


def _weights(modules: Sequence[nn.Module]) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """Yield every parameter and buffer, with the dictionary of its layer and its name there."""
    for layer in (layer for module in modules for layer in module.modules()):
        for registry in (layer._parameters, layer._buffers):
            for name, weight in registry.items():
                if weight is not None:
                    yield registry, name, weight


def _copy(weight: Tensor, device: torch.device) -> Tensor:
    copy = weight.detach().to(device, non_blocking=True)
    return nn.Parameter(copy, weight.requires_grad) if isinstance(weight, nn.Parameter) else copy
