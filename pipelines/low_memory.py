"""The memory options of a pipeline: a quantized base under a LoRA, and networks that wait on the CPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.quantizers import PipelineQuantizationConfig
from torch import Tensor, nn

from genalign.runtime.blocks import blocks_of
from genalign.runtime.memory_options import Memory

_PACKAGES = {"nf4": "bitsandbytes", "int8": "torchao", "fp8": "torchao"}
_FP8_CAPABILITY = 8, 9  # Ada, Hopper and later


def require_quantization(memory: Memory, device: str) -> None:
    """Raise ValueError if the package for ``memory.quantization`` is not installed, or ``device`` cannot run it."""
    name, on_cuda = memory.quantization, torch.device(device).type == "cuda"
    if name is None:
        return
    if name == "nf4" and not torch.cuda.is_available():
        raise ValueError("quantization 'nf4' needs a CUDA device: take 'int8', or none, on this machine")
    if name == "fp8" and not (on_cuda and torch.cuda.get_device_capability(device) >= _FP8_CAPABILITY):
        raise ValueError(
            "quantization 'fp8' needs a CUDA device of compute capability 8.9 (Ada, Hopper and later): take 'int8', or"
            " none, on this machine"
        )
    if importlib.util.find_spec(_PACKAGES[name]) is None:
        raise ValueError(f"quantization {name!r} needs {_PACKAGES[name]}: pip install 'genalign[memory]'")


def multiply_in_float8(network: nn.Module, config: Any = None) -> None:
    """Multiply in float8, forward and backward, in the linear layers of the blocks of ``network``, in place.

    Inputs and frozen weights are rounded to float8 with a scale for each row, as are gradients in the backward pass.
    The weights stay as they are. Adapters that are put on afterwards multiply in the dtype of autocast.

    Args:
        network: The network, before an adapter is put on.
        config: The ``torchao.float8.Float8LinearConfig``; None rounds by rows.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    def fits(layer: nn.Module, name: str) -> bool:
        return isinstance(layer, nn.Linear) and not (layer.in_features % 16 or layer.out_features % 16)

    for block in blocks_of(network):
        rowwise = config or Float8LinearConfig.from_recipe_name("rowwise")
        convert_to_float8_training(block, module_filter_fn=fits, config=rowwise)


def quantization_arguments(memory: Memory, component: str, dtype: torch.dtype) -> dict[str, Any]:
    """Return the arguments of ``from_pretrained`` that quantize ``component`` when its weights are read."""
    if memory.quantization in (None, "fp8"):
        return {}
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

    The weights themselves stay on the CPU, and nothing is copied back: they must not change within the context. A graph
    that autograd records within the context keeps the copies until its backward pass, which may come later.
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
