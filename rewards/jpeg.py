"""How well an image compresses as JPEG: DDPO's rewards (arXiv 2305.13301), which need no weights."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from genalign.types import Prompt
from rewards.backbones.pixels import pictures


def incompressibility(samples: Tensor, prompts: Sequence[Prompt], quality: int = 95) -> Tensor:
    """The size in kB (1000 bytes) of images (B, 3, H, W) in [0, 1] as JPEG of ``quality``: (B,) float32 on the CPU.

    Pillow encodes them, and versions of it may differ by some bytes. The prompts do not matter. NaN for an image that
    is not finite; no gradient.
    """
    return torch.tensor([_kilobytes(picture, quality) for picture in pictures(samples)])


def compressibility(samples: Tensor, prompts: Sequence[Prompt], quality: int = 95) -> Tensor:
    """-``incompressibility``."""
    return -incompressibility(samples, prompts, quality)


def _kilobytes(picture: Image.Image | None, quality: int) -> float:
    if picture is None:
        return math.nan
    file = io.BytesIO()
    picture.save(file, format="JPEG", quality=quality)
    return len(file.getvalue()) / 1000
