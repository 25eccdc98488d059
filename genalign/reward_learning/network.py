"""The network of a learned reward: an encoder of samples and prompts, and heads on what it computes.

B samples, n tokens of width d, M members of an ensemble, K outputs: the dimensions of the preferences, and then the
nuisances whose share of the preference is kept apart (ODIN).
"""

from __future__ import annotations

import hashlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from genalign.reward_learning.uncertainty import LaplacePosterior, posterior_deviation
from genalign.types import Prompt

Pool = Literal["mean", "min", "mean_minus_std"]
"""How the scores of an ensemble's members become one; "mean_minus_std" is also of a single member with a posterior."""


class RewardEncoder(nn.Module, ABC):
    """What a head reads: tokens of a sample together with its prompt.

    Where none of its parameters requires a gradient, its tokens are computed once and stored.
    """

    @property
    @abstractmethod
    def arguments(self) -> dict[str, Any]:
        """The arguments of its class, as JSON types, from which a saved reward builds it again."""

    @abstractmethod
    def forward(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Compute tokens (B, n, d) in float32 of samples (B, ...), differentiably; n is 1 for pooled features."""

    @property
    @abstractmethod
    def width(self) -> int:
        """The width d of the tokens that ``forward`` gives."""

    @property
    @abstractmethod
    def sample_tower(self) -> tuple[nn.Module, ...]:
        """The networks that samples pass through, for noise-aware students."""

    @property
    def sample_rate(self) -> int | None:
        """The sample rate of the sound that it takes, in Hz; None for images."""
        return None

    def fingerprint(self) -> str:
        """Hash the frozen weights, of each up to about 1,000 numbers: equal for one checkpoint on every device."""
        digest = hashlib.sha256()
        for name, weight in itertools.chain(self.named_parameters(), self.named_buffers()):
            if not weight.requires_grad:
                flat = weight.detach().flatten()
                digest.update(f"{name} {tuple(weight.shape)}".encode())
                digest.update(flat[:: len(flat) // 1000 + 1].cpu().double().numpy().tobytes())
        return digest.hexdigest()[:16]


class Head(nn.Module, ABC):
    """A head from tokens (B, n, d) to outputs (B, K): features (B, w), and a linear layer on them."""

    last: nn.Linear

    @abstractmethod
    def features(self, tokens: Tensor) -> Tensor:
        """Compute what the last linear layer reads, (B, w)."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Compute outputs (B, K): the last layer on the features."""
        outputs: Tensor = self.last(self.features(tokens))
        return outputs


class HeadShape(Protocol):
    """The settings of a head, as a configuration names them."""

    def build(self, width: int, outputs: int) -> Head:
        """Return an untrained head on tokens of ``width``; its weights are drawn by torch's global generator."""


class RewardNetwork(nn.Module):
    """An encoder with the heads (M) of an ensemble: the network of a reward, as in ``NetworkReward``.

    ``forward`` gives one of the outputs, pooled over the members. Heads read tokens that are standardized by
    ``token_mean`` and ``token_scale`` (d). A member's output is counted from its ``level`` (M, K), its mean over the
    training items where the loss leaves the origin of scores open. A loss of pairs leaves it open for each prompt, so
    pools that compare members ("min", "mean_minus_std") also need ``Centering`` in training.

    Args:
        encoder: What the heads read.
        heads: The members.
        output: The number of the output that ``forward`` gives.
        pool: How it pools the members; their deviation is that of the population.
        posterior: The posterior of the last layer of a single member, for this output; None without.

    Raises:
        ValueError: The pool compares members, and there is one, without a posterior to take the deviation from.
    """

    token_mean: Tensor
    token_scale: Tensor
    level: Tensor
    covariance: Tensor | None
    center: Tensor | None

    def __init__(
        self,
        encoder: RewardEncoder,
        heads: Sequence[Head],
        output: int = 0,
        pool: Pool = "mean",
        posterior: LaplacePosterior | None = None,
    ) -> None:
        super().__init__()
        if pool not in get_args(Pool):
            raise ValueError(f"pool must be one of {', '.join(get_args(Pool))}, not {pool!r}")
        if len(heads) == 1 and (pool == "min" or (pool == "mean_minus_std" and posterior is None)):
            instead = ", or with uncertainty (a posterior of its last layer)" if pool == "mean_minus_std" else ""
            raise ValueError(
                f"pool {pool!r} compares the members of an ensemble, and this reward has one: take pool 'mean', or"
                f" train it with fit.members of 2 or more{instead}"
            )
        self.encoder, self.heads, self.output, self.pool = encoder, nn.ModuleList(heads), output, pool
        self.register_buffer("token_mean", torch.zeros(encoder.width))
        self.register_buffer("token_scale", torch.ones(encoder.width))
        self.register_buffer("level", torch.zeros(len(heads), heads[0].last.out_features))
        for name in ("covariance", "center"):
            self.register_buffer(name, None if posterior is None else getattr(posterior, name), persistent=False)

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

    def standardized(self, tokens: Tensor) -> Tensor:
        """Standardize tokens (B, n, d) of the encoder, which heads read."""
        return (tokens - self.token_mean) / self.token_scale

    def outputs(self, tokens: Tensor) -> Tensor:
        """Compute the outputs (B, M, K) of every member from tokens (B, n, d) of the encoder."""
        tokens = self.standardized(tokens)
        return torch.stack([head(tokens) for head in self.heads], dim=1) - self.level

    def deviation(self, tokens: Tensor) -> Tensor:
        """Compute the standard deviation (B,) of the scores of tokens (B, n, d) of the encoder, differentiably.

        It is that over the members, or by the posterior of a single one, counted from the mean training item.
        """
        if self.covariance is None or self.center is None:
            return self.outputs(tokens)[..., self.output].std(1, correction=0)
        (head,) = self.heads
        assert isinstance(head, Head)
        features = head.features(self.standardized(tokens))
        return posterior_deviation(features, self.covariance, self.center).float()

    def forward(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Score samples as (B,), differentiably."""
        tokens = self.encoder(samples, prompts)
        members = self.outputs(tokens)[..., self.output]
        if self.pool == "min":
            return members.amin(1)
        mean = members.mean(1)
        return mean if self.pool == "mean" else mean - self.deviation(tokens)

    def extra_repr(self) -> str:
        """Say what its score is, by which ``RewardIdentity`` tells networks of the same weights apart."""
        return f"output={self.output}, pool={self.pool!r}"

    def trained(self) -> dict[str, Tensor]:
        """Return the weights that are trained, by name: those of the heads, and the encoder's with a gradient."""
        encoder: dict[str, Any] = {n: p for n, p in self.encoder.named_parameters() if p.requires_grad}
        return {f"encoder.{name}": weight for name, weight in encoder.items()} | {
            f"heads.{name}": weight for name, weight in self.heads.named_parameters()
        }

    def buffers_of_scores(self) -> dict[str, Tensor]:
        """Return what is measured, not trained, and saved with the weights."""
        return {"token_mean": self.token_mean, "token_scale": self.token_scale, "level": self.level}
