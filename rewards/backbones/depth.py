"""Depth of images by transformers' models, for benchmarks that ask what is in front of what."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from genalign.runtime.media import eight_bits
from genalign.types import Precision
from rewards.backbones.weight_files import load_frozen


@dataclass(frozen=True)
class DepthModel:
    """How near each pixel is: the inverse depth of a model such as DPT (arXiv:2103.13413), larger where it is nearer.

    ``model`` is a folder or Hub id that transformers' AutoModelForDepthEstimation opens. A model of depth itself, such
    as Depth Anything's metric ones, is larger where it is farther: set ``inverse`` to False for it. Loaded at the first
    call, with weights of ``dtype``; then follows the images' device.
    """

    model: str = "Intel/dpt-large"
    inverse: bool = True
    batch_size: int = 8
    dtype: Precision = "float32"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Estimate nearness (B, H, W), on the CPU, of images (B, 3, H, W) in [0, 1]; comparable within an image."""
        network, processor = load_frozen(self.model, "AutoModelForDepthEstimation", "AutoImageProcessor", self.dtype)
        network.to(images.device)
        maps = []
        for part in torch.split(eight_bits(images), self.batch_size):
            pixels = processor(images=list(part), return_tensors="pt").pixel_values
            pixels = pixels.to(images.device, non_blocking=True).to(network.dtype)
            depth = network(pixel_values=pixels).predicted_depth.float()
            sized = interpolate(depth[:, None], images.shape[-2:], mode="bilinear", align_corners=False)
            maps.append(sized[:, 0])
        nearness = torch.cat(maps).cpu()
        return nearness if self.inverse else -nearness
