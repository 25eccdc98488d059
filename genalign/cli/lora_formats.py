"""Adapters in the formats of ComfyUI and kohya: their layer names, full strength, and a header."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from genalign.cli.model_card import Base
from genalign.diffusion.lora import PEFT_CONFIG, adapter_file, sort_metadata, student_metadata
from genalign.diffusion.own_adapter import kind_of
from genalign.runtime.files import apply_umask

LoraFormat = Literal["comfy", "kohya"]

ARCHITECTURES = {
    "StableDiffusionPipeline": "stable-diffusion-v1",
    "StableDiffusionXLPipeline": "stable-diffusion-xl-v1-base",
    "StableDiffusion3Pipeline": "stable-diffusion-3",
    "FluxPipeline": "flux-1-dev",
    "Flux2KleinPipeline": "Flux.2-klein-4b",
    "QwenImagePipeline": "qwen-image",
    "ZImagePipeline": "Z-Image",
}
"""The ModelSpec names of the pipeline classes whose layers ComfyUI recognizes by diffusers' names."""

_ENDS = (".lora_A.weight", ".lora_B.weight")
_KOHYA_VERSIONS = {"StableDiffusionPipeline": "sd_v1", "StableDiffusionXLPipeline": "sdxl_base_v1-0"}


@dataclass(frozen=True)
class TrainedAdapter:
    """The adapter of a denoiser: its component's name, its tensors by PEFT's names, and alpha by layer.

    ``student`` is its header's metadata of a few-step student, see ``lora.student_metadata``. The matrices of a layer
    are applied with the scale alpha / rank, where the rank is that of its tensors.
    """

    component: str
    state: Mapping[str, Tensor]
    alphas: Mapping[str, float]
    student: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the adapter that a run wrote for diffusers. Raises ValueError unless layers have two matrices each."""
        path = adapter_file(folder)
        if kind := kind_of(path):
            raise ValueError(
                f"{path} is {kind}, which acts differently on each sample: it is not a plain LoRA, and only genalign"
                " can load it"
            )
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
        component = next(iter(state)).split(".")[0]
        own = {name.removeprefix(f"{component}."): tensor for name, tensor in state.items()}
        others = [name for name in own if not name.endswith(_ENDS) or f"{component}.{name}" not in state]
        if others:
            raise ValueError(
                f"{path} has {others[0]}, which other programs have no name for: export it with --format lora or"
                " pipeline"
            )
        peft = peft_settings(path).get(component, {})
        ranks = {name.removesuffix(_ENDS[0]): len(tensor) for name, tensor in own.items() if name.endswith(_ENDS[0])}
        alphas = {layer: _alpha(peft, layer, rank) for layer, rank in ranks.items()}
        return cls(component, own, alphas, student_metadata(path))

    def rank(self, layer: str) -> int:
        """The rank of the matrices of a layer."""
        return len(self.state[f"{layer}{_ENDS[0]}"])

    def folded(self) -> dict[str, Tensor]:
        """The tensors by diffusers' names, with the scale in the second matrix: equally strong in any program."""
        scaled = {f"{layer}{_ENDS[1]}": alpha / self.rank(layer) for layer, alpha in self.alphas.items()}
        return {f"{self.component}.{name}": tensor * scaled.get(name, 1.0) for name, tensor in self.state.items()}

    def kohya(self) -> dict[str, Tensor]:
        """The tensors by kohya's names, each layer with its alpha."""
        from diffusers.utils import convert_state_dict_to_kohya  # takes seconds

        tensors: dict[str, Tensor] = convert_state_dict_to_kohya(
            {f"{self.component}.{name}": tensor for name, tensor in self.state.items()}
        )
        for layer, alpha in self.alphas.items():  # the converter writes the rank
            tensors[f"lora_{self.component}_{layer.replace('.', '_')}.alpha"] = torch.tensor(alpha)
        return tensors


def lora_header(path: Path, base: Base, description: str) -> dict[str, str]:
    """Describe the adapter of a run with kohya's and ModelSpec's keys, for programs that list such files.

    There is no date, so equal weights give equal files.

    Args:
        path: The file that the run wrote, in the format of diffusers or of PEFT.
        base: The checkpoint that the adapter belongs to.
        description: One line for readers.
    """
    with safe_open(path, framework="pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    settings = next(iter(peft_settings(path).values()), {})
    ranks = {shape[0] for name, shape in shapes.items() if name.endswith(_ENDS[0])}
    varied = bool(settings.get("alpha_pattern") or settings.get("use_rslora"))
    kind = base.index.get("_class_name", "")
    architecture, version = ARCHITECTURES.get(kind, Path(base.name).name), _KOHYA_VERSIONS.get(kind)

    def width(layer: str) -> set[int]:
        return {shape[1] for name, shape in shapes.items() if name.endswith(f"{layer}{_ENDS[0]}")}

    if kind == "StableDiffusionPipeline" and width("attn2.to_k") == {1024}:  # of its text encoder
        architecture, version = "stable-diffusion-v2", "sd_v2"
    if kind == "Flux2KleinPipeline" and width("attn.to_q") == {4096}:
        architecture = "Flux.2-klein-9b"
    return {
        "format": "pt",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.description": description,
        "modelspec.implementation": "diffusers",
        "modelspec.sai_model_spec": "1.0.1",
        "ss_network_alpha": "Dynamic" if varied else f"{float(settings.get('lora_alpha', max(ranks))):g}",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_module": "networks.lora",
        "ss_sd_model_name": base.name,
        **({"ss_base_model_version": version} if version else {}),
        **student_metadata(path),
    }


def peft_settings(path: Path) -> dict[str, dict[str, Any]]:
    """Read PEFT's settings of the adapters in a file of diffusers or PEFT, by component; empty if it has none."""
    if (file := path.parent / PEFT_CONFIG).is_file():
        return {"": json.loads(file.read_text(encoding="utf-8"))}
    with safe_open(path, framework="pt") as content:
        stored = json.loads((content.metadata() or {}).get("lora_adapter_metadata", "{}"))
    components: dict[str, dict[str, Any]] = {}
    for name, value in stored.items():
        component, _, setting = name.partition(".")
        components.setdefault(component, {})[setting] = value
    return components


def describe_lora(output: Path, base: Base, method: str) -> None:
    """Add the description of an adapter to the header of its file in the folder ``output``."""
    path = adapter_file(output)
    header = lora_header(path, base, _description(base, method))
    sort_metadata(path, {**header, "modelspec.title": output.name})
    apply_umask(output)


def _description(base: Base, method: str) -> str:
    return f"Trained from {base.name} by genalign: {method}"


def write_lora_format(folder: Path, output: Path, format: LoraFormat, base: Base, method: str) -> None:
    """Write an adapter in the format of another program, as the only file of a new folder, named like it.

    Args:
        folder: The folder of the adapter that a run wrote.
        output: The folder to write.
        format: Whose names the layers get. ComfyUI takes diffusers' names, but kohya's for a UNet.
        base: The checkpoint that the adapter belongs to.
        method: The training method, for the header.

    Raises:
        ValueError: The format has no names for the family's layers, or they do not have two matrices each.
    """
    kind, families = base.index.get("_class_name"), ARCHITECTURES if format == "comfy" else _KOHYA_VERSIONS
    if kind is None:
        raise ValueError(f"model_index.json of {base.name} is not on this machine: load the model once while online")
    if kind not in families:
        raise ValueError(
            f"--format {format} has no names for the layers of a {kind}, only for those of {', '.join(families)}:"
            " export it with --format lora or pipeline"
        )
    adapter = TrainedAdapter.read(folder)
    tensors = adapter.kohya() if adapter.component == "unet" else adapter.folded()
    output.mkdir(parents=True)
    file = output / f"{output.name}.safetensors"
    header = lora_header(adapter_file(folder), base, _description(base, method))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata=header)
    sort_metadata(file, {"modelspec.title": output.name})
    apply_umask(output)


def _alpha(settings: Mapping[str, Any], layer: str, rank: int) -> float:
    """The alpha of a layer in PEFT's settings of its adapter, for a scale of alpha / rank."""
    patterns: Mapping[str, float] = settings.get("alpha_pattern") or {}
    own = [alpha for pattern, alpha in patterns.items() if re.match(rf"(.*\.)?({pattern})$", layer)]
    alpha = float(own[0] if own else settings.get("lora_alpha", rank))
    return alpha * rank**0.5 if settings.get("use_rslora") else alpha
