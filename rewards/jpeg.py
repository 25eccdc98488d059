"""The size of an image as JPEG: DDPO's rewards (arXiv 2305.13301), which need no weights."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from genalign.types import Prompt
from rewards.backbones.pixels import pictures


def incompressibility(samples: Tensor, prompts: Sequence[Prompt], quality: int = 95) -> Tensor:
    """Measure images (B, 3, H, W) in [0, 1] as JPEG of ``quality``, in kB (1000 bytes): (B,) float32 on the CPU.

    Pillow encodes them, and versions of it may differ by some bytes. Prompts are ignored. NaN for an image that is not
    finite; no gradient.
    """
    sizes = []
    for picture in pictures(samples):
        file = io.BytesIO()
        if picture is not None:
            picture.save(file, format="JPEG", quality=quality)
        sizes.append(math.nan if picture is None else len(file.getvalue()) / 1000)
    return torch.tensor(sizes)


def compressibility(samples: Tensor, prompts: Sequence[Prompt], quality: int = 95) -> Tensor:
    """Return minus the size as JPEG, -``incompressibility``: (B,)."""
    return -incompressibility(samples, prompts, quality)
