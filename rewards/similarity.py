"""Likeness of images to reference images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from genalign.types import Prompt
from rewards.backbones.reference_images import References

_BATCH = 64


@dataclass(frozen=True, eq=False)
class ReferenceSimilarity:
    """Cosine of an image's features with those of its reference images, in [-1, 1], ``over`` which it takes the mean
    or the greatest.

    With ``rewards.backbones.image_features.Dinov2Features`` this is the DINO similarity that Adv-GRPO reports (arXiv 2511.20256).
    ``features`` is any FeatureFunction; ``references`` are those of the prompt (``references.ReferencesByPrompt``) or of any
    (``references.ReferencePool``). A reference is described once, when it is first needed, and kept on the CPU.
    """

    features: Callable  # type: ignore[type-arg]  # bare: configurations name any FeatureFunction
    references: References
    over: Literal["mean", "nearest"] = "mean"
    _described: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores (B,) of images (B, 3, H, W) in [0, 1], differentiable in the images; NaN where an image has NaN.

        Raises ValueError for a prompt without references.
        """
        rows = [tuple(self.references.rows(prompt)) for prompt in prompts]
        features = F.normalize(self.features(samples).float(), dim=-1)
        if len(features) != len(rows):
            raise ValueError(f"there must be one prompt per image: found {len(rows)} for {len(features)} images")
        described = {found: self._references(found, samples.device) for found in dict.fromkeys(rows)}
        cosines = [described[found] @ feature for found, feature in zip(rows, features, strict=True)]
        return torch.stack([found.mean() if self.over == "mean" else found.amax() for found in cosines])

    @torch.no_grad()
    def _references(self, rows: Sequence[int], device: torch.device) -> Tensor:
        """Unit features (n, d) of these references."""
        new = [row for row in dict.fromkeys(rows) if row not in self._described]
        for begin in range(0, len(new), _BATCH):
            part = new[begin : begin + _BATCH]
            features = self.features(self.references.images.load(part).to(device)).float()
            self._described.update(zip(part, F.normalize(features, dim=-1).cpu(), strict=True))
        return torch.stack([self._described[row] for row in rows]).to(device)
