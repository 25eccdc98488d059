"""Similarity of images to reference images."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from genalign.types import AnyCallable, Prompt
from rewards.backbones.reference_images import References

_BATCH = 64


@dataclass(frozen=True, eq=False)
class ReferenceSimilarity:
    """The cosine of an image's features with those of its references, in [-1, 1].

    It is the mean over the references. Features of a reference are computed once, at the first need, and cached on the
    CPU.

    Args:
        features: Any ``genalign.types.FeatureFunction``. With ``rewards.backbones.image_features.Dinov2Features`` this
            is the DINO similarity that Adv-GRPO reports (arXiv 2511.20256).
        references: ``ReferencesByPrompt`` or a ``ReferencePool`` of ``rewards.backbones.reference_images``.
    """

    features: AnyCallable
    references: References

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Score images (B, 3, H, W) in [0, 1] as (B,), differentiable in the images; NaN where an image has NaN.

        Raises ValueError for a prompt without references.
        """
        rows = [tuple(self.references.rows(prompt)) for prompt in prompts]
        features = F.normalize(self.features(samples).float(), dim=-1)
        if len(features) != len(rows):
            raise ValueError(f"there must be one prompt per image, not {len(rows)} for {len(features)} images")
        references = {numbers: self._reference_features(numbers, samples.device) for numbers in dict.fromkeys(rows)}
        cosines = [references[numbers] @ feature for numbers, feature in zip(rows, features, strict=True)]
        return torch.stack([values.mean() for values in cosines])

    def require_references(self, prompt: Prompt) -> None:
        """Raise ValueError where there are no references for ``prompt``."""
        self.references.rows(prompt)

    @functools.cached_property
    def _cache(self) -> dict[int, Tensor]:
        return {}

    @torch.no_grad()
    def _reference_features(self, rows: Sequence[int], device: torch.device) -> Tensor:
        """Compute unit features (n, d) of the references ``rows``."""
        new = [row for row in dict.fromkeys(rows) if row not in self._cache]
        for start in range(0, len(new), _BATCH):
            part = new[start : start + _BATCH]
            features = self.features(self.references.images.load(part).to(device)).float()
            self._cache.update(zip(part, F.normalize(features, dim=-1).cpu(), strict=True))
        return torch.stack([self._cache[row] for row in rows]).to(device)
