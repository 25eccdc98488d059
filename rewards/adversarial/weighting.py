"""How several logits of a sample make its score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Weighting(Protocol):
    """How m logits of a sample make its score, and its loss."""

    def __call__(self, width: int, generator: torch.Generator) -> Tensor:
        """Weights (width,), 0 for a logit that is left out; ``generator`` is the same throughout a snapshot."""


def single(width: int, generator: torch.Generator) -> Tensor:
    """One logit is the score. Raises ValueError for more."""
    if width != 1:
        raise ValueError(f"the scorer gives {width} logits per sample: return (B,), or say how they are weighted")
    return torch.ones(1)


@dataclass(frozen=True)
class PatchWeights:
    """The logit of the whole image, and the mean of ``n_patches`` patch logits (Adv-GRPO, eqs. 9-14, appendix A).

    Which patches is drawn anew for each snapshot, the same for its scores and its training, and on every rank. The
    weights stand in the score and in the loss.
    """

    global_weight: float = 0.7
    local_weight: float = 0.3
    n_patches: int = 64

    def __post_init__(self) -> None:
        if min(self.global_weight, self.local_weight) < 0 or self.global_weight + self.local_weight <= 0:
            raise ValueError(
                "global_weight and local_weight must not be negative, nor both 0, but are"
                f" {self.global_weight} and {self.local_weight}"
            )
        if self.n_patches < 1:
            raise ValueError(f"n_patches must be at least 1, not {self.n_patches}; local_weight=0 leaves patches out")

    def __call__(self, width: int, generator: torch.Generator) -> Tensor:
        """Weights of 1 + n logits, the image's first. Raises ValueError for fewer patches than ``n_patches``."""
        weights = torch.zeros(width)
        weights[0] = self.global_weight
        if self.local_weight:
            if self.n_patches > width - 1:
                raise ValueError(f"n_patches is {self.n_patches}, but the features have {width - 1} patches: lower it")
            chosen = torch.randperm(width - 1, generator=generator)[: self.n_patches]
            weights[1 + chosen] = self.local_weight / self.n_patches
        return weights
