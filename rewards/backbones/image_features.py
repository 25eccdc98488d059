"""Image features of frozen encoders, for discriminators, Frechet distances and diversity; reference sets of them.

Features of sound are in ``rewards.backbones.audio_features``.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from genalign.types import AnyCallable, Precision
from rewards.backbones.clip_encoder import ImagePreprocessor, load_clip, read_preprocessor
from rewards.backbones.encoders import Features, PatchFeatures, read_config
from rewards.backbones.reference_images import ReferenceSamples

_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ClipFeatures:
    """CLIP's image embedding, and its patch tokens projected into the same space; ``unit`` gives all of them length 1.

    ``model``, ``processor`` and ``dtype``, that of the weights, are as for
    ``rewards.backbones.clip_encoder.load_clip``. The model is opened at the first call, frozen.
    """

    model: str
    processor: str | None = None
    unit: bool = False
    dtype: Precision = "float32"

    def __call__(self, samples: Tensor) -> Tensor:
        """Compute embeddings (B, d) of images (B, 3, H, W) in [0, 1]; differentiable."""
        embedding: Tensor = load_clip(self.model, self.processor, self.dtype).to(samples.device)(samples)
        return F.normalize(embedding, dim=-1) if self.unit else embedding

    def features(self, samples: Tensor) -> Features:
        """Compute embeddings (B, d) and patches (B, n, d). Raises ValueError for a tower without patches."""
        features = load_clip(self.model, self.processor, self.dtype).to(samples.device).features(samples)
        if not self.unit:
            return features
        return Features(F.normalize(features.global_, dim=-1), F.normalize(features.patches, dim=-1))


@dataclass(frozen=True)
class Dinov2Features(PatchFeatures):
    """DINOv2's class and patch tokens after the final norm (Adv-GRPO, arXiv 2511.20256, section 4.3).

    ``model`` is a transformers folder or Hub id, such as facebook/dinov2-base. Images are resized to ``size`` pixels a
    side, a multiple of the patch size, by default that of the checkpoint (518). The model is opened at the first call,
    frozen, with weights of ``dtype``.
    """

    model: str
    size: int | None = None
    dtype: Precision = "float32"

    def features(self, samples: Tensor) -> Features:
        """Compute class tokens (B, d) and patch tokens (B, n, d) of images (B, 3, H, W) in [0, 1]; differentiable."""
        network, prepare = load_dinov2(self.model, self.dtype)
        prepare = of_size(prepare, self.size, int(network.config.patch_size))
        tokens = network.to(samples.device)(prepare(samples).to(network.dtype)).last_hidden_state.float()
        return Features(tokens[:, 0], tokens[:, 1:])


@dataclass(frozen=True)
class Dinov3Features(PatchFeatures):
    """DINOv3's class and patch tokens after the final norm, without the register tokens between them.

    ``model`` is a transformers folder or Hub id of a vision transformer, such as
    facebook/dinov3-vitb16-pretrain-lvd1689m, with its image processor. Images are resized to ``size`` pixels a side, a
    multiple of the patch size, by default that of the processor (224). The model is opened at the first call, frozen,
    with weights of ``dtype``.
    """

    model: str
    size: int | None = None
    dtype: Precision = "float32"

    def features(self, samples: Tensor) -> Features:
        """Compute class tokens (B, d) and patch tokens (B, n, d) of images (B, 3, H, W) in [0, 1]; differentiable."""
        network, prepare = load_dinov3(self.model, self.dtype)
        prepare = of_size(prepare, self.size, int(network.config.patch_size))
        tokens = network.to(samples.device)(prepare(samples).to(network.dtype)).last_hidden_state.float()
        return Features(tokens[:, 0], tokens[:, 1 + int(network.config.num_register_tokens) :])


@dataclass(frozen=True)
class SiglipFeatures(PatchFeatures):
    """SigLIP's image embedding, pooled by its attention head, and its patch tokens after the last norm.

    SigLIP 2 checkpoints of a fixed resolution have the same layout. ``unit`` gives all features length 1. ``model`` is
    a transformers folder or Hub id, such as google/siglip-base-patch16-224, with its image processor. The model is
    opened at the first call, frozen, with weights of ``dtype``.
    """

    model: str
    unit: bool = False
    dtype: Precision = "float32"

    def features(self, samples: Tensor) -> Features:
        """Compute embeddings (B, d) and patch tokens (B, n, d) of images (B, 3, H, W) in [0, 1]; differentiable."""
        network, prepare = _load_siglip(self.model, self.dtype)
        network = network.to(samples.device)
        output = network(prepare(samples).to(network.dtype))
        embedding, patches = output.pooler_output.float(), output.last_hidden_state.float()
        if not self.unit:
            return Features(embedding, patches)
        return Features(F.normalize(embedding, dim=-1), F.normalize(patches, dim=-1))


@torch.no_grad()
def extract_features(images: ReferenceSamples, features: AnyCallable, batch_size: int = 64) -> Tensor:
    """Extract features (m, d) of all ``images`` or clips: a reference set for ``rewards.set_rewards``.

    They are a folder (``reference_images.ImageFolder``, ``reference_audio.AudioFolder``) or tensors, such as the
    samples of another generator (``reference_images.ImageTensor``, ``reference_audio.AudioTensor``). Raises ValueError
    for fewer than 2, which have no covariance.
    """
    if len(images) < 2:
        raise ValueError(
            f"a reference set needs 2 samples or more, got {len(images)}: one has no covariance. Add more, or compare"
            " the frames of one long clip (rewards.backbones.audio_features.extract_frame_features)"
        )
    rows = range(len(images))
    return torch.cat([features(images.load(rows[i : i + batch_size])) for i in range(0, len(rows), batch_size)])


def extract_text_features(texts: list[str], model: str) -> Tensor:
    """Compute CLIP's unit text embeddings (m, d): a reference set in words, for ``ClipFeatures(model, unit=True)``.

    Texts and images lie apart in CLIP's space, so a distance between them falls without reaching 0. Raises
    ValueError for fewer than 2 texts, which have no covariance.
    """
    if len(texts) < 2:
        raise ValueError(f"a reference set in words needs 2 texts or more, got {len(texts)}")
    return load_clip(model).text(texts)


def of_size(prepare: ImagePreprocessor, side: int | None, patch: int) -> ImagePreprocessor:
    """Return a preprocessing to images of another ``side``, or the same for None.

    Raises ValueError where a side of its images is not a multiple of the patch size.
    """
    resized = replace(prepare, size=(side, side)) if side else prepare
    for length in resized.size:
        if length % patch:
            nearest = max(1, length // patch) * patch
            raise ValueError(f"size {length} is not a multiple of the patch size {patch}: try {nearest}")
    return resized


@functools.cache
def load_dinov2(model: str, dtype: Precision = "float32") -> tuple[Any, ImagePreprocessor]:
    """Load a DINOv2 checkpoint, frozen, and its preprocessing, once per process and ``dtype``."""
    from transformers import Dinov2Model

    read_config(model, "DINOv2")
    network = Dinov2Model.from_pretrained(model, dtype=getattr(torch, dtype)).requires_grad_(False).eval()
    side = int(network.config.image_size)
    return network, ImagePreprocessor((side, side), *_IMAGENET)


@functools.cache
def load_dinov3(model: str, dtype: Precision = "float32") -> tuple[Any, ImagePreprocessor]:
    """Load a DINOv3 vision transformer, frozen, and its preprocessing, once per process and ``dtype``."""
    from transformers import DINOv3ViTModel

    read_config(model, "DINOv3", "dinov3_vit")
    network = DINOv3ViTModel.from_pretrained(model, dtype=getattr(torch, dtype)).requires_grad_(False).eval()
    return network, read_preprocessor(model)


@functools.cache
def _load_siglip(model: str, dtype: Precision) -> tuple[Any, ImagePreprocessor]:
    from transformers import SiglipVisionModel

    config = read_config(model, "SigLIP").vision_config
    if not config.vision_use_head:
        raise ValueError(f"{model} has no pooling head, so it gives no embedding: take another SigLIP checkpoint")
    network = SiglipVisionModel.from_pretrained(model, dtype=getattr(torch, dtype)).requires_grad_(False).eval()
    return network, read_preprocessor(model)
