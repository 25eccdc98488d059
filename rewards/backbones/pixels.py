"""Images as 8-bit pictures, for rewards that take PIL images and not tensors."""

from __future__ import annotations

from PIL import Image
from torch import Tensor

from genalign.runtime.media import eight_bits


def pictures(images: Tensor) -> list[Image.Image | None]:
    """Convert images (B, 3, H, W) in [0, 1] to RGB pictures of 8 bits; None where a pixel is not finite.

    Raises ValueError for another shape.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be (B, 3, H, W) in [0, 1], not a tensor of shape {tuple(images.shape)}")
    pixels = eight_bits(images).permute(0, 2, 3, 1).cpu().contiguous().numpy()
    finite = images.isfinite().flatten(1).all(1).tolist()
    return [Image.fromarray(array) if whole else None for array, whole in zip(pixels, finite, strict=True)]
