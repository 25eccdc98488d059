"""Cosine similarity of text and sound by a CLAP checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from genalign.types import Precision, Prompt
from rewards.backbones.clap_encoder import load_clap
from rewards.backbones.encoders import CosineScorer


@dataclass(frozen=True)
class ClapReward:
    """The cosine of a clip's and its prompt's CLAP embedding, in [-1, 1] (arXiv 2211.06687).

    The model is opened at the first call and then follows the samples' device. Texts longer than the model's context
    are cut. Scores of two checkpoints are not comparable.

    Args:
        model: An embedded CLAP ("tones-clap"), a transformers folder or a Hub id.
        sample_rate: The rate of the samples in Hz. They are resampled and mixed to one channel where the checkpoint
            needs it.
        dtype: The precision of the weights; batch norms stay in float32.
    """

    model: str
    sample_rate: int
    dtype: Precision = "float32"

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Score waveforms (B, C, L) in [-1, 1] as (B,), differentiable in them; NaN where one has NaN."""
        scores: Tensor = self.network().to(samples.device)(samples, prompts)
        return scores

    def network(self) -> nn.Module:
        """Return the network that scores samples, for a student of this reward."""
        return CosineScorer(load_clap(self.model, self.dtype), self.sample_rate)
