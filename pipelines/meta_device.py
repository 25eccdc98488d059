"""A checkpoint without its weights: every network from its configuration alone, on torch's meta device."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import torch
from diffusers import ModelMixin, SchedulerMixin
from torch import Tensor, nn
from transformers import PreTrainedModel

from genalign.runtime.memory_options import Memory
from genalign.training.activation_memory import kept_for_backward, largest_layer
from genalign.training.memory_estimate import Part
from pipelines.auto import family_of
from pipelines.base import DiffusersPipeline, Options
from pipelines.checkpoint_files import component_file, has_weights, local_folder, model_index, require_components


@dataclass(frozen=True)
class Unopened:
    """In place of a tokenizer or an image processor: all that is asked of one before it is used."""

    model_max_length: int


@dataclass(frozen=True)
class MetaPipeline:
    """A pipeline whose networks have shapes and no values; see ``genalign.training.memory_estimate.Outline``."""

    pipeline: DiffusersPipeline
    folder: Path
    memory: Memory

    @property
    def parts(self) -> tuple[Part, ...]:
        """Its networks, the trained one first."""
        trained = self.pipeline.trained
        found = {name: part for name, part in self.pipeline.pipe.components.items() if isinstance(part, nn.Module)}
        return tuple(self._part(name, found[name]) for name in sorted(found, key=lambda name: name != trained))

    def _part(self, name: str, network: nn.Module) -> Part:
        linear = {id(layer.weight): layer.weight for layer in network.modules() if isinstance(layer, nn.Linear)}
        return Part(
            name,
            sum(parameter.numel() for parameter in network.parameters()),
            sum(weight.numel() for weight in linear.values()),
            has_weights(self.folder / name),
        )

    def kept(self, samples: int, guidance: float) -> int:
        """Bytes that autograd keeps of one prediction for ``samples``, twice as many under guidance."""
        pipeline, rows = self.pipeline, samples * (2 if guidance > 1 else 1)
        x, texts = self._latents(rows), pipeline.longest_text(rows)
        timestep = torch.zeros(rows, device=x.device)
        return kept_for_backward(
            pipeline.denoiser, lambda: pipeline._network(x, timestep, texts), self.memory.checkpointing
        )

    def decoding(self, samples: int) -> int:
        """Bytes of the input and the output of the decoder's largest layer for ``samples``."""
        latents = self._latents(samples)
        return largest_layer(self.pipeline.pipe.vae, lambda: self.pipeline._decoded(latents))

    def _latents(self, count: int) -> Tensor:
        return self.pipeline._blank(count, *self.pipeline.latent_shape)


def outline(path_or_id: str | Path, *, dtype: torch.dtype = torch.float32, **options: Unpack[Options]) -> MetaPipeline:
    """Of a folder or Hub id, of which only configuration files are read. Raises as ``pipelines.load``."""
    family = family_of(path_or_id)
    require_components(path_or_id)
    index = model_index(path_or_id)
    made = {name: _component(path_or_id, name, *entry) for name, entry in index.items() if isinstance(entry, list)}
    plain = {name: value for name, value in index.items() if name not in made and not name.startswith("_")}
    pipe = family.kind(**made, **plain)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            nn.Module.to(part, "meta", dtype)
    memory = options.get("memory", Memory())
    bare: Options = {**options, "device": "meta", "autocast": None, "memory": Memory(tiling=memory.tiling)}
    return MetaPipeline(family(pipe, **bare), local_folder(path_or_id), memory)


def _component(path_or_id: str | Path, name: str, library: str | None, kind: str | None) -> Any:
    """One component of a checkpoint: None, a network without weights, a scheduler, or a stand-in for anything else."""
    if library is None or kind is None:
        return None
    # the pipeline's own folder in diffusers is named alone; no other library is imported by a checkpoint's word
    module = library if library in ("diffusers", "transformers") else f"diffusers.pipelines.{library}"
    found = getattr(importlib.import_module(module), kind)
    if issubclass(found, SchedulerMixin):
        return found.from_config(_json(path_or_id, name, "scheduler_config.json"))
    if issubclass(found, ModelMixin):
        with torch.device("meta"):
            return found.from_config(_json(path_or_id, name, "config.json"))
    if issubclass(found, PreTrainedModel):
        settings = found.config_class.from_pretrained(component_file(path_or_id, name, "config.json").parent)
        with torch.device("meta"):
            return found(settings)
    return Unopened(_longest(path_or_id, name))


def _json(path_or_id: str | Path, component: str, file: str) -> Mapping[str, Any]:
    found: dict[str, Any] = json.loads(component_file(path_or_id, component, file).read_text(encoding="utf-8"))
    return found


def _longest(path_or_id: str | Path, name: str) -> int:
    if not name.startswith("tokenizer"):
        return 0
    return int(_json(path_or_id, name, "tokenizer_config.json").get("model_max_length", 0))
