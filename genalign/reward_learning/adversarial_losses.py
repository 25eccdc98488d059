"""Losses of a reward that learns to tell references from generated samples, and the penalty on its gradient."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

LossName = Literal["hinge", "bt_pairwise"]
"""A loss on pairs of the logits of a reference and of a generated sample."""


def adversarial_loss(name: LossName, real: Tensor, fake: Tensor) -> Tensor:
    """Compute the loss of each pair of logits, elementwise, for ``real`` and ``fake`` of one shape.

    "hinge": relu(1 - real) + relu(1 + fake) (Adv-GRPO, eqs. 12-14). "bt_pairwise": -log sigmoid(real - fake),
    Bradley-Terry on pairs of one prompt.
    """
    if real.shape != fake.shape:
        raise ValueError(f"logits come in pairs: real is {tuple(real.shape)}, fake is {tuple(fake.shape)}")
    return F.relu(1 - real) + F.relu(1 + fake) if name == "hinge" else F.softplus(fake - real)


def pair_accuracy(name: LossName, real: Tensor, fake: Tensor) -> Tensor:
    """Compute the accuracy of each pair's scores, elementwise in [0, 1]; a tie is wrong.

    For "bt_pairwise" it is whether real > fake, for "hinge" the mean of real > 0 and fake < 0.
    """
    if name == "bt_pairwise":
        return (real > fake).float()
    return ((real > 0).float() + (fake < 0).float()) / 2


def between_pairs(real: Tensor, fake: Tensor, shares: Tensor) -> Tensor:
    """Mix inputs (b, ...) of each pair as share * real + (1 - share) * fake, as a leaf that requires a gradient.

    Args:
        real: Inputs of the references.
        fake: Inputs of the generated samples.
        shares: Shares (b,) in [0, 1].

    Raises:
        ValueError: The two have different shapes.
    """
    if real.shape != fake.shape:
        raise ValueError(
            f"the gradient penalty takes points between references {tuple(real.shape[1:])} and samples"
            f" {tuple(fake.shape[1:])}: give the references the size of the samples"
        )
    share = shares.to(real).view(-1, *[1] * (real.ndim - 1))
    return (share * real + (1 - share) * fake).detach().requires_grad_(True)


def gradient_norms(logits: Tensor, inputs: Tensor) -> Tensor:
    """Compute the norm of the gradient of each of the logits (...) for its own inputs (..., *), differentiably.

    ``inputs`` have the dimensions of ``logits`` first, and a logit depends on its own inputs alone.
    Raises ValueError for logits that do not depend on the inputs differentiably.
    """
    (gradient,) = torch.autograd.grad(logits.sum(), inputs, create_graph=True, allow_unused=True)
    if gradient is None:
        raise ValueError("the scorer is not differentiable in its samples: set gradient_penalty to 0")
    norms: Tensor = gradient.flatten(logits.ndim).norm(dim=-1)
    return norms
