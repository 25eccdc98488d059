"""Options that trade speed for memory when a checkpoint is opened."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Memory:
    """``offload``: text encoders and VAE are on the device only while they are used. ``checkpointing``: the denoiser's
    activations are computed again in the backward pass. ``tiling``: the VAE decodes large images in tiles.
    ``decode_batch``: the number of samples that are decoded at once; None for all. ``quantization`` of the
    frozen denoiser under a LoRA: "nf4" by bitsandbytes, "int8" by torchao, both extras.
    """

    offload: bool = False
    checkpointing: bool = False
    tiling: bool = False
    decode_batch: int | None = None
    quantization: Literal["nf4", "int8"] | None = None

    def __post_init__(self) -> None:
        if self.decode_batch is not None and self.decode_batch < 1:
            raise ValueError(f"decode_batch must be at least 1 sample, not {self.decode_batch}")
