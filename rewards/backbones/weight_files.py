"""Weight files of published rewards: found, and read without running anything that is in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor

_HUB = "hf://"
_LINEAR_LAYERS = (0, 2, 4, 6, 7)  # of the published heads; between them is dropout alone


def find(weights: str | Path) -> Path:
    """A file on this machine, or hf://owner/repository/file, which the Hugging Face Hub's client downloads once.

    Raises FileNotFoundError where there is no such file, ValueError for an incomplete address.
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
    """The named tensors of a .safetensors or a PyTorch file, on the CPU; those below "state_dict" if it has that key.

    PyTorch files are read with weights_only=True. Raises ValueError for one that holds anything else than tensors.
    """
    path = find(weights)
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise ValueError(
            f"{path} is not a file of tensors alone, and other PyTorch files can run code when they are opened: convert"
            " it to safetensors where you trust it"
        ) from error
    if isinstance(found, dict) and "state_dict" in found:
        found = found["state_dict"]
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{path} holds no state dict: expected tensors by name")
    return dict(found)


@dataclass(frozen=True, eq=False)
class AffineHead:
    """weight . x + bias, with ``weight`` (d,) in float32."""

    weight: Tensor
    bias: float

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], prefix: str = "") -> AffineHead:
        """A linear layer at ``prefix``, or the five of an MLP without activations at prefix + "layers.", folded into
        one in float64. Raises ValueError for other layers: an MLP with activations cannot be folded."""
        if f"{prefix}weight" in tensors:
            return cls._folded(tensors, [prefix])
        stem = f"{prefix}layers."
        found = {name.removeprefix(stem).split(".")[0] for name in tensors if name.startswith(stem)}
        if found != {str(i) for i in _LINEAR_LAYERS}:
            raise ValueError(
                f"expected {prefix}weight, or linear layers {stem}{_LINEAR_LAYERS} with nothing but dropout between"
                f" them; found layers {', '.join(sorted(found)) or 'of other names'}"
            )
        return cls._folded(tensors, [f"{stem}{i}." for i in _LINEAR_LAYERS])

    @classmethod
    def _folded(cls, tensors: Mapping[str, Tensor], layers: Sequence[str]) -> AffineHead:
        last, *before = reversed(layers)
        weight, bias = (tensors[f"{last}{name}"].double() for name in ("weight", "bias"))
        if len(weight) != 1:
            raise ValueError(f"a head of scores has one output, not {len(weight)}")
        for layer in before:
            bias = bias + weight @ tensors[f"{layer}bias"].double()
            weight = weight @ tensors[f"{layer}weight"].double()
        return cls(weight[0].float(), float(bias))

    def __call__(self, features: Tensor) -> Tensor:
        """Scores (B,) in float32 of features (B, d), differentiable. Raises ValueError for another width."""
        if features.ndim != 2 or features.shape[1] != len(self.weight):
            raise ValueError(
                f"this head is for features (B, {len(self.weight)}), not {tuple(features.shape)}: give the model that"
                " it was trained on"
            )
        return features.float() @ self.weight.to(features.device) + self.bias
