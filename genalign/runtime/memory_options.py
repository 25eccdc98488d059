"""Options that trade speed for memory when a checkpoint is opened."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Memory:
    """Options that save memory.

    Attributes:
        offload: Networks that wait on the CPU, and are on the device only while they are used: "none", "text" (the text
            encoders), or "all" (the VAE too).
        checkpointing: Compute the activations of the denoiser again in the backward pass.
        tiling: Decode large images in tiles.
        decode_batch: The number of samples that are decoded at once; None for all.
        quantization: The quantization of the frozen denoiser under a LoRA: "nf4" by bitsandbytes or "int8" by torchao
            hold less memory; "fp8" by torchao multiplies in 8 bits, faster with ``model.compile``, and holds as much
            as without. All are optional extras.
    """

    offload: Literal["none", "text", "all"] = "none"
    checkpointing: bool = False
    tiling: bool = False
    decode_batch: int | None = None
    quantization: Literal["nf4", "int8", "fp8"] | None = None

    def __post_init__(self) -> None:
        if self.decode_batch is not None and self.decode_batch < 1:
            raise ValueError(f"decode_batch must be at least 1 sample, not {self.decode_batch}")
