"""A small trainable reward with a known weakness, for the proofs of Adv-GRPO and of the reward-hacking alarm.

Its first weights prefer saturation, or another statistic of choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from genalign.metrics.image import saturation
from genalign.types import Prompt
from genalign.worlds.shapes.verifier import verify


def brightness(images: Tensor) -> Tensor:
    """The mean over pixels and channels, (B,) in [0, 1]."""
    return images.flatten(1).mean(1)


def redness(images: Tensor) -> Tensor:
    """The mean of red less the mean of green and blue, (B,) in [-1, 1]."""
    return (images[:, 0] - images[:, 1:].mean(1)).flatten(1).mean(1)


LIKED = {"saturation": saturation, "brightness": brightness, "red": redness}


class PlantedTaste(nn.Module):
    """A weighted sum of the verifier's scores and of a planted preference, with trainable weights.

    It is ``match`` times the verifier's partial credit and strict score plus ``taste`` times the statistic ``likes``,
    each times a trainable weight that starts at 1.
    """

    def __init__(
        self,
        match: float = 2.0,
        taste: float = 100.0,
        likes: Literal["saturation", "brightness", "red"] = "saturation",
    ) -> None:
        super().__init__()
        self.likes = LIKED[likes]
        self.scale = torch.tensor([match, taste])
        self.weights = nn.Parameter(torch.ones(2))

    def forward(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Logits (B,) of images (B, 3, H, W) in [0, 1] and their prompts; NaN for an image with NaN."""
        with torch.no_grad():
            verifications = verify(images.nan_to_num(0.0, 0.0, 0.0), [prompt.metadata or {} for prompt in prompts])
            match = torch.tensor([verification.partial + verification.strict for verification in verifications])
            seen = torch.stack([match, self.likes(images.float()).cpu()], dim=1)
        return (seen * self.scale).to(self.weights) @ self.weights
