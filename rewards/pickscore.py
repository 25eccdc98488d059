"""PickScore (arXiv 2305.01569): CLIP-H fine-tuned on people's choices between two images of a prompt."""

from __future__ import annotations

from dataclasses import dataclass

from rewards.backbones.clip_encoder import ClipEncoder
from rewards.clip import ClipReward, ClipScorer


@dataclass(frozen=True)
class PickScoreReward(ClipReward):
    """The cosine of image and text times exp(logit scale), as on the model card: mostly 18 to 24.

    It is on a logit scale: a softmax over the scores of images of one prompt is the probability of each to be
    preferred. Flow-GRPO and others divide by 26: give it the weight 1 / 26. The model is loaded at the first call and
    then follows the samples' device. Texts longer than the model's context are truncated.

    Args:
        model: The published checkpoint, or the folder or Hub id of another.
        processor: The folder or Hub id of the tokenizer and image processor: for the published checkpoint those of
            CLIP-H, since it has none beside its weights; null for the model's own.
    """

    model: str = "yuvalkirstain/PickScore_v1"
    processor: str | None = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"

    def _scorer(self, encoder: ClipEncoder) -> ClipScorer:
        return ClipScorer(encoder, scale=encoder.logit_scale)
