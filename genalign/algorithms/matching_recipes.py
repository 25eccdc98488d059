"""Recipes of the matching family: losses on the errors of noised final samples, which any sampler may have drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from genalign.algorithms.advantages import Std
from genalign.algorithms.credit import BestAndWorst, GroupRelative, SetContrast
from genalign.algorithms.interfaces import Credit
from genalign.algorithms.matching import MatchingLoss, MatchingObjective
from genalign.algorithms.matching_losses import AWMLoss, DPOLoss, KTOLoss, NFTLoss
from genalign.algorithms.preference_pairs import Criterion
from genalign.algorithms.recipes import Lag, Recipe
from genalign.algorithms.step_schedules import NoSteps
from genalign.diffusion.transitions import ODE
from genalign.types import AnyCallable

PreferenceLoss = Literal["dpo", "kto"]
_PREFERENCE_LOSSES: dict[str, Callable[[float], MatchingLoss]] = {"dpo": DPOLoss, "kto": KTOLoss}


def matching(credit: Credit, objective: MatchingObjective, lag: Lag | None = None) -> Recipe:
    """Compose a matching recipe: ODE samples, each from its own initial noise, and a loss on their noised versions."""
    return Recipe(ODE(), NoSteps(), shared_noise=False, credit=credit, objective=objective, lag=lag)


def dragon(
    loss: PreferenceLoss = "dpo",
    beta: float = 100.0,
    draws: int = 2,
    tolerance: float = 0.0,
    pairs: int = 1,
    anchor: float = 0.0,
    low: float = 0.02,
) -> Recipe:
    """DRAGON (arXiv 2504.15217) for rewards of single samples: the best sample of each prompt against the worst.

    With the loss "dpo" this is online Diffusion-DPO. Use it for rewards that only rank samples, or for samplers without
    densities.

    Args:
        loss: "dpo" for Diffusion-DPO on pairs, "kto" for Diffusion-KTO on single samples.
        beta: The strength of the loss.
        draws: The number of noise levels per sample and update.
        tolerance: The largest reward difference at which a pair counts as tied and is left out.
        pairs: The number of pairs per prompt: the best and the worst, the second best and the second worst, ...
        anchor: The weight of the distance from the reference policy.
        low: The lowest noise level, as a fraction of the path's range. High levels decide the content of a sample.
    """
    objective = MatchingObjective(_PREFERENCE_LOSSES[loss](beta), draws, low, anchor=anchor)
    return matching(BestAndWorst(tolerance, pairs), objective)


def dragon_set(
    reward: AnyCallable,
    features: AnyCallable,
    criterion: Criterion = "plus",
    quality: float = 0.0,
    loss: PreferenceLoss = "dpo",
    beta: float = 100.0,
    draws: int = 2,
    anchor: float = 0.0,
) -> Recipe:
    """DRAGON (arXiv 2504.15217) for rewards of whole sets, such as a Frechet distance or the Vendi score.

    Two sets of a round's samples swap members until their rewards differ. Use it to match a distribution, or to raise
    diversity.

    Args:
        reward: The ``SetReward`` of features (n, d).
        features: The ``FeatureFunction`` of samples (B, ...).
        criterion: The quantity that a swap must raise, see ``preference_pairs.greedy_swap``.
        quality: The weight of the rewards of single samples.
        loss: "dpo" for Diffusion-DPO on pairs, "kto" for Diffusion-KTO on single samples.
        beta: The strength of the loss.
        draws: The number of noise levels per sample and update.
        anchor: The weight of the distance from the reference policy.
    """
    objective = MatchingObjective(_PREFERENCE_LOSSES[loss](beta), draws, anchor=anchor)
    return replace(matching(SetContrast(reward, criterion, quality=quality), objective), features=features)


def nft(
    beta: float = 1.0,
    draws: int = 2,
    anchor: float = 1e-4,
    std: Std = "global",
    lag: Lag = Lag(),  # noqa: B008  # frozen
) -> Recipe:
    """DiffusionNFT (arXiv 2509.16117, eq. 5), with a sampling policy that lags behind the trained one.

    Use it for fast training with any sampler: no step is stored or replayed.

    Args:
        beta: The guidance strength.
        draws: The number of noise levels per sample and update.
        anchor: The weight of the distance from the reference policy.
        std: Whether advantages are divided by the "group" or the "global" standard deviation.
        lag: The lag of the sampling weights.
    """
    return matching(GroupRelative(std), MatchingObjective(NFTLoss(beta), draws, anchor=anchor, old=True), lag)


def awm(draws: int = 2, anchor: float = 1e-3, std: Std = "global") -> Recipe:
    """Advantage-weighted matching (arXiv 2509.25050): the flow-matching loss weighted by advantages.

    Use it as the simplest policy gradient without densities. The paper's second anchor, to an average of the weights,
    is not implemented. The arguments are those of ``nft``.
    """
    return matching(GroupRelative(std), MatchingObjective(AWMLoss(), draws, anchor=anchor))
