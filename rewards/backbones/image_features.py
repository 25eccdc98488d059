"""Image features of frozen backbones, for discriminators, Fréchet distances and diversity; reference sets of them.

Features of sound are in ``rewards.backbones.audio_features``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from rewards.backbones.clip_encoder import Preparation, load_clip
from rewards.backbones.encoders import Features
from rewards.backbones.reference_images import Samples

__all__ = ["ClipFeatures", "Dinov2Features", "Features", "PatchFeatures", "described", "described_texts"]

_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@runtime_checkable
class PatchFeatures(Protocol):
    """A feature function that also tells features of a sample's parts: an image's patches, a clip's frames."""

    def __call__(self, samples: Tensor) -> Tensor:
        """Global features (B, d)."""

    def features(self, samples: Tensor) -> Features:
        """Global features and those of the parts, from one pass."""


def with_parts(encoder: object) -> PatchFeatures:
    """``encoder``. Raises ValueError where it tells nothing of parts."""
    if not isinstance(encoder, PatchFeatures):
        raise ValueError(
            f"{type(encoder).__name__} gives no patches or frames: take an encoder with a method features, such as"
            " ClipFeatures or rewards.backbones.audio_features.LogMelFeatures"
        )
    return encoder


@dataclass(frozen=True)
class ClipFeatures:
    """CLIP's image embedding, and its patch tokens brought into the same space; ``unit`` gives all of them length 1.

    ``model`` and ``processor`` are those of ``rewards.backbones.clip_encoder.load_clip``; opened at the first call, frozen, float32.
    """

    model: str
    processor: str | None = None
    unit: bool = False

    def __call__(self, samples: Tensor) -> Tensor:
        """Embeddings (B, d) of images (B, 3, H, W) in [0, 1]; differentiable."""
        embedding: Tensor = load_clip(self.model, self.processor).to(samples.device)(samples)
        return F.normalize(embedding, dim=-1) if self.unit else embedding

    def features(self, samples: Tensor) -> Features:
        """Embeddings (B, d) and patches (B, n, d). Raises ValueError where the tower is no vision transformer."""
        found = load_clip(self.model, self.processor).to(samples.device).features(samples)
        if not self.unit:
            return found
        return Features(F.normalize(found.global_, dim=-1), F.normalize(found.patches, dim=-1))


@dataclass(frozen=True)
class Dinov2Features:
    """DINOv2's class and patch tokens after the final norm (Adv-GRPO, arXiv 2511.20256, section 4.3).

    ``model`` is a transformers folder or Hub id, such as facebook/dinov2-base; ``size`` the side in pixels that images
    get, a multiple of the patch size, by default that of the checkpoint (518). Opened at the first call, frozen,
    float32.
    """

    model: str
    size: int | None = None

    def __call__(self, samples: Tensor) -> Tensor:
        """Class tokens (B, d) of images (B, 3, H, W) in [0, 1]; differentiable."""
        return self.features(samples).global_

    def features(self, samples: Tensor) -> Features:
        """Class tokens (B, d) and patch tokens (B, n, d)."""
        network = _load_dinov2(self.model).to(samples.device)
        tokens = network(self._preparation(network.config)(samples)).last_hidden_state
        return Features(tokens[:, 0], tokens[:, 1:])

    def _preparation(self, config: Any) -> Preparation:
        size = self.size or int(config.image_size)
        if size % config.patch_size:
            raise ValueError(
                f"size {size} is not a multiple of the patch size {config.patch_size}: try"
                f" {max(1, size // config.patch_size) * config.patch_size}"
            )
        return Preparation((size, size), *_IMAGENET)


@torch.no_grad()
def described(
    images: Samples,
    features: Callable,  # type: ignore[type-arg]  # bare: configurations name any FeatureFunction
    batch_size: int = 64,
) -> Tensor:
    """Features (m, d) of all ``images`` or clips: a reference set for ``rewards.set_rewards``. They may be a folder
    (``references.ImageFolder``, ``recordings.AudioFolder``), or the samples of another generator
    (``references.ImageTensor``, ``recordings.AudioTensor``). ValueError for fewer than 2: one has no covariance."""
    if len(images) < 2:
        raise ValueError(
            f"a reference set needs 2 samples or more, got {len(images)}: one has no covariance. Add more, or compare"
            " the frames of one long clip (rewards.backbones.audio_features.described_frames)"
        )
    rows = range(len(images))
    parts = [features(images.load(rows[i : i + batch_size])) for i in range(0, len(rows), batch_size)]
    return torch.cat(parts)


def described_texts(texts: Sequence[str], model: str, processor: str | None = None) -> Tensor:
    """CLIP's text embeddings (m, d), of length 1: a reference set in words, for ``ClipFeatures(model, unit=True)``.

    Texts and images lie apart in CLIP's space, so that a distance between them falls without reaching 0. ValueError for
    fewer than 2 texts: one has no covariance.
    """
    return load_clip(model, processor).reference(texts)


@functools.cache
def _load_dinov2(model: str) -> Any:
    from transformers import AutoConfig, Dinov2Model

    kind = AutoConfig.from_pretrained(model).model_type
    if kind != "dinov2":
        raise ValueError(f"{model} is a {kind} checkpoint, not DINOv2: give a DINOv2 folder or Hub id")
    return Dinov2Model.from_pretrained(model, dtype=torch.float32).requires_grad_(False).eval()
