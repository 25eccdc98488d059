"""Balancing the gradients of several rewards during training, see ``genalign.algorithms.gradient_balance``.

B samples, S stored steps, K rewards of non-zero weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from genalign.algorithms.advantages import UnsuitableScoresError
from genalign.algorithms.gradient_balance import MOST_REWARDS, Direction, GradientBalance
from genalign.algorithms.interfaces import Credit, Objective, RoundScores
from genalign.diffusion.policy import Policy
from genalign.runtime.state import State
from genalign.scoring.score import NamedReward


def credit_by_reward(credit: Credit, scores: RoundScores) -> Tensor:
    """Compute the credit by each of K rewards of non-zero weight separately, (B, K) or (B, S, K).

    Only the signs of the weights count. Raises ValueError for a credit that needs several rewards at once.
    """
    alone = []
    for column, weight in enumerate(scores.weights):
        if not weight:
            continue
        stepwise = None if scores.stepwise is None else scores.stepwise[..., [column]]
        table, names = scores.scores[:, [column]], scores.names[column : column + 1]
        weights = (math.copysign(1.0, weight),)
        try:
            alone.append(credit(replace(scores, scores=table, weights=weights, stepwise=stepwise, names=names)))
        except UnsuitableScoresError:
            raise
        except ValueError as error:
            raise ValueError(
                f"with_gradient_balance computes the credit by each reward separately, which {type(credit).__name__}"
                f" refuses ({error}): choose a credit such as GroupRelative, or leave the balance out"
            ) from error
    return torch.stack(alone, -1)


class BalancedGradients:
    """The weights that balance the gradients of a run's rewards; the same on all ranks.

    Args:
        settings: When the weights are computed, and how they are averaged.
        rewards: The rewards of the run. Only the signs of their weights matter, and whether they are 0.
        objective: The objective.
        policy: The policy.

    Raises:
        ValueError: There are too few or too many rewards, the objective compares samples by the order of their credit,
            or the network is sharded.
    """

    def __init__(
        self, settings: GradientBalance, rewards: Sequence[NamedReward], objective: Objective, policy: Policy
    ) -> None:
        self.settings, self.policy = settings, policy
        self.names = [reward.name for reward in rewards if reward.weight]
        count = len(self.names)
        if not 2 <= count <= MOST_REWARDS:
            raise ValueError(f"a balance of rewards needs 2 to {MOST_REWARDS} of non-zero weight, not {count}")
        if objective.unit != "sample":
            raise ValueError(
                f"a balance of rewards sums their credits, which this recipe's loss over a whole {objective.unit}"
                " does not allow: choose a recipe such as flow_grpo, nft or awm"
            )
        if policy.sharded:
            raise ValueError("a balance of rewards needs whole gradients on every rank: train without FSDP")
        self.weights = torch.full((count,), 1 / count, dtype=torch.float64)
        self.least_cosine: float | None = None

    def gradients(self) -> list[Tensor]:
        """Take the policy's gradients, summed over ranks, and clear them; 0 where there are none."""
        own = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.policy.parameters]
        for parameter in self.policy.parameters:
            parameter.grad = None
        return [gradient.detach() for gradient in own]

    def solve(self, gradients: Sequence[Sequence[Tensor]]) -> Tensor:
        """Update the averaged weights from the gradients of K rewards; return the factors (K,) of their credits.

        Without finite, non-zero gradients the weights are unchanged, and are the factors.
        """
        gram = torch.zeros(len(gradients), len(gradients), dtype=torch.float64)
        for tensors in zip(*gradients, strict=True):
            rows = torch.stack([tensor.flatten() for tensor in tensors]).double()
            gram += (rows @ rows.T).cpu()
        direction = Direction.of(gram)
        if direction is None:
            return self.weights
        decay = self.settings.decay
        self.weights = decay * self.weights + (1 - decay) * direction.weights
        self.least_cosine = direction.least_cosine
        return direction.factors

    def metrics(self) -> dict[str, float]:
        """Return the averaged weights, and the smallest cosine of a gradient with the latest direction, for the log."""
        weights = {f"balance/{name}": weight for name, weight in zip(self.names, self.weights.tolist(), strict=True)}
        return weights if self.least_cosine is None else weights | {"balance/least_cosine": self.least_cosine}

    def state(self) -> State:
        """Return the averaged weights (K,), and the latest cosine."""
        return State({"weights": self.weights}, {"least_cosine": self.least_cosine})

    def restore(self, state: State) -> None:
        """Restore the averaged weights."""
        self.weights, self.least_cosine = state.tensors["weights"], state.numbers["least_cosine"]
