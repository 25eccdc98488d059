"""A small trainable reward with a known weakness, for the proof of Adv-GRPO: its first weights like saturation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from genalign.types import Prompt
from rewards.clip import cosine, load_clip


def saturation(images: Tensor) -> Tensor:
    """The mean over pixels of the largest less the smallest channel, (B,) in [0, 1]."""
    return (images.amax(1) - images.amin(1)).flatten(1).mean(1)


class PlantedTaste(nn.Module):
    """w_0 times CLIP's cosine plus w_1 times the saturation; the two weights are what can be trained."""

    def __init__(self, model: str = "shapes-clip", match: float = 4.0, taste: float = 40.0) -> None:
        super().__init__()
        self.encoder = load_clip(model)
        self.weights = nn.Parameter(torch.tensor([match, taste]))

    def forward(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Logits (B,) of images (B, 3, H, W) in [0, 1] and their prompts."""
        with torch.no_grad():
            match = cosine(self.encoder(images), self.encoder.text([prompt.text for prompt in prompts]))
            seen = torch.stack([match, saturation(images.float())], dim=1)
        return seen @ self.weights
