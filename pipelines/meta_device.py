"""A checkpoint without its weights: networks built from their configurations on torch's meta device."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from torch import Tensor, nn
from transformers import BatchEncoding, PreTrainedModel, ProcessorMixin

from genalign.runtime.hub import HubAccess
from genalign.runtime.memory_options import Memory
from genalign.runtime.text_files import read_json
from genalign.training.outline import NetworkSize, Outline
from pipelines.auto import family_of
from pipelines.base import DiffusersPipeline
from pipelines.checkpoint_files import (
    absent_components,
    component_file,
    model_index,
    one_line_errors,
    require_components,
)
from pipelines.checkpoint_settings import check_index, is_component
from pipelines.options import Options, hub_access


@dataclass(frozen=True)
class TextLength:
    """The text length of a tokenizer, in place of it: every text has as many tokens. 0 for any other component."""

    model_max_length: int

    def __call__(self, texts: Sequence[str], *, max_length: int | None = None, **_: object) -> BatchEncoding:
        """Return tokens (P, L) for texts of the greatest length."""
        shape = len(texts), min(max_length or self.model_max_length, self.model_max_length)
        tokens = torch.zeros(shape, dtype=torch.long)
        return BatchEncoding({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)})


class _WithoutValues:
    """A pipeline on the meta device, whose texts all have the greatest length and embeddings of zeros."""

    def _run_text_encoders(self: Any, texts: list[str]) -> dict[str, Tensor]:
        longest = self.longest_conditioning(len(texts)).items()
        return {name: torch.zeros((), dtype=tensor.dtype).expand(tensor.shape) for name, tensor in longest}

    def _mixed_precision(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()  # torch has no autocast on the meta device

    def encode_longest(self: Any, count: int) -> None:
        """Run the text encoders on ``count`` texts of the greatest length."""
        self.encode_texts([""] * count)


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
    return outline_of(pipe, wrapper, dtype, **options)


def outline_of(
    pipe: DiffusionPipeline, wrapper: type[DiffusersPipeline], dtype: torch.dtype, **options: Unpack[Options]
) -> Outline:
    """Outline a pipeline of diffusers, whose networks are moved to the meta device, as ``wrapper`` opens it.

    Args:
        pipe: The pipeline of diffusers.
        wrapper: The family that opens it.
        dtype: The dtype of the weights.
        **options: Options of opening a checkpoint.
    """
    networks = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    for network in networks.values():
        nn.Module.to(network, "meta", dtype)
    memory, autocast = options.get("memory", Memory()), options.get("autocast")
    if options.get("text_cache") and memory.offload == "none":  # the encoders are on the device only at the beginning
        memory = replace(memory, offload="text")
    on_device = replace(memory, offload="none", quantization=None)
    on_meta: Options = {**options, "device": "meta", "autocast": autocast, "memory": on_device}
    pipeline = type(wrapper.__name__, (_WithoutValues, wrapper), {})(pipe, **on_meta)
    names = sorted(networks, key=lambda name: name != wrapper.denoiser_name)
    return Outline(pipeline, [_size(name, networks[name], wrapper) for name in names], memory, autocast)


def _size(name: str, network: nn.Module, wrapper: type[DiffusersPipeline]) -> NetworkSize:
    linear = {id(layer.weight): layer.weight for layer in network.modules() if isinstance(layer, nn.Linear)}.values()
    tensors = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}.values()
    return NetworkSize(
        name,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        linear=sum(weight.numel() for weight in linear),
        nbytes=sum(tensor.nbytes for tensor in tensors),
        largest=max((weight.nbytes for weight in linear), default=0),
        kind="denoiser" if name == wrapper.denoiser_name else "decoder" if name in wrapper.decoders else "text encoder",
    )


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
