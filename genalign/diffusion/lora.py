"""Low-rank adapters of any network, put on, read and merged by PEFT: no pipeline needs a loader of its own."""

from __future__ import annotations

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


def put_on(network: nn.Module, config: LoraConfig, state: Mapping[str, Tensor] | None = None) -> None:
    """Give ``network`` the adapter ADAPTER, with the weights ``state`` in PEFT's names, or new ones.

    Raises ValueError where ``state`` has not exactly the weights of such an adapter.
    """
    inject_adapter_in_model(config, network, adapter_name=ADAPTER)
    if state is None:
        return
    taken = set_peft_model_state_dict(network, dict(state), adapter_name=ADAPTER)
    if lacking := [name for name in taken.missing_keys if "lora_" in name] + list(taken.unexpected_keys):
        raise ValueError(f"the adapter does not fit this network, at {lacking[0]}: give one of the same base")


def put_on_saved(network: nn.Module, folder: Path) -> None:
    """``put_on`` the adapter of a folder as PEFT writes it. Raises ValueError where it is of another network."""
    state = {name.removeprefix(_PREFIX): tensor for name, tensor in load_file(folder / PEFT_WEIGHTS).items()}
    put_on(network, LoraConfig.from_pretrained(str(folder)), state)


def merge(network: nn.Module) -> None:
    """Add the adapter to the weights of ``network``, which has none afterwards."""
    adapted = [(name, layer) for name, layer in network.named_modules() if isinstance(layer, BaseTunerLayer)]
    for name, layer in adapted:
        layer.merge(adapter_names=[ADAPTER])
        network.set_submodule(name, layer.get_base_layer())
    del cast(Any, network).peft_config


def save_peft(directory: Path, state: Mapping[str, Tensor], config: LoraConfig) -> None:
    """An adapter folder as PEFT reads it."""
    config.save_pretrained(str(directory))
    named = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in state.items()}
    save_file(named, directory / "adapter_model.safetensors", metadata={"format": "pt"})
