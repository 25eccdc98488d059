"""Recipes that learn from final samples and their scores alone: regression, preferences, rankings and groups.

They sample by the ODE, and need nothing of the sampler. The module ``recipes`` has the other matching methods, such as
``dragon`` and ``nft``.
"""

from __future__ import annotations

from dataclasses import replace

from genalign.algorithms.credit import (
    BestAndWorst,
    BestOnly,
    DrawnPreference,
    ExponentialWeights,
    GroupRelative,
    HierarchicalPairs,
    PlainReward,
    Thresholded,
)
from genalign.algorithms.group_losses import (
    CentredRewardLoss,
    GroupPreferenceLoss,
    RankedPreferenceLoss,
    ReferencePreferenceLoss,
)
from genalign.algorithms.matching import MatchingObjective
from genalign.algorithms.matching_losses import DPOLoss, KTOLoss, RewardWeightedLoss
from genalign.algorithms.recipe import Lag, Recipe
from genalign.algorithms.recipes import matching


def sft(count: int = 1, draws: int = 2, anchor: float = 0.0) -> Recipe:
    """Supervised fine-tuning on the best samples of each prompt: rejection sampling, or best-of-n distillation.

    Args:
        count: The number of best samples of a prompt.
        draws: The number of noise levels per sample and update.
        anchor: The weight of the distance from the reference policy.
    """
    return matching(BestOnly(count), MatchingObjective(RewardWeightedLoss(), draws, anchor=anchor))


def rwr(temperature: float = 1.0, draws: int = 2, anchor: float = 0.0) -> Recipe:
    """Flow-RWR (arXiv 2501.13918): reward-weighted regression, with weights exp(reward / temperature) in the group.

    The paper normalizes the weights so; a public code takes the reward itself, which may be negative.

    Args:
        temperature: In units of the reward.
        draws: The number of noise levels per sample and update.
        anchor: The weight of the distance from the reference policy.
    """
    return matching(ExponentialWeights(temperature), MatchingObjective(RewardWeightedLoss(), draws, anchor=anchor))


def dpo(
    beta: float = 100.0,
    draws: int = 2,
    tolerance: float = 0.0,
    pairs: int = 1,
    sft: float = 0.0,
    anchor: float = 0.0,
    low: float = 0.02,
) -> Recipe:
    """Diffusion-DPO (arXiv 2311.12908), and Flow-DPO with a constant beta (2501.13918): the best against the worst.

    Args:
        beta: The strength.
        draws: The number of noise levels per sample and update.
        tolerance: The largest reward difference at which a pair counts as tied and is left out.
        pairs: The number of pairs per prompt: the best and the worst, the second best and the second worst, ...
        sft: The weight of the winner's error, which keeps the policy near what won (arXiv 2405.16436).
        anchor: The weight of the distance from the reference policy.
        low: The lowest noise level, as a fraction of the path's range.
    """
    objective = MatchingObjective(DPOLoss(beta, sft=sft), draws, low, anchor=anchor)
    return matching(BestAndWorst(tolerance, pairs), objective)


def kto(threshold: float, beta: float = 100.0, draws: int = 2, anchor: float = 0.0) -> Recipe:
    """Diffusion-KTO (arXiv 2404.04465): samples of a score of at least ``threshold`` against the others, without pairs.

    Args:
        threshold: The least weighted sum of the rewards of a desirable sample.
        beta: The strength.
        draws: The number of noise levels per sample and update.
        anchor: The weight of the distance from the reference policy.
    """
    return matching(Thresholded(threshold), MatchingObjective(KTOLoss(beta), draws, anchor=anchor))


def gdro(
    beta: float = 100.0, temperature: float = 0.05, sft: float = 1.0, draws: int = 2, anchor: float = 0.0
) -> Recipe:
    """GDRO (arXiv 2601.02036): a likelihood of the ranking of all samples of a prompt.

    Rewards should vary by about 1: put them into ``rewards.combine.Standardized`` otherwise.

    Args:
        beta: The strength; of another convention than the published values, and to be tuned.
        temperature: In units of the reward: how much more the best of the samples left counts than the others.
        sft: The weight of the error of the best sample, without which the policy collapses.
        draws: The number of noise levels per sample and update.
        anchor: The weight of the distance from the reference policy.
    """
    return matching(
        PlainReward(), MatchingObjective(RankedPreferenceLoss(beta, temperature, sft), draws, anchor=anchor)
    )


def dp2o_sr(count: int = 4, beta: float = 100.0, draws: int = 2, anchor: float = 0.0) -> Recipe:
    """DP2O-SR's weighted pairs (arXiv 2510.18851): each of the best samples of a prompt against each of the worst.

    Pairs count by their lead, and prompts by the spread of their samples. The conditioning on an image that the paper
    trains is that of its pipeline, and not part of the method.

    Args:
        count: The number of best, and of worst, samples of a prompt.
        beta: The strength.
        draws: The number of noise levels per sample and update.
        anchor: The weight of the distance from the reference policy.
    """
    loss = DPOLoss(beta, pairs="all", weighted=True)
    return matching(HierarchicalPairs(count), MatchingObjective(loss, draws, anchor=anchor))


def rpo(
    reference: str = "preference", beta: float = 1.0, draws: int = 2, sft: float = 1.0, anchor: float = 0.0
) -> Recipe:
    """RPO (arXiv 2407.12164): subject-driven tuning on pairs of a reference image and a generated one.

    Which of the two is preferred is drawn anew in every round, by their reward. Its regularizer is to stop early, by
    the similarity to the references on held-out prompts: the best weights of a run are kept so.

    Args:
        reference: The name of the score that is 1 for reference images, of weight 0; as ``genalign collect`` names it.
        beta: The strength.
        draws: The number of noise levels per sample and update.
        sft: The weight of the reference image's error.
        anchor: The weight of the distance from the reference policy.
    """
    loss = ReferencePreferenceLoss(beta, sft)
    return matching(DrawnPreference(reference), MatchingObjective(loss, draws, anchor=anchor))


def crd(
    beta: float = 1.0,
    draws: int = 2,
    anchor: float = 0.1,
    anchor_guidance: float = 1.0,
    temperature: float | None = None,
    centred: bool = True,
) -> Recipe:
    """Centred reward distillation (CRD, arXiv 2603.14128): gains regress on advantages, both less their group's mean.

    The gains are over a copy of the weights that trails by a quarter and more; from round 75 on the sampling weights
    lag, too. The anchor to the (guided) reference policy is weaker for samples of low reward.

    Args:
        beta: The scale of the gains.
        draws: The number of noise levels per sample and update.
        anchor: The weight of the distance from the reference policy.
        anchor_guidance: The guidance scale of that policy; the published one is 4.5, the model's own.
        temperature: With one, centres are weighted towards good and towards bad samples; None is the plain mean.
        centred: Whether gains lose their group's mean; without that it is a plain regression, the method's ablation.
    """
    least = min(1.0, 1e-4 / anchor) if anchor else None
    objective = MatchingObjective(
        CentredRewardLoss(beta, temperature, centred),
        draws,
        anchor=anchor,
        old="memory",
        anchor_guidance=anchor_guidance,
        anchor_least=least,
    )
    recipe = matching(GroupRelative("global"), objective, Lag(slope=0.0075, limit=0.999, start=75))
    return replace(recipe, memory=Lag(slope=0.005, limit=0.999, first=0.25))


def dgpo(beta: float = 100.0, clip_range: float = 1e-2, draws: int = 2, anchor: float = 0.02) -> Recipe:
    """DGPO (arXiv 2510.08425): errors weighted by advantages, and by how little the group is ranked yet.

    Args:
        beta: The strength.
        clip_range: The clip range of the ratio to a copy of the weights that trails slowly.
        draws: The number of noise levels per sample and update.
        anchor: The weight of the distance from the reference policy.
    """
    objective = MatchingObjective(GroupPreferenceLoss(beta, clip_range), draws, anchor=anchor, old="memory")
    return replace(matching(GroupRelative("group"), objective), memory=Lag(slope=0.001, limit=0.3))
