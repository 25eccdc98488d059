"""LAION's aesthetic predictors: people's ratings of images, predicted from CLIP-L/14's image embedding."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from genalign.types import Precision, Prompt
from rewards.backbones.clip_encoder import ClipEncoder, load_clip
from rewards.backbones.weight_files import AffineHead, read_tensors


@dataclass(frozen=True)
class AestheticReward:
    """An affine function of the unit image embedding, on the raters' scale of 1 to 10: mostly 4 to 7.

    A reward that is linear in the embedding is easily hacked. The model is loaded at the first call. Prompts are
    ignored.

    Args:
        weights: The head: a path, or hf://owner/repository/file. The default is v2
            (sac+logos+ava1-l14-linearMSE.pth), an MLP without activations and so one affine map, into which it is
            folded; v1 is LAION's sa_0_4_vit_l_14_linear.pth.
        model: The CLIP that embeds the images, a folder or Hub id; both heads are for CLIP-L/14.
        processor: The folder or Hub id of the tokenizer and image processor, where a transformers checkpoint has none
            beside its weights; null for the model's own.
        dtype: The precision of the model's weights; the head is in float32.
    """

    weights: str = "hf://trl-lib/ddpo-aesthetic-predictor/aesthetic-model.pth"
    model: str = "openai/clip-vit-large-patch14"
    processor: str | None = None
    dtype: Precision = "float32"

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Score images (B, 3, H, W) in [0, 1] as (B,), differentiable in the images; NaN where an image has NaN.

        Raises ValueError for a head that cannot be folded, or of another width than the embedding.
        """
        scores: Tensor = self.network().to(samples.device)(samples, prompts)
        return scores

    def network(self) -> nn.Module:
        """Return the network that scores samples, for a student of this reward."""
        return _Scorer(load_clip(self.model, self.processor, self.dtype), _head(self.weights))


class _Scorer(nn.Module):
    """The head on the unit image embedding."""

    def __init__(self, encoder: ClipEncoder, head: AffineHead) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    @property
    def sample_tower(self) -> tuple[nn.Module, ...]:
        return self.encoder.sample_tower

    def forward(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return self.head(F.normalize(self.encoder(samples), dim=-1))


@functools.cache
def _head(weights: str) -> AffineHead:
    return AffineHead.of(read_tensors(weights))
