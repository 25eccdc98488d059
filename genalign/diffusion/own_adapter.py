"""Adapters that are no plain LoRA, in a file of genalign's own: noise hypernetworks, and LoRAs with a hypernetwork.

Another program would load their matrices as a plain LoRA, which samples something else. So their tensors have names
that diffusers and PEFT refuse.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from genalign.diffusion.hypernetwork import (
    HYPERNETWORK,
    Hypernetwork,
    add_hypernetwork,
    hypernetwork_of,
    without_hypernetwork,
)
from genalign.diffusion.lora import OWN_WEIGHTS, inject_lora, sort_metadata
from genalign.diffusion.noise_shift import make_noise_hypernetwork, shifts_noise
from genalign.runtime.files import apply_umask, with_prefix, without_prefix

if TYPE_CHECKING:
    from peft import LoraConfig

_HEADER = "genalign_adapter"  # the entry of the file's metadata
_FORMAT = 1
_NAMES = {".lora_A.weight": ".A", ".lora_B.weight": ".B"}  # of the matrices, by PEFT and in the file


@dataclass(frozen=True)
class OwnAdapter:
    """An adapter that is no plain LoRA.

    Attributes:
        lora: The configuration of its LoRA, as PEFT takes it.
        state: The tensors of the LoRA under PEFT's names, and of the hypernetwork under the prefix HYPERNETWORK.
        hypernetwork: The hypernetwork that makes the gates of the LoRA; None without one.
        shifts_noise: Whether it is a noise hypernetwork.
    """

    lora: Mapping[str, Any]
    state: Mapping[str, Tensor]
    hypernetwork: Hypernetwork | None
    shifts_noise: bool

    @classmethod
    def of(cls, network: nn.Module, state: Mapping[str, Tensor], config: LoraConfig) -> Self:
        """Describe the adapter of ``network``, whose tensors are ``state``, as ``Policy.adapter_state`` gives them."""
        lora = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
        gates = hypernetwork_of(network)
        return cls(lora, state, gates.settings if gates else None, shifts_noise(network))

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """Read the file of an adapter; None for a file that is not genalign's own.

        Raises ValueError for a file of a later version of genalign.
        """
        header = own_header(path)
        if header is None:
            return None
        with safe_open(path, framework="pt") as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
        matrices = {
            f"{name.removesuffix(end)}{full}": tensor
            for full, end in _NAMES.items()
            for name, tensor in stored.items()
            if name.endswith(end)
        }
        gates = with_prefix(f"{HYPERNETWORK}.", without_prefix(f"{HYPERNETWORK}.", stored))
        hypernetwork = Hypernetwork(**header["hypernetwork"]) if header["hypernetwork"] else None
        return cls(header["lora"], {**matrices, **gates}, hypernetwork, header["shifts_noise"])

    @property
    def is_plain(self) -> bool:
        """Whether it is a plain LoRA, which has files of other formats."""
        return self.hypernetwork is None and not self.shifts_noise

    def write(self, directory: Path, metadata: Mapping[str, str] = {}) -> None:
        """Write the adapter into a folder; ``metadata`` are further entries of the file's header.

        Raises ValueError for a LoRA of more than two matrices a layer.
        """
        tensors = dict(self.state)
        for name in without_hypernetwork(self.state):
            end = next((end for end in _NAMES if name.endswith(end)), None)
            if end is None:
                raise ValueError(
                    f"an adapter with {name} has no file of genalign's own: start from a LoRA of two matrices a layer"
                )
            tensors[f"{name.removesuffix(end)}{_NAMES[end]}"] = tensors.pop(name)
        header = {
            "format": _FORMAT,
            "lora": dict(self.lora),
            "hypernetwork": asdict(self.hypernetwork) if self.hypernetwork else None,
            "shifts_noise": self.shifts_noise,
        }
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / OWN_WEIGHTS
        own = {"format": "pt", _HEADER: json.dumps(header, sort_keys=True)}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=own)
        sort_metadata(path, metadata)
        apply_umask(directory)

    def attach_to(self, network: nn.Module) -> None:
        """Attach the adapter to ``network``. Raises ValueError where it does not fit."""
        from peft import LoraConfig  # takes seconds

        inject_lora(network, LoraConfig(**self.lora), without_hypernetwork(self.state))
        if self.hypernetwork:
            gates = add_hypernetwork(network, self.hypernetwork)
            gates.load_state_dict(without_prefix(f"{HYPERNETWORK}.", self.state))
        if self.shifts_noise:
            make_noise_hypernetwork(network)


def own_header(path: Path) -> dict[str, Any] | None:
    """Read what genalign says of an adapter in its file; None for a file that is not genalign's own.

    Raises ValueError for a file of a later version of genalign.
    """
    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get(_HEADER)
    if text is None:
        return None
    header: dict[str, Any] = json.loads(text)
    if header["format"] > _FORMAT:
        raise ValueError(f"{path} was written by a later genalign, in format {header['format']}: update genalign")
    return header


def kind_of(path: Path) -> str | None:
    """Name the kind of an adapter that is no plain LoRA, for messages; None for a plain LoRA."""
    header = own_header(path)
    if header is None:
        return None
    return "a noise hypernetwork" if header["shifts_noise"] else "a LoRA with a hypernetwork"
