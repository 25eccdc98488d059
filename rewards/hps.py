"""The Human Preference Score v2 and v2.1 (arXiv 2306.09341), by open_clip."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from genalign.types import Precision
from rewards.backbones.clip_encoder import ClipEncoder, OpenClipEncoder
from rewards.backbones.weight_files import locate
from rewards.clip import CosineReward


@dataclass(frozen=True)
class HPSReward(CosineReward):
    """The cosine of image and text by the fine-tuned CLIP-H, without its logit scale: mostly 0.25 to 0.37.

    As published, an image is fitted into 224 x 224 with black around it, and texts are cut to 77 tokens. The model is
    opened at the first call, with weights_only=True, and then follows the samples' device. Resizing is antialiased and
    clamped to [0, 1]. hpsv2 resizes a tensor by torchvision's default, which was not antialiased before torchvision
    0.17: figures of HPS from 2023 may rest on such pixels, which differ by 0.03 in the mean at 512 and 1024 pixels.

    Args:
        weights: The published .pt, or its tensors as .safetensors: a path, or hf://owner/repository/file. The default
            is v2.1; v2.0 is HPS_v2_compressed.pt beside it.
        architecture: The architecture of the weights, by its name in open_clip.
        dtype: The precision of the weights; embeddings are in float32.
    """

    weights: str = "hf://xswu/HPSv2/HPS_v2.1_compressed.pt"
    architecture: str = "ViT-H-14"
    dtype: Precision = "float32"

    def encoder(self, device: torch.device | None) -> ClipEncoder:
        return _opened(self.weights, self.architecture, self.dtype).to(device)


@functools.cache
def _opened(weights: str, architecture: str, dtype: Precision) -> OpenClipEncoder:
    import open_clip

    path, padded = str(locate(weights)), {"resize_mode": "longest"}
    model = open_clip.create_model(architecture, path, force_preprocess_cfg=padded, weights_only=True)
    return OpenClipEncoder(model, architecture, dtype)
