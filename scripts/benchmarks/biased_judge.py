"""A deterministic judge of two images with known faults, for the proofs of win rates: no model, no server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from genalign.types import Prompt
from rewards.shapes import ShapesReward
from scripts.benchmarks.planted_rewards import pixel_hash


@dataclass(frozen=True)
class BiasedJudge:
    """P(left is better) by the verifier's partial plus strict credit, from a judge that favors what it is shown first.

    Without faults it is s = sigmoid(scale (left - right)), and 1/2 where both are within ``tie``. The judge prefers the
    left image regardless with probability 2 ``bias``, hence answers 2 bias + (1 - 2 bias) s: over both orders its mean
    preference for the first is 1/2 + bias, and a bias of 1/2 always prefers the first. It has no answer, NaN, to a
    share ``failures`` of all pairs, which the pixels of both images select.
    """

    bias: float = 0.2
    scale: float = 8.0
    tie: float = 0.05
    failures: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.bias <= 0.5 or not 0 <= self.failures < 1:
            raise ValueError(
                f"bias must be in [0, 0.5] and failures in [0, 1), not {self.bias:g} and {self.failures:g}"
            )

    def __call__(self, left: Tensor, right: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Compare images (B, 3, 64, 64) in [0, 1] as (B,), float32 on the CPU; NaN without an answer."""
        first, second = (
            ShapesReward("partial")(side, prompts) + ShapesReward("strict")(side, prompts) for side in (left, right)
        )
        gap = first - second
        preferred = torch.sigmoid(self.scale * torch.where(gap.abs() <= self.tie, 0.0, gap))
        preferred = 2 * self.bias + (1 - 2 * self.bias) * preferred
        drawn = torch.tensor([pixel_hash(*pair) / 2**64 for pair in zip(left, right, strict=True)])
        return preferred.masked_fill(drawn < self.failures, torch.nan)
