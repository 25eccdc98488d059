"""A small trainable reward with a known weakness, for the proof of Adv-GRPO: its first weights like saturation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from genalign.types import Prompt
from rewards.shapes import ShapesReward


def saturation(images: Tensor) -> Tensor:
    """The mean over pixels of the largest less the smallest channel, (B,) in [0, 1]."""
    return (images.amax(1) - images.amin(1)).flatten(1).mean(1)


class PlantedTaste(nn.Module):
    """``match`` times the verifier's partial credit plus ``taste`` times the saturation, each times a trainable weight
    that begins at 1."""

    def __init__(self, match: float = 4.0, taste: float = 100.0) -> None:
        super().__init__()
        self.scale = torch.tensor([match, taste])
        self.weights = nn.Parameter(torch.ones(2))
        self._verifier = ShapesReward("partial")

    def forward(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Logits (B,) of images (B, 3, H, W) in [0, 1] and their prompts; NaN for an image with NaN."""
        with torch.no_grad():
            seen = torch.stack([self._verifier(images, prompts), saturation(images.float()).cpu()], dim=1)
        return (seen * self.scale).to(self.weights) @ self.weights
