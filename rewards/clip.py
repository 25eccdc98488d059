"""Cosine similarity of text and image by a CLIP checkpoint."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from genalign.types import Precision, Prompt
from rewards.backbones.clip_encoder import ClipEncoder, load_clip
from rewards.backbones.encoders import CosineScorer


class ClipScorer(CosineScorer):
    """The network of a cosine reward of images, whose visual blocks can be tuned."""

    encoder: ClipEncoder

    def __init__(self, encoder: ClipEncoder, scale: float = 1.0) -> None:
        super().__init__(encoder, scale=scale)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The blocks of the visual transformer, first to last."""
        return list(self.encoder.blocks)

    @property
    def logit_scale(self) -> float:
        """The factor from scores to the model's logits."""
        return self.encoder.logit_scale / self.scale


class CosineReward(ABC):
    """The cosine of image and text by one encoder of both: ``ClipReward``, ``PickScoreReward``, ``HPSReward``."""

    @abstractmethod
    def encoder(self, device: torch.device | None) -> ClipEncoder:
        """Load the encoder, or return the one already loaded, on ``device``, or where it is for None."""

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Score images (B, 3, H, W) in [0, 1] as (B,), differentiable in the images; NaN where an image has NaN."""
        scores: Tensor = self._scorer(self.encoder(samples.device))(samples, prompts)
        return scores

    def network(self) -> nn.Module:
        """Return the network that scores samples, for a student of this reward."""
        return self._scorer(self.encoder(None))

    def _scorer(self, encoder: ClipEncoder) -> ClipScorer:
        return ClipScorer(encoder)


@dataclass(frozen=True)
class ClipReward(CosineReward):
    """The cosine of an image's and its prompt's CLIP embedding, in [-1, 1] (CLIPScore, arXiv 2104.08718, unscaled).

    The model is opened at the first call and then follows the samples' device. Texts longer than the model's context
    are cut.

    Args:
        model: An embedded CLIP ("shapes-clip"), an open_clip folder, a transformers folder or a Hub id.
        processor: The folder or Hub id of the tokenizer and image processor, where a transformers checkpoint has none
            beside its weights; null for the model's own.
        dtype: The precision of the weights; embeddings are in float32.
    """

    model: str
    processor: str | None = None
    dtype: Precision = "float32"

    def encoder(self, device: torch.device | None) -> ClipEncoder:
        return load_clip(self.model, self.processor, self.dtype).to(device)
