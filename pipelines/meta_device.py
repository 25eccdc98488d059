"""A checkpoint without its weights: networks built from their configurations on torch's meta device."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import torch
from diffusers import ModelMixin, SchedulerMixin
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin

from genalign.runtime.hub import HubAccess
from genalign.runtime.memory_options import Memory
from genalign.runtime.text_files import read_json
from genalign.training.memory_estimate import NetworkSize, Outline
from pipelines.auto import family_of
from pipelines.base import Options, hub_access
from pipelines.checkpoint_files import (
    absent_components,
    component_file,
    model_index,
    one_line_errors,
    require_components,
)
from pipelines.checkpoint_settings import check_index, is_component


@dataclass(frozen=True)
class TextLength:
    """The text length of a tokenizer, in place of it; 0 for any other component without weights."""

    model_max_length: int


def outline(
    path_or_id: str | Path, *, family: str | None = None, dtype: torch.dtype = torch.float32, **options: Unpack[Options]
) -> Outline:
    """Open a folder or Hub id as ``pipelines.load`` does, from its configuration files alone. Raises as that does."""
    access = hub_access(options)
    wrapper = family_of(path_or_id, family, access)
    require_components(path_or_id, wrapper.kind)
    index = model_index(path_or_id, access)
    check_index(index)
    index |= {name: [None, None] for name in absent_components(path_or_id, wrapper.kind, access)}
    plain = {name: value for name, value in index.items() if not (name.startswith("_") or is_component(value))}
    with one_line_errors(path_or_id):
        components = {
            name: _component(path_or_id, access, name, *kind) for name, kind in index.items() if is_component(kind)
        }
        pipe = wrapper.kind(**components, **plain)
    networks = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    sizes = []
    for name in sorted(networks, key=lambda name: name != wrapper.denoiser_name):
        network = nn.Module.to(networks[name], "meta", dtype)
        linear = {id(layer.weight): layer.weight for layer in network.modules() if isinstance(layer, nn.Linear)}
        parameters = sum(parameter.numel() for parameter in network.parameters())
        sizes.append(NetworkSize(name, parameters, sum(weight.numel() for weight in linear.values())))
    memory = options.get("memory", Memory())
    on_meta: Options = {**options, "device": "meta", "autocast": None, "memory": Memory(tiling=memory.tiling)}
    return Outline(wrapper(pipe, **on_meta), sizes, memory, dtype.itemsize)


def _component(path_or_id: str | Path, access: HubAccess, name: str, library: str | None, kind: str | None) -> Any:
    """Open one component: None, a network without weights, a scheduler, or the text length of a tokenizer."""

    def read(file: str) -> Mapping[str, Any]:
        content: dict[str, Any] = read_json(component_file(path_or_id, name, file, access))
        return content

    if library is None or kind is None:
        return None
    # diffusers names the folder of its own pipeline alone; no other library is imported because a checkpoint names it
    module = library if library in ("diffusers", "transformers") else f"diffusers.pipelines.{library}"
    cls = getattr(importlib.import_module(module), kind)
    if issubclass(cls, SchedulerMixin):
        return cls.from_config(read("scheduler_config.json"))
    if issubclass(cls, ModelMixin):
        with torch.device("meta"):
            return cls.from_config(read("config.json"))
    if issubclass(cls, PreTrainedModel):
        config = cls.config_class.from_pretrained(component_file(path_or_id, name, "config.json", access).parent)
        with torch.device("meta"):
            return cls(config)
    if issubclass(cls, ProcessorMixin):  # small, and asked for the length of a prompt's instruction
        return cls.from_pretrained(path_or_id, subfolder=name)
    longest = read("tokenizer_config.json").get("model_max_length", 0) if name.startswith("tokenizer") else 0
    return TextLength(int(longest))
