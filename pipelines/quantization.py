"""A quantised base under a LoRA, by diffusers' own configuration."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from diffusers.quantizers import PipelineQuantizationConfig

from genalign.runtime.memory_options import Memory

_PACKAGES = {"nf4": "bitsandbytes", "int8": "torchao"}


def quantized(memory: Memory, component: str, dtype: torch.dtype) -> dict[str, Any]:
    """What ``from_pretrained`` is given for ``memory.quantization`` of ``component``. Raises ValueError where the
    package for it is missing.
    """
    if memory.quantization is None:
        return {}
    if memory.quantization == "nf4" and not torch.cuda.is_available():
        raise ValueError("quantization 'nf4' needs a CUDA device: take 'int8', or none, on this machine")
    package = _PACKAGES[memory.quantization]
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"quantization {memory.quantization!r} needs {package}: pip install 'genalign[memory]'")
    return {"quantization_config": PipelineQuantizationConfig(quant_mapping={component: _config(memory, dtype)})}


def _config(memory: Memory, dtype: torch.dtype) -> Any:
    if memory.quantization == "nf4":
        from diffusers import BitsAndBytesConfig

        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    from diffusers import TorchAoConfig
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())
