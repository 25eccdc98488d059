"""Adapter files in the spellings that users have: read whole, renamed to PEFT's names, or refused in one line.

Published adapters name one layer in many ways: diffusers (``unet.a.b.lora_A.weight``, ``a.processor.b_lora.up``), PEFT,
kohya (``lora_unet_a_b.lora_down.weight``), ComfyUI (``diffusion_model.a.b``), and with what torch.compile, DDP and
FSDP put in front. Here a name is matched with the layers of the pipeline's networks; names of other implementations of
a network are first converted by diffusers.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import LoraConfig
from safetensors import safe_open
from torch import Tensor, nn

from genalign.diffusion.lora import PEFT_CONFIG
from pipelines.checkpoint_files import damage

State = Mapping[str, Tensor]

_WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_KOHYA = {
    "lora_unet": None,
    "lora_transformer": None,
    "lora_te": "",
    "lora_te1": "",
    "lora_te2": "_2",
    "lora_te3": "_3",
}
_SUFFIXES: Mapping[tuple[str, ...], str] = {
    ("lora_A", "weight"): "lora_A.weight",
    ("lora_B", "weight"): "lora_B.weight",
    ("lora_B", "bias"): "lora_B.bias",
    ("lora_down", "weight"): "lora_A.weight",
    ("lora_up", "weight"): "lora_B.weight",
    ("lora", "down", "weight"): "lora_A.weight",
    ("lora", "up", "weight"): "lora_B.weight",
    ("lora_linear_layer", "down", "weight"): "lora_A.weight",
    ("lora_linear_layer", "up", "weight"): "lora_B.weight",
    ("lora_magnitude_vector",): "lora_magnitude_vector",
    ("lora_magnitude_vector", "weight"): "lora_magnitude_vector",
    ("alpha",): "alpha",
    ("base_layer", "bias"): "base_layer.bias",
}
"""The last parts of a name, and what PEFT calls them."""


@dataclass
class Adapter:
    """The part of an adapter file that belongs to one network: its configuration, and its tensors by PEFT's names."""

    config: LoraConfig | None = None
    state: dict[str, Tensor] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)

    def peft_config(self) -> LoraConfig:
        """The file's own configuration, or one from the shapes of its tensors, with alpha = rank where it has none."""
        if self.config is not None:
            return self.config
        ranks = {
            name.removesuffix(end): len(t) for name, t in self.state.items() if name.endswith(end := ".lora_A.weight")
        }
        alphas = {name: self.alphas.get(name, float(rank)) for name, rank in ranks.items()}
        rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
        return LoraConfig(
            r=int(rank),
            lora_alpha=alpha,  # PEFT takes fractions
            rank_pattern={f"^{name}": other for name, other in ranks.items() if other != rank},
            alpha_pattern={f"^{name}": other for name, other in alphas.items() if other != alpha},
            target_modules=sorted(ranks),
            use_dora=any(name.endswith("lora_magnitude_vector") for name in self.state),
            lora_bias=any(name.endswith("lora_B.bias") for name in self.state),
        )


def read_adapter(
    path: Path, networks: Mapping[str, nn.Module], denoiser: str, convert: Callable[[State], State] | None = None
) -> dict[str, Adapter]:
    """Read an adapter file for the networks of a pipeline.

    Args:
        path: The .safetensors file, which may have PEFT's adapter_config.json beside it.
        networks: The networks that may have an adapter, by component name.
        denoiser: The component that names without a component belong to.
        convert: Converts names of other implementations to diffusers' names; used if the names match no layer.

    Returns:
        The adapters by component.

    Raises:
        ValueError: The file is damaged, holds entries that are of none of the networks, or no adapter at all.
    """
    if problem := damage(path):
        raise ValueError(f"{path} {problem}")
    with safe_open(path, framework="pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
        metadata = dict(file.metadata() or {})
    try:
        adapters = _match(state, networks, denoiser)
    except _UnmatchedError as error:
        if convert is None:
            raise ValueError(f"{path}: {error}") from None
        try:
            adapters = _match(convert(state), networks, denoiser)
        except (_UnmatchedError, ValueError, KeyError, IndexError, AttributeError, TypeError):
            raise ValueError(f"{path}: {error}") from None
    if not any(adapter.state for adapter in adapters.values()):
        raise ValueError(f"{path} holds no adapter: its entries are no LoRA weights")
    for component, adapter in adapters.items():
        adapter.config = _stored_config(path, component, component == denoiser, metadata)
        _require_pairs(path, adapter.state)
    return adapters


class _UnmatchedError(Exception):
    """Entries that belong to no layer of the pipeline."""


def _match(state: State, networks: Mapping[str, nn.Module], denoiser: str) -> dict[str, Adapter]:
    layers = {component: _layer_names(network) for component, network in networks.items()}
    adapters: dict[str, Adapter] = {}
    unmatched = []
    for name, tensor in state.items():
        match = _parse(name, layers, denoiser)
        if match is None:
            unmatched.append(name)
            continue
        component, layer, kind = match
        adapter = adapters.setdefault(component, Adapter())
        if kind == "alpha":
            adapter.alphas[layer] = float(tensor)
        else:
            adapter.state[f"{layer}.{kind}"] = tensor
    if unmatched:
        raise _UnmatchedError(
            f"{len(unmatched)} of its {len(state)} entries fit no layer of this model, such as {unmatched[0]!r}: choose"
            " an adapter of the same base model"
        )
    return adapters


def _layer_names(network: nn.Module) -> dict[str, str]:
    """Every spelling of a layer's name, and the name: with underscores for dots, and with or without text_model."""
    names = [name for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv1d)]
    spellings: dict[str, str] = {}
    for name in names:
        other = name.removeprefix("text_model.") if name.startswith("text_model.") else f"text_model.{name}"
        for spelling in (other, name):
            spellings |= {spelling: name, spelling.replace(".", "_"): name}
    return spellings


def _parse(name: str, layers: Mapping[str, Mapping[str, str]], denoiser: str) -> tuple[str, str, str] | None:
    """Split a name into component, layer and kind; None if it is not of these layers."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    if parts[:2] == ["base_model", "model"]:
        parts = parts[2:]
    if len(parts) > 2 and parts[-2] == "default":  # PEFT's name of an adapter
        del parts[-2]
    component, parts = _component(parts, layers, denoiser)
    if component is None:
        return None
    if "processor" in parts:  # of diffusers before PEFT: a.processor.to_q_lora.down.weight
        index = parts.index("processor")
        target = parts[index + 1].removesuffix("_lora").replace("to_out", "to_out.0")
        parts = [*parts[:index], target, "lora", *parts[index + 2 :]]
    for length in (3, 2, 1):
        kind = _SUFFIXES.get(tuple(parts[-length:]))
        if kind and len(parts) > length:
            layer = layers[component].get(".".join(parts[:-length]))
            return None if layer is None else (component, layer, kind)
    return None


def _component(
    parts: list[str], layers: Mapping[str, Mapping[str, str]], denoiser: str
) -> tuple[str | None, list[str]]:
    """The component that a name begins with, and the parts of the name after it."""
    if parts[0] == "diffusion_model" or parts[0] == denoiser:
        return denoiser, parts[1:]
    if parts[0] in layers:
        return parts[0], parts[1:]
    for prefix, encoder in _KOHYA.items():
        if parts[0].startswith(f"{prefix}_"):
            component = denoiser if encoder is None else f"text_encoder{encoder}"
            rest = [parts[0].removeprefix(f"{prefix}_"), *parts[1:]]
            return (component if component in layers else None), rest
    return denoiser, parts


def _stored_config(path: Path, component: str, is_denoiser: bool, metadata: Mapping[str, str]) -> LoraConfig | None:
    """The configuration beside the file (PEFT), or in its header (diffusers); None if there is neither."""
    if is_denoiser and (path.parent / PEFT_CONFIG).is_file():
        return LoraConfig.from_pretrained(str(path.parent))
    stored: dict[str, Any] = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    own = {name.removeprefix(f"{component}."): v for name, v in stored.items() if name.startswith(f"{component}.")}
    return LoraConfig(**own) if own else None


def _require_pairs(path: Path, state: State) -> None:
    """Raise ValueError for a layer that has one of its two matrices, or matrices of two ranks."""
    for name in state:
        layer, _, kind = name.rpartition(".lora_")
        if kind in ("A.weight", "B.weight"):
            a, b = state.get(f"{layer}.lora_A.weight"), state.get(f"{layer}.lora_B.weight")
            if a is None or b is None or b.shape[1] != len(a):
                raise ValueError(f"{path}: {name} has no other matrix of the same rank: the file is damaged")
