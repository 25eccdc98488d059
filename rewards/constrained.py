"""A sum of rewards, each wanted up to a limit: rewards as constraints with Lagrange multipliers (arXiv 2310.04373)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from genalign.scoring.score import group_reward, require_gradient
from genalign.types import AnyCallable, Prompt
from rewards.adversarial.replay_buffer import sum_over_ranks


def moved_multipliers(multipliers: Tensor, means: Tensor, limits: Tensor, learning_rate: float) -> Tensor:
    """Move the multipliers (K,) by gradient descent after a round: down where a reward is above its limit.

    A reward's weight is w = sigmoid(lambda), and lambda <- lambda - learning_rate w (1 - w) (mean - limit), in the form
    of the published code without its momentum. A mean of NaN, of a reward that scored nothing, moves nothing.

    Args:
        multipliers: The multipliers lambda (K,).
        means: The mean scores (K,) of a round.
        limits: The limits (K,).
        learning_rate: The step size.

    Returns:
        The multipliers (K,), float64.
    """
    weights = multipliers.double().sigmoid()
    step = weights * (1 - weights) * (means.double() - limits.double())
    return multipliers.double() - learning_rate * step.nan_to_num(0.0)


@dataclass(eq=False)
class Constrained:
    """A ``TrainableReward``: the sum of w_k r_k, in which a reward beyond its limit loses weight (arXiv 2310.04373).

    A limit is where a reward stops being useful, such as its mean on base samples plus a standard deviation: beyond it
    more of the reward is more likely an exploit of it than better samples. All weights begin at 1/2. ``update``, after
    every round, scores the round's samples once more; all ranks make the same update.

    Args:
        rewards: The rewards, by name.
        limits: The limit of each reward, by the same names.
        learning_rate: Step size of the multipliers. The published value is 0.01; the default suits shorter runs.
        batch_size: The largest number of samples that ``update`` scores at once.

    Raises:
        ValueError: A reward has no limit, or a limit no reward, or a reward compares the samples of a group.
    """

    rewards: dict[str, AnyCallable]
    limits: dict[str, float]
    learning_rate: float = 0.1
    batch_size: int = 96
    multipliers: Tensor = field(init=False)

    def __post_init__(self) -> None:
        rewards, limits = self.rewards, self.limits
        if not rewards:
            raise ValueError("there are no rewards to constrain: give at least one")
        for name in rewards:
            if name not in limits:
                raise ValueError(f"reward {name!r} has no limit: give limits.{name}, from which on it loses weight")
        if unknown := limits.keys() - rewards.keys():
            raise ValueError(f"limits of {', '.join(sorted(unknown))} belong to no reward: name them as rewards, too")
        if grouped := group_reward(rewards):
            raise ValueError(
                f"reward {grouped!r} compares the samples of a prompt with each other, which update would split: make"
                " it a reward of its own"
            )
        if not self.learning_rate > 0 or self.batch_size < 1:
            raise ValueError(
                "learning_rate must be positive and batch_size at least 1, not"
                f" {self.learning_rate} and {self.batch_size}"
            )
        self.multipliers = torch.zeros(len(rewards), dtype=torch.float64)

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each reward in the sum."""
        return dict(zip(self.rewards, self.multipliers.sigmoid().tolist(), strict=True))

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Score samples as (B,), with a gradient where all rewards have one; NaN where a reward has no score."""
        scores = self._scores(samples, prompts)
        total: Tensor = scores.double() @ self.multipliers.sigmoid().to(scores.device)
        return total.float()

    @torch.no_grad()
    def update(self, samples: Tensor, prompts: Sequence[Prompt], rows: Sequence[int]) -> dict[str, float]:
        """Move the weights by the mean scores of the round, without samples that have none; return both, by reward.

        ``prompts`` are those of the samples of all ranks, of which this rank has the numbers ``rows``.
        """
        own, sums = [prompts[row] for row in rows], torch.zeros(2, len(self.rewards), dtype=torch.float64)
        for start in range(0, len(samples), self.batch_size):
            part = slice(start, start + self.batch_size)
            scores = self._scores(samples[part], own[part]).double().cpu()
            sums += torch.stack([scores.nansum(0), (~scores.isnan()).sum(0)])
        sum_over_ranks([sums])
        means = sums[0] / sums[1]
        limits = torch.tensor([self.limits[name] for name in self.rewards], dtype=torch.float64)
        self.multipliers = moved_multipliers(self.multipliers, means, limits, self.learning_rate)
        named = zip(self.rewards, means.tolist(), strict=True)
        return {f"mean.{name}": mean for name, mean in named} | {
            f"weight.{name}": weight for name, weight in self.weights.items()
        }

    def tensors(self) -> dict[str, Tensor]:
        """Return the multipliers (K,) for a checkpoint."""
        return {"multipliers": self.multipliers}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore a result of ``tensors()``. Raises ValueError for another number of rewards."""
        if tensors["multipliers"].shape != self.multipliers.shape:
            raise ValueError("this checkpoint is of other constrained rewards: use the rewards that the run began with")
        self.multipliers = tensors["multipliers"].double().cpu()

    def _scores(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Score samples by all rewards as (B, K), float32 on the samples' device.

        Raises ValueError, by name, for a reward without a gradient where the samples have one.
        """
        columns = [require_gradient(one, samples, one(samples, prompts)) for one in self.rewards.values()]
        return torch.stack([column.to(samples.device).float() for column in columns], 1)
