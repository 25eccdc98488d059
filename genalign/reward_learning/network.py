"""The network of a learned reward: an encoder of samples and prompts, and heads on what it computes.

B samples, n tokens of width d, M members of an ensemble, K outputs: the dimensions of the preferences, and then the
nuisances whose share of the preference is kept apart (ODIN).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from genalign.types import Prompt


class RewardEncoder(nn.Module, ABC):
    """What a head reads: tokens of a sample together with its prompt.

    Where none of its parameters requires a gradient, its tokens are computed once and stored.
    """

    @abstractmethod
    def forward(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Compute tokens (B, n, d) in float32 of samples (B, ...), differentiably; n is 1 for pooled features."""

    @property
    @abstractmethod
    def width(self) -> int:
        """The width d of a token."""

    @property
    @abstractmethod
    def sample_tower(self) -> tuple[nn.Module, ...]:
        """The networks that samples pass through, for noise-aware students."""

    @property
    def sample_rate(self) -> int | None:
        """The sample rate of the sound that it takes, in Hz; None for images."""
        return None


class Head(nn.Module, ABC):
    """A head from tokens (B, n, d) to outputs (B, K)."""

    @abstractmethod
    def features(self, tokens: Tensor) -> Tensor:
        """Compute what the last linear layer reads, (B, w)."""

    @abstractmethod
    def forward(self, tokens: Tensor) -> Tensor:
        """Compute outputs (B, K)."""


class HeadShape(Protocol):
    """The settings of a head, as a configuration names them."""

    def build(self, width: int, outputs: int) -> Head:
        """Return an untrained head on tokens of ``width``; its weights are drawn by torch's global generator."""


class RewardNetwork(nn.Module):
    """An encoder with the heads (M) of an ensemble.

    ``forward`` averages the members and takes the first output: the network of a reward, as in ``NetworkReward``.
    """

    def __init__(self, encoder: RewardEncoder, heads: Sequence[Head]) -> None:
        super().__init__()
        self.encoder, self.heads = encoder, nn.ModuleList(heads)

    @property
    def sample_tower(self) -> tuple[nn.Module, ...]:
        """The networks that samples pass through on the way to a score."""
        return *self.encoder.sample_tower, self.heads

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """What an adversarial reward tunes (``rewards.adversarial``): the heads of all members, as one block."""
        return (self.heads,)

    @property
    def logit_scale(self) -> float:
        """The factor from scores to logits of a preference, 1 by Bradley and Terry's loss."""
        return 1.0

    def outputs(self, tokens: Tensor) -> Tensor:
        """Compute the outputs (B, M, K) of every member from tokens (B, n, d)."""
        return torch.stack([head(tokens) for head in self.heads], dim=1)

    def forward(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Score samples as (B,), differentiably."""
        scores: Tensor = self.outputs(self.encoder(samples, prompts))[..., 0].mean(1)
        return scores

    def trained(self) -> dict[str, Tensor]:
        """Return the weights that are trained and saved, by name: those of the heads, and others with a gradient."""
        encoder: dict[str, Any] = {n: p for n, p in self.encoder.named_parameters() if p.requires_grad}
        return {f"encoder.{name}": weight for name, weight in encoder.items()} | {
            f"heads.{name}": weight for name, weight in self.heads.state_dict(keep_vars=True).items()
        }
