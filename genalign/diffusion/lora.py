"""Low-rank adapters of any network through PEFT: inject, load, merge and save, without a loader per pipeline."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

ADAPTER = "default"
PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."


def inject_lora(network: nn.Module, config: LoraConfig, state: Mapping[str, Tensor] | None = None) -> None:
    """Add the adapter ADAPTER to ``network``, with the weights ``state`` under PEFT's names, or with new weights.

    Raises:
        ValueError: ``state`` does not hold exactly the weights of such an adapter.
    """
    inject_adapter_in_model(config, network, adapter_name=ADAPTER)
    if state is None:
        return
    result = set_peft_model_state_dict(network, dict(state), adapter_name=ADAPTER)
    if mismatches := [name for name in result.missing_keys if "lora_" in name] + list(result.unexpected_keys):
        raise ValueError(
            f"the adapter does not fit this network, at {mismatches[0]}: choose an adapter of the same base model"
        )


def load_lora(network: nn.Module, folder: Path) -> None:
    """Inject the adapter of a PEFT folder. Raises ValueError if it was trained on another network."""
    state = {name.removeprefix(_PREFIX): tensor for name, tensor in load_file(folder / PEFT_WEIGHTS).items()}
    inject_lora(network, LoraConfig.from_pretrained(str(folder)), state)


def merge_lora(network: nn.Module) -> None:
    """Add the adapter to the weights of ``network`` and remove its layers."""
    adapted = [(name, layer) for name, layer in network.named_modules() if isinstance(layer, BaseTunerLayer)]
    for name, layer in adapted:
        layer.merge(adapter_names=[ADAPTER])
        network.set_submodule(name, layer.get_base_layer())
    del cast(Any, network).peft_config


def save_peft(directory: Path, state: Mapping[str, Tensor], config: LoraConfig) -> None:
    """Write an adapter folder that ``peft.PeftModel.from_pretrained`` reads."""
    ordered = copy.copy(config)  # PEFT keeps sets of names, whose order differs between processes
    vars(ordered).update({key: sorted(value) for key, value in vars(config).items() if isinstance(value, set)})
    ordered.save_pretrained(str(directory))
    tensors = {f"{_PREFIX}{name}": tensor.contiguous() for name, tensor in state.items()}
    save_file(tensors, directory / PEFT_WEIGHTS, metadata={"format": "pt"})


def sort_metadata(path: Path) -> None:
    """Sort the metadata of a safetensors file by name, so that equal weights give equal bytes.

    safetensors writes several entries of metadata, such as those of diffusers' adapters, in random order.
    """
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the tensors start at a multiple of 8
    temporary = path.with_name(path.name + ".part")
    temporary.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])
    os.replace(temporary, path)
