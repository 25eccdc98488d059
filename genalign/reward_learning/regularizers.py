"""Terms beside the loss of a reward: centered scores, a gradient penalty, and nuisances that are kept apart (ODIN)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from genalign.reward_learning.adversarial_losses import gradient_norms
from genalign.reward_learning.network import Head
from genalign.types import AnyCallable


@dataclass(frozen=True)
class ScoredBatch:
    """The items of a batch as one member of an ensemble scores them.

    Attributes:
        tokens: Standardized tokens (N, n, d) of the items.
        outputs: Outputs (N, K + J): dimensions, then nuisances.
        pairs: The numbers (P, 2) of the items of the pairs; None for grades.
        nuisances: The measured nuisances (N, J).
        head: The member.
    """

    tokens: Tensor
    outputs: Tensor
    pairs: Tensor | None
    nuisances: Tensor
    head: Head


class Regularizer(Protocol):
    """A term that is added to the loss."""

    def term(self, batch: ScoredBatch) -> Tensor:
        """Compute the term () of a batch, differentiable in its outputs and head."""


@dataclass(frozen=True)
class Centering:
    """``weight`` times the mean of (r_1 + r_2)^2 over the pairs (Helping or Herding, arXiv 2312.09244).

    Preferences leave the origin of the scores open for each prompt. Without the term the members of an ensemble differ
    by a constant of the prompt, and the least of their scores is mostly that of one member. It brings these constants
    together where pairs of a prompt are good and bad alike, not exactly.

    Args:
        weight: The weight.
    """

    weight: float = 0.01

    def term(self, batch: ScoredBatch) -> Tensor:
        """Compute the term; grades, which have an origin, have none."""
        assert batch.pairs is not None, "needs_pairs"
        return self.weight * batch.outputs[batch.pairs].sum(1).square().mean()


@dataclass(frozen=True)
class GradientPenalty:
    """``weight`` times the mean of (|gradient| - target)^2, of a score with respect to the tokens that it reads.

    A target of 0 flattens the score (R1, arXiv 1801.04406). With a target of 1 it is WGAN-GP's penalty
    (arXiv 1704.00028, eq. 3), and ``one_sided`` takes only norms above the target, which bounds the slope. Tokens are
    standardized, and the norm is over all tokens of an item.

    Args:
        weight: The weight.
        target: The target of the norm.
        one_sided: Whether norms below the target are left alone.
        between: Whether gradients are taken between the items of a pair, as in WGAN-GP, instead of at the items; the
            points of a batch are at even shares.
    """

    weight: float = 1.0
    target: float = 0.0
    one_sided: bool = False
    between: bool = False

    def __post_init__(self) -> None:
        if self.weight < 0 or self.target < 0:
            raise ValueError(f"weight and target must be at least 0, not {self.weight} and {self.target}")

    def term(self, batch: ScoredBatch) -> Tensor:
        """Compute the term; ``between`` needs pairs."""
        tokens = batch.tokens.detach()
        if self.between:
            assert batch.pairs is not None, "needs_pairs"
            first, second = tokens[batch.pairs].unbind(1)
            shares = torch.linspace(0, 1, len(first), device=first.device)[:, None, None]
            tokens = shares * first + (1 - shares) * second
        return self.weight * gradient_penalty(batch.head, tokens, self.target, self.one_sided)


def needs_pairs(term: Regularizer) -> bool:
    """Return whether a term is of the pairs of a batch, which grades have none of."""
    return isinstance(term, Centering) or (isinstance(term, GradientPenalty) and term.between)


def gradient_penalty(head: Head, tokens: Tensor, target: float, one_sided: bool = False) -> Tensor:
    """Average (|gradient| - target)^2 over tokens (N, n, d) and the outputs of a head, differentiably in its weights.

    Args:
        head: A head, each of whose outputs is penalized.
        tokens: Points at which the gradients are taken.
        target: The target of the norm.
        one_sided: Whether norms below the target count as the target.
    """
    points = tokens.detach().requires_grad_(True)
    excess = torch.stack([gradient_norms(output, points) for output in head(points).unbind(1)]) - target
    return (excess.clamp(min=0) if one_sided else excess).square().mean()


@dataclass(frozen=True)
class Disentangle:
    """Nuisances whose share of the preference has outputs of its own, which the reward leaves out (ODIN).

    The head has one output r_J for each nuisance beside that of the reward, r_Q. Their sum explains the preferences,
    r_J follows its nuisance over a batch, and r_Q does not: the terms are 1 - rho(nuisance, r_J) + |rho(nuisance, r_Q)|
    with Pearson's correlation, and |w_J . w_Q| of the last layer's weights (arXiv 2402.07319). The reward
    is r_Q alone, in one dimension.

    Args:
        nuisances: Functions of samples (B, ...) and prompts to numbers (B,), by their names.
        weight: Weight of the correlations.
        orthogonality: Weight of the products of weights.
    """

    nuisances: Mapping[str, AnyCallable]
    weight: float = 1.0
    orthogonality: float = 1.0

    def __post_init__(self) -> None:
        if not self.nuisances or self.weight < 0 or self.orthogonality < 0:
            raise ValueError("Disentangle needs at least one nuisance, and weights of at least 0")

    def term(self, batch: ScoredBatch) -> Tensor:
        """Compute the terms, summed over the nuisances."""
        quality, apart = batch.outputs[:, 0], batch.outputs[:, 1:]
        quality_weights, *weights = batch.head.last.weight
        terms = [quality.new_zeros(())]
        for nuisance, own, weight in zip(batch.nuisances.unbind(1), apart.unbind(1), weights, strict=True):
            terms.append(self.weight * odin_correlations(nuisance, own, quality))
            terms.append(self.orthogonality * (weight @ quality_weights).abs())
        return torch.stack(terms).sum()


def odin_correlations(nuisance: Tensor, own: Tensor, quality: Tensor) -> Tensor:
    """Compute 1 - rho(nuisance, own) + |rho(nuisance, quality)| of values (N,)."""
    return 1 - correlation(nuisance, own) + correlation(nuisance, quality).abs()


def correlation(left: Tensor, right: Tensor) -> Tensor:
    """Compute Pearson's correlation () of values (N,), differentiably; 0 where one of them is constant."""
    left, right = left - left.mean(), right - right.mean()
    scale = (left.square().sum() * right.square().sum()).clamp(min=1e-24).sqrt()
    return (left * right).sum() / scale
