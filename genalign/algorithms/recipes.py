"""Recipes: named training methods, each a short composition of a kernel, a step schedule, a credit and an objective.

First come the recipes of the trajectory family, which learn from stored sampling steps, then those of the matching
family, which learn from final samples that any sampler may have drawn. To read Flow-GRPO down to its formula, follow
``flow_grpo`` in this module, ``PolicyGradient`` in ``trajectory``, ``clipped_surrogate`` in ``losses`` and ``FlowSDE``
in ``diffusion.transitions``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from genalign.algorithms.advantages import Std
from genalign.algorithms.credit import BestAndWorst, GroupRelative, PlainReward, SetContrast, VirtualBest
from genalign.algorithms.gradient_balance import GradientBalance
from genalign.algorithms.interfaces import Credit, Objective
from genalign.algorithms.losses import KLForm
from genalign.algorithms.matching import AWMLoss, DPOLoss, KTOLoss, MatchingLoss, MatchingObjective, NFTLoss
from genalign.algorithms.preference_pairs import Criterion
from genalign.algorithms.redraws import FurtherPrompts, MoreSamples, RedrawRule
from genalign.algorithms.step_credit import Reduction, RewardGain, TurningPoint, ValueAnchored
from genalign.algorithms.step_schedules import AllSteps, NoSteps, Pace, RandomWindow, SlidingWindow, StepSchedule
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
from genalign.diffusion.transitions import CPS, DDIM, ODE, Kernel, default_kernel, trainable_steps
from genalign.types import AnyCallable, FeatureFunction, Grid, Path

PreferenceLoss = Literal["dpo", "kto"]
_PREFERENCE_LOSSES: dict[str, Callable[[float], MatchingLoss]] = {"dpo": DPOLoss, "kto": KTOLoss}


@dataclass(frozen=True)
class Lag:
    """Exponential averaging of the sampling weights: after round i they keep a fraction min(slope * i, limit).

    Args:
        slope: Growth of the retained fraction per round.
        limit: Largest retained fraction.
    """

    slope: float = 0.001
    limit: float = 0.5

    def decay(self, round_index: int) -> float:
        """Return the fraction of the old sampling weights that is kept after a round."""
        return min(self.slope * round_index, self.limit)


@dataclass(frozen=True)
class Recalibration:
    """Noise levels that move as the policy does: DenseGRPO's calibration (arXiv 2601.20218, algorithm 1) in training.

    After every ``every``-th round the levels move by the gains of that round's samples, which the credit per step has
    scored already, see ``genalign.training.noise_calibration.moved_levels``. The paper calibrates; when to do so again
    is our choice.

    Args:
        every: Number of rounds between two moves.
        step: Move of a level, as a fraction of its first value.
    """

    every: int = 1
    step: float = 0.05

    def __post_init__(self) -> None:
        if self.every < 1 or not 0 < self.step < 1:
            raise ValueError(f"a recalibration needs every of 1 or more and a step in (0, 1), not {self}")


@dataclass(frozen=True)
class ElasticReset:
    """Elastic Reset (arXiv 2312.07551): the policy returns to an average of its weights, and the average to the start.

    Every ``every`` rounds the weights become an exponential moving average of themselves, apart from the one that is
    evaluated and saved, and the average starts again from the first weights. The optimizer's moments stay, as in the
    published code. That resets once in about 1.3 time constants of an average with decay 0.995; the defaults have the
    same ratio for runs of about a hundred updates, which is our choice.

    Args:
        every: Number of rounds between two resets.
        decay: Decay of the average, per optimizer step.
    """

    every: int = 15
    decay: float = 0.95

    def __post_init__(self) -> None:
        if self.every < 1 or not 0 <= self.decay < 1:
            raise ValueError(f"an elastic reset needs every of 1 or more and a decay in [0, 1), not {self}")


@dataclass(frozen=True)
class Recipe:
    """A training method.

    Attributes:
        kernel: The stochastic sampler of the scheduled steps; all other steps follow the ODE. None takes the published
            one of the model's path: ``FlowSDE(0.7)`` on a flow, ``DDIM(1.0)`` on a variance-preserving path, ``DPMSDE``
            on any other.
        schedule: The choice of the steps that a round samples with ``kernel``, stores and trains.
        shared_noise: Whether all samples of a group start from the same initial noise.
        credit: The rule from the scores of a round to advantages of samples (B,) or steps (B, S).
        objective: The rule from advantages to gradients.
        completion: How stored states are completed to clean samples and scored, for credit per step; None for no
            scores per step.
        features: The feature function of the samples, for credit from set rewards; None for no features.
        lag: The lag of the sampling weights behind the trained ones; None samples with the trained weights.
        recalibration: When the kernel's noise levels move during training; None leaves the kernel as it is.
        reset: When the weights return to their average; None never resets them.
        balance: How rewards are weighted by their gradients; None weighs them as the credit does.
        redraw: What is drawn in place of groups without spread; None trains a round as it was drawn.
    """

    kernel: Kernel | None
    schedule: StepSchedule
    shared_noise: bool
    credit: Credit
    objective: Objective
    completion: Completion | None = None
    features: FeatureFunction | None = None
    lag: Lag | None = None
    recalibration: Recalibration | None = None
    reset: ElasticReset | None = None
    balance: GradientBalance | None = None
    redraw: RedrawRule | None = None

    def __post_init__(self) -> None:
        if self.recalibration and self.completion is None:
            raise ValueError(
                "a recalibration of the noise levels needs scores of every stored state: choose a recipe with a"
                " completion, such as dense_grpo"
            )
        if self.redraw and not self.redraw.whole_groups and self.objective.unit != "sample":
            raise ValueError(
                f"the loss of this recipe ties a whole {self.objective.unit} together, which unequal groups do not"
                " allow: choose with_further_prompts, or a recipe such as flow_grpo"
            )

    def kernel_on(self, path: Path) -> Kernel:
        """Return the kernel for a model on ``path``."""
        return default_kernel(path) if self.kernel is None else self.kernel

    def steps(self, path: Path, grid: Grid, round_index: int, seed: int) -> tuple[int, ...]:
        """Choose the grid indices of the steps to train in a round, for a model on ``path``.

        Raises ValueError if the grid has too few steps that the kernel can train.
        """
        kernel = self.kernel_on(path)
        try:
            return self.schedule(trainable_steps(kernel, grid), len(grid), round_index, seed)
        except ValueError as error:
            raise ValueError(f"{kernel}: {error}") from error


def with_credit(recipe: Recipe, credit: AnyCallable) -> Recipe:
    """Replace the credit of a recipe, for example by ``credit.NormalizedSum`` or ``rewards.combine.EnsembleCredit``.

    Args:
        recipe: The recipe whose credit is replaced.
        credit: The rule from the scores of a round to advantages.
    """
    return replace(recipe, credit=credit)


def with_chi_squared(recipe: Recipe, sharpness: float) -> Recipe:
    """Replace the KL penalty of a recipe by a chi-squared penalty, which punishes large distances more.

    It is the regularizer of arXiv 2403.03185, per transition, see ``losses.chi_squared``. Use it where few transitions
    move far, which the mean of their KL hides.

    Args:
        recipe: A recipe that learns from stored steps, with a ``kl`` above 0.
        sharpness: The sharpness k: with 2 k KL about 1 at the largest KL per dimension that is acceptable.
    """
    if not isinstance(recipe.objective, PolicyGradient) or not recipe.objective.kl:
        raise ValueError("with_chi_squared needs a recipe with a KL penalty, such as flow_grpo: set its kl above 0")
    return replace(recipe, objective=replace(recipe.objective, kl_sharpness=sharpness))


def with_recalibration(recipe: Recipe, every: int = 1, step: float = 0.05) -> Recipe:
    """Recalibrate the noise levels of a recipe with a completion, such as ``dense_grpo``, as the policy moves.

    Args:
        recipe: The recipe. Its kernel, a ``FlowSDE``, ``DanceSDE`` or ``CalibratedSDE``, gives the first levels.
        every: The number of rounds between two moves of the levels.
        step: The move of a level, as a fraction of its first value.
    """
    return replace(recipe, recalibration=Recalibration(every, step))


def with_elastic_reset(recipe: Recipe, every: int = 15, decay: float = 0.95) -> Recipe:
    """Reset the weights to their average at intervals, against drift from the model that training began with.

    Args:
        recipe: The recipe.
        every: The number of rounds between two resets.
        decay: The decay of the average, per optimizer step.
    """
    return replace(recipe, reset=ElasticReset(every, decay))


def with_gradient_balance(recipe: Recipe, every: int = 10, decay: float = 0.7) -> Recipe:
    """Weigh the rewards of a recipe so that their gradients balance, in the form of MARBLE (arXiv 2605.06507).

    Use it where a weighted sum follows one of several rewards. Of the rewards' own weights only the signs matter. The
    step is taken with the sum of the rewards' credits times their factors, which is the published sum of their
    gradients as long as no ratio is clipped; in between, the credits are weighted by the averaged weights.

    Args:
        recipe: The recipe, whose loss must not tie the samples of a group together.
        every: The number of updates between two in which every reward's own gradient is computed, at the cost of as
            many backward passes as there are rewards.
        decay: The fraction of the averaged weights that such an update keeps.
    """
    return replace(recipe, balance=GradientBalance(every, decay))


def with_further_prompts(recipe: Recipe, extra: float = 1.0) -> Recipe:
    """Replace groups without spread by further prompts in the same round (DAPO, arXiv 2503.14476, section 3.2).

    Use it where many groups get equal scores, such as with rewards that are right or wrong. What is dropped is billed,
    too; rewards in the log are those of the prompts that were drawn first.

    Args:
        recipe: The recipe.
        extra: The most further samples of a round, as a multiple of its own.
    """
    return replace(recipe, redraw=FurtherPrompts(extra))


def with_more_samples(recipe: Recipe, extra: float = 1.0) -> Recipe:
    """Replace groups without spread by more samples of the others, most where scores vary most.

    After the idea of Knapsack RL, see ``redraws.MoreSamples``. Groups become unequal. Use it where further prompts are
    as silent as the first, or the prompt set is small.

    Args:
        recipe: The recipe, whose loss must not tie the samples of a group together.
        extra: The most further samples of a round, as a multiple of its own.
    """
    return replace(recipe, redraw=MoreSamples(extra))


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

    The gain of a step is the reward of the ODE's sample from the latent after the step minus the reward of its sample
    from the latent before. Use it where the reward is cheap compared with the network, and one score per trajectory
    learns slowly. The paper's calibrated noise is the kernel ``genalign.training.noise_calibration.calibrated``.

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

    Each group has one more, virtual sample of the best possible score, and ratios are clipped to
    [1 - 0.8 clip_range, 1 + 1.2 clip_range]. Use it with rewards of few levels, under which many groups have equal
    scores. All samples of a failed group are pushed away from, so watch the variety of samples, or set ``kl``.

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
    """VGPO (arXiv 2512.12387, eq. 10-13, in our form): advantages from the values of steps, by one-step completions.

    The value of a step is the discounted sum of the rewards of what follows it. Use it with rewards of 0 or more that
    read blurry samples well; it costs no NFE beyond Flow-GRPO's.

    Args:
        kernel: The stochastic sampler; None takes that of the model's path, see ``Recipe``.
        window: The number of consecutive steps to train per round; None trains all steps.
        window_reach: The fraction of the grid in which the window may begin.
        clip_range: The clip range of the ratio of new to old density.
        kl: The weight of the distance from the reference policy.
        discount: The discount of later rewards, see ``step_credit.ValueAnchored``.
        anchor: The weight of the absolute term, off by default: it has no expected gradient, as ``ValueAnchored`` says.
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

    A step after which the reward turns to where it ends is credited with the gain of the rest of the trajectory, all
    others with their own gain. Use it where a step's worth shows later than in the next completion.

    Args:
        kernel: The stochastic sampler; None takes that of the model's path, see ``Recipe``.
        window: The number of consecutive steps to train per round; None trains all steps.
        window_reach: The fraction of the grid in which the window may begin.
        clip_range: The clip range of the ratio of new to old density.
        kl: The weight of the distance from the reference policy.
        completion_steps: ODE steps from each latent to its sample; None takes all remaining steps of the grid.
        floor: The lower bound of the standard deviation of a step's gains (not in the paper), see
            ``advantages.stepwise_advantages``.
        balanced: Whether as many turning points of samples that gained as of samples that lost count, see
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

    A transition further than the limit from the sampling policy is left out where its gradient would move it further
    away. Use it with several updates a round (``training.updates_per_round`` or ``training.epochs``): in the first
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

    Use it to train few steps per round, and the early steps, which decide the composition, first.

    Args:
        kernel: The stochastic sampler within the window; None takes that of the model's path, see ``Recipe``.
        window: The number of consecutive steps to train per round.
        rounds_each: The number of rounds at each position of the window.
        stride: The number of steps between two positions.
        pace: How long the window stays: "progressive", "decay" or "exp_decay", as ``SlidingWindow`` says.
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
    the samples of a group share an ODE trajectory up to the one step of the round, drawn anew each round, where each
    draws its own noise; the ODE completes them, and the reward of the sample is the credit of that step. Then a round's
    weight scales its whole update, which a learning rate of "auto" undoes: set ``training.learning_rate`` to a number.

    Args:
        kernel: The stochastic sampler; None takes that of the model's path, see ``Recipe``.
        clip_range: The clip range of the ratio of new to old density.
        completion_steps: The number of steps by which a stored state is completed to a sample; None takes all that are
            left, as branches always do.
        branching: Whether to branch at one step a round instead of completing a state for every step.
    """
    if branching and completion_steps is not None:
        raise ValueError(
            "recipe.completion_steps is for stored states, of which branching completes none: leave it out"
        )
    base = (
        flow_grpo(kernel, window=1, window_reach=1.0, clip_range=clip_range)
        if branching
        else dense_grpo(kernel, clip_range=clip_range, completion_steps=completion_steps)
    )
    return replace(base, objective=PolicyGradient(ClippedSurrogate(clip_range), weights=noise_weighted))


def ddpo(eta: float = 1.0, clip_range: float = 1e-4, window: int | None = None, window_reach: float = 0.5) -> Recipe:
    """DDPO (arXiv 2305.13301, section 4.3): the clipped surrogate on DDIM steps, with its own noise for each sample.

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

    Use it with a discriminator from ``rewards.adversarial`` as the reward, which is trained after every round.

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
        link: The function of the gains that the loss "dpo" compares, for example ``matching.ChiSquaredLink`` of chi-PO
            or ``matching.AlphaLink`` of AlphaPO; None compares the gains themselves.
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
    return matching(GroupRelative(std), MatchingObjective(NFTLoss(beta), draws, anchor=anchor, old=True), lag)


def awm(draws: int = 2, anchor: float = 1e-3, std: Std = "global") -> Recipe:
    """Advantage-weighted matching (arXiv 2509.25050): the flow-matching loss weighted by advantages.

    Use it as the simplest policy gradient without densities. The ratio is to the weights that sampled the round, as in
    the paper's on-policy mode. Its second anchor, to an average of the weights, is not implemented.

    Args:
        draws: The number of noise levels per sample and update.
        anchor: The weight of the distance from the reference policy.
        std: Whether advantages are divided by the "group" or the "global" standard deviation.
    """
    objective = MatchingObjective(AWMLoss(), draws, anchor=anchor, old=True)
    return matching(GroupRelative(std), objective, Lag(slope=0.0))  # the weights that the round began with
