"""The memory options of a pipeline: a quantized base under a LoRA, and networks that wait on the CPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.quantizers import PipelineQuantizationConfig
from torch import nn

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


@contextmanager
def on_device(modules: Sequence[nn.Module], device: torch.device, offload: bool) -> Iterator[None]:
    """Move modules to ``device`` within the context, and back to the CPU afterwards, if ``offload``."""
    moved = modules if offload else ()
    for module in moved:
        module.to(device)
    try:
        yield
    finally:
        for module in moved:
            module.to("cpu")
