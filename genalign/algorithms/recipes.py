"""Recipes: named training methods, each a short composition of a kernel, a step schedule, a credit and an objective.

First come the recipes of the trajectory family, which learn from stored sampling steps, then those of the matching
family, which learn from final samples of any sampler. To read Flow-GRPO down to its formula, follow ``flow_grpo`` in
this module, ``PolicyGradient`` in ``trajectory``, ``clipped_surrogate`` in ``losses`` and ``FlowSDE`` in
``diffusion.transitions``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from genalign.algorithms.advantages import Std
from genalign.algorithms.credit import BestAndWorst, GroupRelative, PlainReward, SetContrast, VirtualBest
from genalign.algorithms.interfaces import Credit
from genalign.algorithms.losses import KLForm
from genalign.algorithms.matching import MatchingLoss, MatchingObjective
from genalign.algorithms.matching_losses import AWMLoss, DPOLoss, KTOLoss, NFTLoss
from genalign.algorithms.preference_pairs import Criterion
from genalign.algorithms.recipe import Lag, Recipe
from genalign.algorithms.step_credit import Reduction, RewardGain, TurningPoint, ValueAnchored
from genalign.algorithms.step_schedules import AllSteps, NoSteps, Pace, RandomWindow, SlidingWindow
from genalign.algorithms.trajectory import (
    ClippedSurrogate,
    CoupledObjective,
    GuardedSurrogate,
    MaskedSurrogate,
    PolicyGradient,
    PRDPLoss,
    noise_weighted,
)
from genalign.diffusion.completion import Completion
from genalign.diffusion.transitions import CPS, DDIM, ODE, Kernel
from genalign.types import AnyCallable

PreferenceLoss = Literal["dpo", "kto"]
_PREFERENCE_LOSSES: dict[str, Callable[[float], MatchingLoss]] = {"dpo": DPOLoss, "kto": KTOLoss}


def flow_grpo(
    kernel: Kernel | None = None,
    window: int | None = None,
    window_reach: float = 0.5,
    clip_range: float = 1e-4,
    kl: float = 0.0,
    kl_form: KLForm = "exact",
    std: Std = "group",
    shared_noise: bool = True,
) -> Recipe:
    """Flow-GRPO (arXiv 2505.05470, sections 4.1-4.2): PPO's clipped surrogate on SDE steps, with group advantages.

    The default choice: it is stable, works with any reward, and needs no gradient of the reward.

    Args:
        kernel: The stochastic sampler (eq. 9); None takes that of the model's path, see ``Recipe``.
        window: The number of consecutive steps to train per round, as in Flow-GRPO-Fast; None trains all steps.
        window_reach: The fraction of the grid in which the window may begin.
        clip_range: The clip range e of the ratio of new to old density.
        kl: The weight of the distance from the reference policy, which limits reward hacking.
        kl_form: The form of this distance, see ``losses.kl_penalty``.
        std: Whether advantages are divided by the "group" or, as in the published code, by the "global" standard
            deviation.
        shared_noise: Whether all samples of a group start from the same initial noise.
    """
    return Recipe(
        kernel=kernel,
        schedule=AllSteps() if window is None else RandomWindow(window, window_reach),
        shared_noise=shared_noise,
        credit=GroupRelative(std),
        objective=PolicyGradient(ClippedSurrogate(clip_range), kl, kl_form),
    )


def dense_grpo(
    kernel: Kernel | None = None,
    window: int | None = None,
    window_reach: float = 0.5,
    clip_range: float = 1e-4,
    kl: float = 0.0,
    completion_steps: int | None = None,
    floor: float = 0.01,
    shared_noise: bool = True,
) -> Recipe:
    """DenseGRPO (arXiv 2601.20218, section 4): Flow-GRPO with an advantage for each step.

    The gain of a step is the reward of the ODE completion of the latent after the step minus that of the latent before.
    Use it where the reward is cheap compared with the network, and one score per trajectory learns too slowly. The
    paper's calibrated noise is the kernel ``genalign.training.noise_calibration.calibrated``.

    Args:
        kernel: The stochastic sampler; None takes that of the model's path, see ``Recipe``.
        window: The number of consecutive steps to train per round; None trains all steps.
        window_reach: The fraction of the grid in which the window may begin.
        clip_range: The clip range of the ratio of new to old density.
        kl: The weight of the distance from the reference policy.
        completion_steps: ODE steps from each latent to its sample; None takes all remaining steps of the grid.
        floor: The lower bound of the standard deviation of a step's gains (not in the paper), see
            ``advantages.stepwise_advantages``.
        shared_noise: Whether all samples of a group start from the same initial noise.
    """
    base = flow_grpo(kernel, window, window_reach, clip_range, kl, shared_noise=shared_noise)
    return replace(base, credit=RewardGain(floor), completion=Completion(completion_steps))


def ngrpo(
    kernel: Kernel | None = None,
    window: int | None = None,
    window_reach: float = 0.5,
    best: float = 1.0,
    clip_range: float = 1e-4,
    kl: float = 0.0,
) -> Recipe:
    """NGRPO (arXiv 2509.18851): Flow-GRPO that also learns from groups whose samples all failed.

    Each group has an additional virtual sample with the best possible score, and ratios are clipped to
    [1 - 0.8 clip_range, 1 + 1.2 clip_range]. Use it with rewards that have few levels, for which many groups have equal
    scores. All samples of a failed group are pushed away, so watch the diversity of samples, or set ``kl``.

    Args:
        kernel: The stochastic sampler; None takes that of the model's path, see ``Recipe``.
        window: The number of consecutive steps to train per round; None trains all steps.
        window_reach: The fraction of the grid in which the window may begin.
        best: The best possible score, the largest weighted sum of the rewards.
        clip_range: The clip range of the ratio of new to old density, before the factors 0.8 and 1.2.
        kl: The weight of the distance from the reference policy.
    """
    base = flow_grpo(kernel, window, window_reach)
    objective = PolicyGradient(ClippedSurrogate((0.8 * clip_range, 1.2 * clip_range)), kl)
    return replace(base, credit=VirtualBest(best), objective=objective)


def vgpo(
    kernel: Kernel | None = None,
    window: int | None = None,
    window_reach: float = 0.5,
    clip_range: float = 1e-4,
    kl: float = 0.0,
    discount: float = 0.9,
    anchor: float = 0.0,
    reduction: Reduction = "sum",
) -> Recipe:
    """VGPO (arXiv 2512.12387, eq. 10-13): advantages from the values of steps, by one-step completions.

    This is our reimplementation without access to the paper: the weighting, discount and anchor may differ. The value
    of a step is the discounted sum of the rewards that follow it. Use it with non-negative rewards that score blurry
    samples well; it needs no NFE beyond Flow-GRPO's.

    Args:
        kernel: The stochastic sampler; None takes that of the model's path, see ``Recipe``.
        window: The number of consecutive steps to train per round; None trains all steps.
        window_reach: The fraction of the grid in which the window may begin.
        clip_range: The clip range of the ratio of new to old density.
        kl: The weight of the distance from the reference policy.
        discount: The discount of later rewards, see ``step_credit.ValueAnchored``.
        anchor: The weight of the absolute term, off by default: it has no expected gradient, see ``ValueAnchored``.
        reduction: "sum" for the discounted sum, "min" for the lowest of the rewards that follow.
    """
    base = flow_grpo(kernel, window, window_reach, clip_range, kl)
    return replace(base, credit=ValueAnchored(discount, anchor, reduction=reduction), completion=Completion(1))


def turning_point(
    kernel: Kernel | None = None,
    window: int | None = None,
    window_reach: float = 0.5,
    clip_range: float = 1e-4,
    kl: float = 0.0,
    completion_steps: int | None = None,
    floor: float = 0.01,
    balanced: bool = True,
) -> Recipe:
    """TurningPoint-GRPO (arXiv 2602.06422), as its launch script runs it: DenseGRPO that credits turning points.

    A step at which the reward's trend switches to its final direction is credited with the gain of the rest of the
    trajectory, all others with their own gain. Use it where the effect of a step shows later than in the next
    completion.

    Args:
        kernel: The stochastic sampler; None takes that of the model's path, see ``Recipe``.
        window: The number of consecutive steps to train per round; None trains all steps.
        window_reach: The fraction of the grid in which the window may begin.
        clip_range: The clip range of the ratio of new to old density.
        kl: The weight of the distance from the reference policy.
        completion_steps: ODE steps from each latent to its sample; None takes all remaining steps of the grid.
        floor: The lower bound of the standard deviation of a step's gains (not in the paper), see
            ``advantages.stepwise_advantages``.
        balanced: Whether equally many turning points of samples that gained and of samples that lost count, see
            ``step_credit.turning_gains``.
    """
    base = dense_grpo(kernel, window, window_reach, clip_range, kl, completion_steps, floor)
    return replace(base, credit=TurningPoint(balanced=balanced, floor=floor))


def flow_dppo(
    kernel: Kernel | None = None,
    window: int | None = None,
    window_reach: float = 0.5,
    limit: float = 1e-5,
    kl: float = 0.0,
    std: Std = "global",
) -> Recipe:
    """Flow-DPPO (arXiv 2606.11025): Flow-GRPO with a trust region in KL in place of the clip range.

    A transition further than the limit from the sampling policy is left out where its gradient would push it further
    away. Use it with several updates per round (``training.updates_per_round`` or ``training.epochs``): in the first
    update nothing has moved yet. The metric ``clip_fraction`` is the fraction of transitions beyond the limit.

    Args:
        kernel: The stochastic sampler; None takes that of the model's path, see ``Recipe``.
        window: The number of consecutive steps to train per round; None trains all steps.
        window_reach: The fraction of the grid in which the window may begin.
        limit: The limit of a transition's KL, a mean over dimensions.
        kl: The weight of the distance from the reference policy.
        std: Whether advantages are divided by the "group" or the "global" standard deviation.
    """
    base = flow_grpo(kernel, window, window_reach, std=std)
    return replace(base, objective=PolicyGradient(MaskedSurrogate(limit), kl))


def guard_grpo(
    kernel: Kernel | None = None,
    window: int | None = None,
    window_reach: float = 0.5,
    clip_range: float = 2e-6,
    std: Std = "group",
) -> Recipe:
    """GRPO-Guard (arXiv 2510.22319, eq. 8): Flow-GRPO with normalized log-ratios and equalized steps.

    Use it where Flow-GRPO over-optimizes: here one clip range suits both signs of the advantage and all steps.

    Args:
        kernel: The stochastic sampler; None takes that of the model's path, see ``Recipe``.
        window: The number of consecutive steps to train per round; None trains all steps.
        window_reach: The fraction of the grid in which the window may begin.
        clip_range: The clip range of the normalized ratio, smaller than Flow-GRPO's.
        std: Whether advantages are divided by the "group" or the "global" standard deviation.
    """
    base = flow_grpo(kernel, window, window_reach, std=std)
    return replace(base, objective=PolicyGradient(GuardedSurrogate(clip_range)))


def mix_grpo(
    kernel: Kernel | None = None,
    window: int = 4,
    rounds_each: int = 25,
    stride: int = 1,
    pace: Pace = "progressive",
    clip_range: float = 1e-4,
) -> Recipe:
    """MixGRPO (arXiv 2507.21802, section 3.3): Flow-GRPO with a window that slides from the first steps to the last.

    Use it to train few steps per round, starting with the early steps, which decide the composition.

    Args:
        kernel: The stochastic sampler within the window; None takes that of the model's path, see ``Recipe``.
        window: The number of consecutive steps to train per round.
        rounds_each: The number of rounds at each position of the window.
        stride: The number of steps between two positions.
        pace: How long the window stays: "progressive", "decay" or "exp_decay", see ``SlidingWindow``.
        clip_range: The clip range of the ratio of new to old density.
    """
    return replace(flow_grpo(kernel, clip_range=clip_range), schedule=SlidingWindow(window, rounds_each, stride, pace))


def tempflow_grpo(
    kernel: Kernel | None = None,
    clip_range: float = 1e-4,
    completion_steps: int | None = None,
    branching: bool = False,
) -> Recipe:
    """TempFlow-GRPO (arXiv 2508.04324): noise-aware weights of steps, on advantages per step or on branches.

    The weights (section 4.2, eq. 8) are a step's noise over the mean of all trainable steps: late steps, which change
    little, count less. Without ``branching`` every step is trained, with DenseGRPO's advantages. With it (section 4.1)
    each round draws one step: the samples of a group share an ODE trajectory up to it, where each draws its own noise;
    the ODE completes them, and the reward of the sample is the credit of that step. Then a round's weight scales its
    whole update, which a learning rate of "auto" undoes: set ``training.learning_rate`` to a number.

    Args:
        kernel: The stochastic sampler; None takes that of the model's path, see ``Recipe``.
        clip_range: The clip range of the ratio of new to old density.
        completion_steps: The number of steps by which a stored state is completed to a sample; None takes all remaining
            ones, as branches always do.
        branching: Whether to branch at one step per round instead of completing a state for every step.
    """
    if branching and completion_steps is not None:
        raise ValueError(
            "recipe.completion_steps has no effect with branching, which completes no stored states: leave it out"
        )
    base = (
        flow_grpo(kernel, window=1, window_reach=1.0, clip_range=clip_range)
        if branching
        else dense_grpo(kernel, clip_range=clip_range, completion_steps=completion_steps)
    )
    return replace(base, objective=PolicyGradient(ClippedSurrogate(clip_range), weights=noise_weighted))


def ddpo(eta: float = 1.0, clip_range: float = 1e-4, window: int | None = None, window_reach: float = 0.5) -> Recipe:
    """DDPO (arXiv 2305.13301, section 4.3): the clipped surrogate on DDIM steps, with separate noise for each sample.

    For diffusion models such as SD 1.5 and SDXL: it works with any path and prediction type.

    Args:
        eta: The stochasticity of DDIM, in [0, 1].
        clip_range: The clip range of the ratio of new to old density.
        window: The number of consecutive steps to train per round; None trains all steps.
        window_reach: The fraction of the grid in which the window may begin.
    """
    return flow_grpo(DDIM(eta), window, window_reach, clip_range, shared_noise=False)


def adv_grpo(
    kernel: Kernel = CPS(0.8),  # noqa: B008  # kernels are frozen
    window: int = 2,
    window_reach: float = 0.5,
    clip_range: float = 1e-5,
    std: Std = "global",
) -> Recipe:
    """Adv-GRPO (arXiv 2511.20256): Flow-GRPO of the generator, on two CPS steps per round.

    Use it with a discriminator from ``rewards.adversarial`` as a reward, which is trained after every round.

    Args:
        kernel: The stochastic sampler within the window.
        window: The number of consecutive steps to train per round.
        window_reach: The fraction of the grid in which the window may begin.
        clip_range: The clip range of the ratio of new to old density.
        std: Whether advantages are divided by the "group" or the "global" standard deviation.
    """
    return flow_grpo(kernel, window, window_reach, clip_range, std=std)


def prdp(
    kernel: Kernel | None = None,
    window: int | None = None,
    window_reach: float = 0.5,
    beta: float = 3e-5,
    clip_range: float = 1e-4,
    steps: Literal["mean", "sum"] = "mean",
    shared_noise: bool = True,
) -> Recipe:
    """PRDP (arXiv 2402.08714, eq. 14-21): regression of log-ratio differences on reward differences.

    Every pair of a prompt's samples takes part. Use it for large prompt sets, where policy gradients are unstable.

    Args:
        kernel: The stochastic sampler; None takes that of the model's path, see ``Recipe``.
        window: The number of consecutive steps to train per round; None trains all steps.
        window_reach: The fraction of the grid in which the window may begin.
        beta: The strength of the KL constraint to the reference policy.
        clip_range: The range of a step's log-ratio around the log-ratio of the sampling policy.
        steps: The reduction of log-ratios over steps, see ``trajectory.PRDPLoss``.
        shared_noise: Whether all samples of a group start from the same initial noise.
    """
    base = flow_grpo(kernel, window, window_reach, shared_noise=shared_noise)
    return replace(base, credit=PlainReward(), objective=CoupledObjective(PRDPLoss(beta, clip_range, steps)))


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
    link: AnyCallable | None = None,
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
        link: The function of the gains that the loss "dpo" compares, for example
            ``genalign.algorithms.matching_losses.ChiSquaredLink`` of chi-PO, or ``AlphaLink`` of AlphaPO; None compares
            the gains themselves.
    """
    if link is not None and loss != "dpo":
        raise ValueError(f'recipe.link belongs to the loss "dpo", not to {loss!r}: leave one of them out')
    preference = _PREFERENCE_LOSSES[loss](beta) if link is None else DPOLoss(beta, link)
    objective = MatchingObjective(preference, draws, low, anchor=anchor)
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
    lag: Lag = Lag(),  # frozen
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
    return matching(GroupRelative(std), MatchingObjective(NFTLoss(beta), draws, anchor=anchor, old="sampling"), lag)


def awm(draws: int = 2, anchor: float = 1e-3, std: Std = "global", trail: float = 0.0) -> Recipe:
    """Advantage-weighted matching (arXiv 2509.25050): the flow-matching loss weighted by advantages.

    Use it as the simplest likelihood-free policy gradient. The ratio is to the weights that sampled the round, as in
    the paper's on-policy mode.

    Args:
        draws: The number of noise levels per sample and update.
        anchor: The weight of the distance from the reference policy.
        std: Whether advantages are divided by the "group" or the "global" standard deviation.
        trail: The weight of the paper's second anchor, the distance from an average of the weights; 0 for none.
    """
    objective = MatchingObjective(AWMLoss(), draws, anchor=anchor, old="sampling", trail=trail)
    recipe = matching(GroupRelative(std), objective, Lag(slope=0.0))  # the weights that the round began with
    return replace(recipe, memory=Lag(slope=0.001, limit=0.3)) if trail else recipe
