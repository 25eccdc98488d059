"""Losses of a discriminator on pairs of a reference and a generated sample."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

LossName = Literal["hinge", "bce", "bt_pairwise"]


def adversarial_loss(name: LossName, real: Tensor, fake: Tensor) -> Tensor:
    """The loss of each pair of logits, elementwise, for ``real`` and ``fake`` of one shape.

    "hinge": relu(1 - real) + relu(1 + fake) (Adv-GRPO, eqs. 12-14). "bce": -log sigmoid(real) - log(1 -
    sigmoid(fake)) (eq. 6). "bt_pairwise": -log sigmoid(real - fake), Bradley-Terry on pairs of one prompt.
    """
    _require_pairs(real, fake)
    match name:
        case "hinge":
            return F.relu(1 - real) + F.relu(1 + fake)
        case "bce":
            return F.softplus(-real) + F.softplus(fake)
        case "bt_pairwise":
            return F.softplus(fake - real)


def pair_accuracy(name: LossName, real: Tensor, fake: Tensor) -> Tensor:
    """How right the scores of each pair are, elementwise in [0, 1]; a tie is wrong.

    For "bt_pairwise" whether real > fake, for the others the mean of real > 0 and fake < 0.
    """
    _require_pairs(real, fake)
    if name == "bt_pairwise":
        return (real > fake).float()
    return ((real > 0).float() + (fake < 0).float()) / 2


def _require_pairs(real: Tensor, fake: Tensor) -> None:
    if real.shape != fake.shape:
        raise ValueError(f"logits come in pairs: real is {tuple(real.shape)}, fake is {tuple(fake.shape)}")
