"""Features of frozen encoders, and the base of encoders with a text tower: CLIP for images, CLAP for sound."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genalign.types import Precision, Prompt


@dataclass(frozen=True)
class Features:
    """Features ``global_`` (B, d) of whole samples, and ``patches`` (B, n, d) of their parts.

    Parts are an image's patches in reading order, or a clip's frames in order of time.
    """

    global_: Tensor
    patches: Tensor


@runtime_checkable
class PatchFeatures(Protocol):
    """A feature function that also gives features of a sample's parts: an image's patches, a clip's frames."""

    def __call__(self, samples: Tensor) -> Tensor:
        """Compute global features (B, d) of samples (B, ...); differentiable."""
        return self.features(samples).global_

    def features(self, samples: Tensor) -> Features:
        """Compute the global features and the features of the parts in one pass."""


def require_patches(encoder: object) -> PatchFeatures:
    """Return ``encoder``. Raises ValueError where it gives no features of parts."""
    if not isinstance(encoder, PatchFeatures):
        raise ValueError(
            f"{type(encoder).__name__} gives no patches or frames: take an encoder with a method features, such as"
            " rewards.backbones.image_features.ClipFeatures or rewards.backbones.audio_features.LogMelFeatures"
        )
    return encoder


class DualEncoder(nn.Module, ABC):
    """A frozen encoder of texts and of samples into one space: weights of ``dtype``, embeddings in float32.

    Texts are encoded by ``model`` and ``tokenizer`` of transformers, and cut to ``context`` tokens.
    """

    model: Any
    tokenizer: Any
    context: int

    def __init__(self, model: nn.Module, dtype: Precision = "float32") -> None:
        super().__init__()
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.model = model.to(self.dtype).requires_grad_(False).eval()
        self._texts: dict[str, Tensor] = {}

    def encode_texts(self, texts: list[str]) -> Tensor:
        """Compute projected embeddings (n, d) of texts, cut to the context length."""
        options = {"padding": True, "truncation": True, "max_length": self.context, "return_tensors": "pt"}
        tokens = self.tokenizer(texts, **options).to(self.device, non_blocking=True)
        pooled = self.model.text_model(tokens.input_ids, tokens.attention_mask).pooler_output
        embeddings: Tensor = self.model.text_projection(pooled)
        return embeddings

    @torch.no_grad()
    def text(self, texts: Sequence[str]) -> Tensor:
        """Compute unit embeddings (B, d), float32.

        Each distinct text is encoded once, and alone: in a batch its last bits would depend on the others, and on which
        of them were cached.
        """
        new = [text for text in dict.fromkeys(texts) if text not in self._texts]
        if new:
            units = [F.normalize(self.encode_texts([text])[0].float(), dim=-1) for text in new]
            self._texts.update(zip(new, torch.stack(units).cpu(), strict=True))
        return torch.stack([self._texts[text] for text in texts]).to(self.device, non_blocking=True)

    @property
    @abstractmethod
    def sample_tower(self) -> tuple[nn.Module, ...]:
        """The parts of the encoder that embed samples, not texts."""

    @property
    def device(self) -> torch.device:
        """The device that holds the weights."""
        return next(self.parameters()).device


class CosineScorer(nn.Module):
    """The network of a cosine reward: ``scale`` times the cosine of a sample and its prompt by one encoder.

    ``arguments`` follow the samples in the encoder's call, such as the sample rate of CLAP.
    """

    def __init__(self, encoder: DualEncoder, *arguments: int, scale: float = 1.0) -> None:
        super().__init__()
        self.encoder, self.arguments, self.scale = encoder, arguments, scale

    @property
    def sample_tower(self) -> tuple[nn.Module, ...]:
        """The networks that samples pass through on the way to a score: the encoder's own."""
        return self.encoder.sample_tower

    def forward(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        embedding = self.encoder(samples, *self.arguments)
        return self.scale * cosine(embedding, self.encoder.text([prompt.text for prompt in prompts]))


def read_config(model: str, kind: str, model_type: str | None = None) -> Any:
    """Read the config of a transformers folder or Hub id.

    Raises ValueError for another ``kind``, such as "CLIP", whose ``model_type`` is its name in lower case by default.
    """
    from transformers import AutoConfig

    if Path(model).exists() and not (Path(model) / "config.json").is_file():
        raise ValueError(
            f"{model} has no config.json: give the folder that save_pretrained of a {kind} model and of its processor"
            " wrote"
        )
    config = AutoConfig.from_pretrained(model)
    if config.model_type != (model_type or kind.lower()):
        raise ValueError(f"{model} is a {config.model_type} checkpoint, not {kind}: give a {kind} folder or Hub id")
    return config


def cosine(left: Tensor, right: Tensor) -> Tensor:
    """Compute the cosines (B,) of matching rows of two (B, d) in float32."""
    if left.shape != right.shape or left.ndim != 2:
        shapes = f"{tuple(left.shape)} and {tuple(right.shape)}"
        raise ValueError(f"there must be one prompt per sample: got embeddings {shapes}")
    return F.cosine_similarity(left.float(), right.float(), dim=-1)
