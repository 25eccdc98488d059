"""Recipes that learn only from final samples and their scores: regression, preferences, rankings and groups.

They sample with the ODE, and store none of its steps. The module ``recipes`` has the other matching methods, such as
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
    CenteredRewardLoss,
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

    The paper normalizes the weights this way; a public implementation uses the reward itself, which may be negative.

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
        sft: The weight of the winner's error, which keeps the policy near the winners (arXiv 2405.16436).
        anchor: The weight of the distance from the reference policy.
        low: The lowest noise level, as a fraction of the path's range.
    """
    objective = MatchingObjective(DPOLoss(beta, sft=sft), draws, low, anchor=anchor)
    return matching(BestAndWorst(tolerance, pairs), objective)


def kto(threshold: float, beta: float = 100.0, draws: int = 2, anchor: float = 0.0) -> Recipe:
    """Diffusion-KTO (arXiv 2404.04465): samples that score at least ``threshold`` against the others, without pairs.

    Args:
        threshold: The lowest weighted sum of the rewards of a desirable sample.
        beta: The strength.
        draws: The number of noise levels per sample and update.
        anchor: The weight of the distance from the reference policy.
    """
    return matching(Thresholded(threshold), MatchingObjective(KTOLoss(beta), draws, anchor=anchor))


def gdro(
    beta: float = 100.0, temperature: float = 0.05, sft: float = 1.0, draws: int = 2, anchor: float = 0.0
) -> Recipe:
    """GDRO (arXiv 2601.02036): a likelihood of the ranking of all samples of a prompt.

    Rewards should vary by about 1: otherwise wrap them in ``rewards.combine.Standardized``.

    Args:
        beta: The strength; its convention differs from the published values, so tune it.
        temperature: In units of the reward: the lower it is, the more the best of the remaining samples counts.
        sft: The weight of the error of the best sample, without which the policy collapses.
        draws: The number of noise levels per sample and update.
        anchor: The weight of the distance from the reference policy.
    """
    return matching(
        PlainReward(), MatchingObjective(RankedPreferenceLoss(beta, temperature, sft), draws, anchor=anchor)
    )


def dp2o_sr(count: int = 4, beta: float = 100.0, draws: int = 2, anchor: float = 0.0) -> Recipe:
    """DP2O-SR's weighted pairs (arXiv 2510.18851): each of the best samples of a prompt against each of the worst.

    Pairs are weighted by their lead, and prompts by the spread of their scores. The paper's conditioning on an image
    belongs to its pipeline and not to the method.

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

    Each round draws which of the two is preferred, by their rewards. The method is regularized by early stopping on the
    similarity to the references on held-out prompts, by which the best weights of a run are kept.

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
    centered: bool = True,
) -> Recipe:
    """Centered reward distillation (CRD, arXiv 2603.14128): regresses gains on advantages, both centered in the group.

    The gains are over a copy of the weights that keeps a quarter or more of its old value each round; from round 75 on
    the sampling weights lag, too. The anchor to the (guided) reference policy is weaker for samples of low reward.

    Args:
        beta: The scale of the gains.
        draws: The number of noise levels per sample and update.
        anchor: The weight of the distance from the reference policy.
        anchor_guidance: The guidance scale of that policy; 4.5, the default of the model, is published.
        temperature: If set, the centers are weighted towards good and towards bad samples; None takes the plain mean.
        centered: Whether gains are centered in the group; without it, a plain regression, which is the ablation.
    """
    least = min(1.0, 1e-4 / anchor) if anchor else None
    objective = MatchingObjective(
        CenteredRewardLoss(beta, temperature, centered),
        draws,
        anchor=anchor,
        old="memory",
        anchor_guidance=anchor_guidance,
        anchor_least=least,
    )
    recipe = matching(GroupRelative("global"), objective, Lag(slope=0.0075, limit=0.999, start=75))
    return replace(recipe, memory=Lag(slope=0.005, limit=0.999, first=0.25))


def dgpo(beta: float = 100.0, clip_range: float = 1e-2, draws: int = 2, anchor: float = 0.02) -> Recipe:
    """DGPO (arXiv 2510.08425): errors weighted by advantages, and by how poorly the group is ranked so far.

    Args:
        beta: The strength.
        clip_range: The clip range of the ratio to a copy of the weights that trails slowly.
        draws: The number of noise levels per sample and update.
        anchor: The weight of the distance from the reference policy.
    """
    objective = MatchingObjective(GroupPreferenceLoss(beta, clip_range), draws, anchor=anchor, old="memory")
    return replace(matching(GroupRelative("group"), objective), memory=Lag(slope=0.001, limit=0.3))
