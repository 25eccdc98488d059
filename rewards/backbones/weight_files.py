"""Weights of published rewards: files, read without running code in them, and checkpoints of transformers."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from genalign.types import Precision

_HUB = "hf://"
_LINEAR_LAYERS = (0, 2, 4, 6, 7)  # of the published heads; between them is dropout alone


def locate(weights: str | Path) -> Path:
    """Return the path of a local file, or of hf://owner/repository/file, downloaded once by the Hub's client.

    Raises FileNotFoundError for a missing file, ValueError for an incomplete address.
    """
    address = str(weights)
    if not address.startswith(_HUB):
        if not Path(address).is_file():
            raise FileNotFoundError(f"{address} is not a file: give a path, or {_HUB}owner/repository/file")
        return Path(address)
    from huggingface_hub import hf_hub_download

    owner, _, rest = address.removeprefix(_HUB).partition("/")
    repository, _, file = rest.partition("/")
    if not file:
        raise ValueError(f"{address} names no file: give {_HUB}owner/repository/file")
    return Path(hf_hub_download(f"{owner}/{repository}", file))


def read_tensors(weights: str | Path) -> dict[str, Tensor]:
    """Read the named tensors of a .safetensors or a PyTorch file, below "state_dict" if it has that key, on the CPU.

    PyTorch files are read with weights_only=True. Raises ValueError for one that holds other objects than tensors.
    """
    path = locate(weights)
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise ValueError(
            f"{path} is not a file of tensors alone, and other PyTorch files can run code when they are opened: convert"
            " it to safetensors where you trust it"
        ) from error
    if isinstance(content, dict) and "state_dict" in content:
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} holds no state dict: expected tensors by name")
    return dict(content)


@functools.cache
def load_frozen(model: str, network: str, processor: str, dtype: Precision) -> tuple[Any, Any]:
    """Open a folder's or Hub id's frozen network and its processor by transformers' classes, once per process."""
    import transformers

    opened = getattr(transformers, network).from_pretrained(model, dtype=getattr(torch, dtype))
    return opened.requires_grad_(False).eval(), getattr(transformers, processor).from_pretrained(model)


@dataclass(frozen=True, eq=False)
class AffineHead:
    """The affine function weight . x + bias of features x (d,), in float32."""

    weight: Tensor
    bias: float

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], prefix: str = "") -> AffineHead:
        """Read a linear layer at ``prefix``, or fold an MLP of five without activations at prefix + "layers." into one.

        Folding is in float64. Raises ValueError for other layers: an MLP with activations cannot be folded.
        """
        layers, stem = [prefix], f"{prefix}layers."
        if f"{prefix}weight" not in tensors:
            layers = [f"{stem}{i}." for i in _LINEAR_LAYERS]
            present = {name.removeprefix(stem).split(".")[0] for name in tensors if name.startswith(stem)}
            if present != {str(i) for i in _LINEAR_LAYERS}:
                raise ValueError(
                    f"expected {prefix}weight, or linear layers {stem}{_LINEAR_LAYERS} with nothing but dropout between"
                    f" them; the file has layers {', '.join(sorted(present)) or 'of other names'}"
                )
        *before, last = layers
        weight, bias = (tensors[f"{last}{name}"].double() for name in ("weight", "bias"))
        if len(weight) != 1:
            raise ValueError(f"a head of scores has one output, not {len(weight)}")
        for layer in reversed(before):
            bias = bias + weight @ tensors[f"{layer}bias"].double()
            weight = weight @ tensors[f"{layer}weight"].double()
        return cls(weight[0].float(), float(bias))

    def __call__(self, features: Tensor) -> Tensor:
        """Score features (B, d) as (B,) in float32, differentiable. Raises ValueError for another width."""
        if features.ndim != 2 or features.shape[1] != len(self.weight):
            raise ValueError(
                f"this head is for features (B, {len(self.weight)}), not {tuple(features.shape)}: give the model that"
                " it was trained on"
            )
        return features.float() @ self.weight.to(features.device, non_blocking=True) + self.bias
