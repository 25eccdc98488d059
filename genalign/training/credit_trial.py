"""A trial run of a recipe's credit on random scores, before anything is sampled."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from genalign.algorithms.advantages import SmallGroupsError, UnsuitableScoresError
from genalign.algorithms.interfaces import RoundScores
from genalign.algorithms.recipe import Recipe
from genalign.scoring.score import NamedReward, parts
from genalign.training.balanced_gradients import credit_by_reward
from genalign.types import SaturatingReward

logger = logging.getLogger(__name__)

_SHRUNK = 0.01  # of the spread of the scores: well above the epsilon of the standard deviations


def try_credit(recipe: Recipe, rewards: Sequence[NamedReward], prompts: int, group_size: int, steps: int) -> None:
    """Compute the credit of a round of random scores in [0, 1], to raise errors now instead of after the first round.

    Log a warning if the credit undoes a saturating reward (``types.SaturatingReward``): if the scores of a group differ
    a hundredth as much, but their credit nearly as much as before. A recipe with features is not tried, as its credit
    depends on their values.

    Args:
        recipe: The method.
        rewards: The rewards, which are not called.
        prompts: The number of prompts of a round.
        group_size: The number of samples of each.
        steps: The number of stored steps.

    Raises:
        ValueError: The credit does not fit the rewards, or the recipe.
    """
    if recipe.features is not None:
        return
    generator, count = torch.Generator().manual_seed(0), prompts * group_size
    values = torch.rand(count, steps + 1, len(rewards), generator=generator)
    scores = RoundScores(
        values[:, -1],
        tuple(reward.weight for reward in rewards),
        torch.arange(prompts).repeat_interleave(group_size),
        values if recipe.completion else None,
        names=tuple(reward.name for reward in rewards),
    )
    try:
        credit = recipe.credit(scores)
        if recipe.balance and any(scores.weights):
            credit_by_reward(recipe.credit, scores)
    except SmallGroupsError:
        raise
    except UnsuitableScoresError:  # made for another range of scores, which the first round checks
        return

    saturating = [
        (reward.name, type(part).__name__)
        for reward in rewards
        if reward.weight
        for _, part in parts(reward.function)
        if isinstance(part, SaturatingReward)
    ]
    if not saturating:
        return
    shrunk = 0.5 + _SHRUNK * (values - 0.5)
    faded = recipe.credit(replace(scores, scores=shrunk[:, -1], stepwise=shrunk if recipe.completion else None))
    if _spread(faded, prompts) > 0.5 * _spread(credit, prompts):
        name, kind = saturating[0]
        logger.warning(
            "reward %r saturates (%s), but the credit %s normalizes its differences to full size, however small they"
            " are: use genalign.algorithms.credit.LeaveOneOut, whose advantages are in units of the score",
            name,
            kind,
            getattr(recipe.credit, "__qualname__", type(recipe.credit).__qualname__),
        )


def _spread(credit: Tensor, prompts: int) -> float:
    """Return the root mean square distance of credit (B,) or (B, S) from the mean of its group."""
    grouped = credit.double().reshape(prompts, len(credit) // prompts, -1)
    return float((grouped - grouped.mean(1, keepdim=True)).square().mean().sqrt())
