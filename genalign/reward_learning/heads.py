"""Heads of learned rewards: linear, a perceptron, attention pooling over patches or frames, and scores as they are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from genalign.reward_learning.network import Head


@dataclass(frozen=True)
class LinearHead:
    """A linear layer on the mean of the tokens."""

    def build(self, width: int, outputs: int) -> Head:
        """Return the linear layer; torch's global generator draws its weights."""
        return _Layers(nn.Identity(), nn.Linear(width, outputs))


@dataclass(frozen=True)
class MLPHead:
    """A perceptron with one hidden layer and GELU, on the mean of the tokens.

    Args:
        hidden: Width of the hidden layer.
    """

    hidden: int = 256

    def __post_init__(self) -> None:
        if self.hidden < 1:
            raise ValueError(f"hidden must be at least 1, not {self.hidden}")

    def build(self, width: int, outputs: int) -> Head:
        """Return the perceptron; torch's global generator draws its weights."""
        return _Layers(nn.Sequential(nn.Linear(width, self.hidden), nn.GELU()), nn.Linear(self.hidden, outputs))


@dataclass(frozen=True)
class AttentionHead:
    """Attention pooling: learned queries weigh the tokens, patches or frames; a linear layer reads the means.

    Args:
        queries: Number of queries.
        width: Width of keys and values of a query.
    """

    queries: int = 4
    width: int = 64

    def __post_init__(self) -> None:
        if min(self.queries, self.width) < 1:
            raise ValueError(f"queries and width must be at least 1, not {self.queries} and {self.width}")

    def build(self, width: int, outputs: int) -> Head:
        """Return the pooling with its linear layer; torch's global generator draws the weights."""
        return _Attention(width, self.queries, self.width, outputs)


@dataclass(frozen=True)
class IdentityHead:
    """A linear layer that starts as the identity, for tokens that are one score of each dimension.

    Such tokens are those of ``rewards.learned_encoders.YesTokenLogits``.
    """

    def build(self, width: int, outputs: int) -> Head:
        """Return the head. Raises ValueError for another number of outputs than the width of a token."""
        if width != outputs:
            raise ValueError(
                f"IdentityHead takes one score of each output, but a token has {width} numbers and there are {outputs}"
                " outputs: take LinearHead or MLPHead"
            )
        last = nn.Linear(width, outputs)
        nn.init.eye_(last.weight)
        nn.init.zeros_(last.bias)
        return _Layers(nn.Identity(), last)


class _Layers(Head):
    """Layers on the mean of the tokens, and the last linear layer."""

    def __init__(self, layers: nn.Module, last: nn.Linear) -> None:
        super().__init__()
        self.layers, self.last = layers, last

    def features(self, tokens: Tensor) -> Tensor:
        features: Tensor = self.layers(tokens.mean(1))
        return features


class _Attention(Head):
    def __init__(self, width: int, queries: int, inner: int, outputs: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(queries, inner))
        self.keys, self.values = nn.Linear(width, queries * inner), nn.Linear(width, queries * inner)
        self.last = nn.Linear(queries * inner, outputs)

    def features(self, tokens: Tensor) -> Tensor:
        keys, values = (
            layer(tokens).unflatten(-1, self.queries.shape).transpose(1, 2) for layer in (self.keys, self.values)
        )  # (B, queries, n, inner)
        logits = (keys @ self.queries[:, :, None]).squeeze(-1) / self.queries.shape[1] ** 0.5
        pooled: Tensor = logits.softmax(-1)[:, :, None] @ values
        return pooled.flatten(1)
