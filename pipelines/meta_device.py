"""A checkpoint without its weights: networks built from their configurations on torch's meta device."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Unpack

import torch
from diffusers import ModelMixin, SchedulerMixin
from torch import nn
from transformers import PreTrainedModel

from genalign.runtime.memory_options import Memory
from genalign.training.activation_memory import largest_layer, saved_activations
from genalign.training.memory_estimate import NetworkSize
from pipelines.auto import family_of
from pipelines.base import DiffusersPipeline, Options
from pipelines.checkpoint_files import component_file, has_weights, local_folder, model_index, require_components


@dataclass(frozen=True)
class MetaPipeline:
    """A pipeline whose networks have shapes and no values: a ``genalign.training.memory_estimate.Outline``."""

    pipeline: DiffusersPipeline
    networks: Sequence[NetworkSize]
    memory: Memory
    bytes_per_number: int

    def activations(self, samples: int, guidance: float) -> int:
        """Bytes that autograd saves in one prediction for ``samples``, twice as many under guidance."""
        pipeline, rows = self.pipeline, samples * (2 if guidance > 1 else 1)
        x, conditioning = pipeline.zeros(rows, *pipeline.latent_shape), pipeline.longest_conditioning(rows)
        timestep = torch.zeros(rows, device=x.device)
        return saved_activations(
            pipeline.denoiser, lambda: pipeline.run_denoiser(x, timestep, conditioning), self.memory.checkpointing
        )

    def decoder_layer(self, samples: int) -> int:
        """Bytes of the input and output of the decoder's largest layer for ``samples``."""
        latents = self.pipeline.zeros(samples, *self.pipeline.latent_shape)
        return largest_layer(self.pipeline.pipe.vae, lambda: self.pipeline.run_vae(latents))


def outline(path_or_id: str | Path, *, dtype: torch.dtype = torch.float32, **options: Unpack[Options]) -> MetaPipeline:
    """Open a folder or Hub id from its configuration files alone. Raises what ``pipelines.load`` raises."""
    family = family_of(path_or_id)
    require_components(path_or_id)
    index = model_index(path_or_id)
    components = {name: _component(path_or_id, name, *kind) for name, kind in index.items() if isinstance(kind, list)}
    plain = {name: value for name, value in index.items() if name not in components and not name.startswith("_")}
    pipe = family.kind(**components, **plain)
    networks = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    sizes = []
    for name in sorted(networks, key=lambda name: name != family.trained):
        network = nn.Module.to(networks[name], "meta", dtype)
        linear = {id(layer.weight): layer.weight for layer in network.modules() if isinstance(layer, nn.Linear)}
        parameters = sum(parameter.numel() for parameter in network.parameters())
        present = has_weights(local_folder(path_or_id) / name)
        sizes.append(NetworkSize(name, parameters, sum(weight.numel() for weight in linear.values()), present))
    memory = options.get("memory", Memory())
    on_meta: Options = {**options, "device": "meta", "autocast": None, "memory": Memory(tiling=memory.tiling)}
    return MetaPipeline(family(pipe, **on_meta), sizes, memory, dtype.itemsize)


def _component(path_or_id: str | Path, name: str, library: str | None, kind: str | None) -> Any:
    """Open one component: None, a network without weights, a scheduler, or the text length of a tokenizer."""

    def read(file: str) -> Mapping[str, Any]:
        content: dict[str, Any] = json.loads(component_file(path_or_id, name, file).read_text(encoding="utf-8"))
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
        config = cls.config_class.from_pretrained(component_file(path_or_id, name, "config.json").parent)
        with torch.device("meta"):
            return cls(config)
    longest = read("tokenizer_config.json").get("model_max_length", 0) if name.startswith("tokenizer") else 0
    return SimpleNamespace(model_max_length=int(longest))
