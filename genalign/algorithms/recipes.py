"""Recipes: named algorithms, each a short composition of a kernel, a step schedule, a credit and an objective.

To read one down to its formula: ``flow_grpo`` here, ``PolicyGradient`` in ``trajectory``, ``clipped_surrogate`` in
``losses``, ``group_advantages`` in ``advantages``, ``diffusion.transitions`` (the kernel and its density).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from genalign.algorithms.credit import BestAndWorst, GroupRelative, PlainReward, RewardGain, SetContrast
from genalign.algorithms.interfaces import Credit, Objective
from genalign.algorithms.losses import KLForm
from genalign.algorithms.matching import (
    AWMLoss,
    DPOLoss,
    KTOLoss,
    MatchingLoss,
    MatchingObjective,
    NFTLoss,
)
from genalign.algorithms.preference_pairs import Criterion
from genalign.algorithms.step_schedules import AllSteps, NoSteps, RandomWindow, SlidingWindow, StepSchedule
from genalign.algorithms.trajectory import (
    ClippedSurrogate,
    CoupledObjective,
    GuardedSurrogate,
    PolicyGradient,
    PRDPLoss,
    noise_weighted,
)
from genalign.diffusion.completion import Completion
from genalign.diffusion.transitions import CPS, DDIM, ODE, FlowSDE, Kernel, trainable_steps
from genalign.types import AnyCallable, FeatureFunction, Grid

Std = Literal["group", "global"]


@dataclass(frozen=True)
class Recipe:
    """A training method.

    ``schedule`` chooses the steps that a round samples by ``kernel`` and stores; the others are deterministic.
    ``shared_noise``: one initial noise per group of samples. ``completion`` requests scores of every stored state's ODE
    completion and ``features`` features of the samples, for credit that needs them. With a ``lag`` the policy that
    samples trails the one that is trained.
    """

    kernel: Kernel
    schedule: StepSchedule
    shared_noise: bool
    credit: Credit
    objective: Objective
    completion: Completion | None = None
    features: FeatureFunction | None = None
    lag: Lag | None = None

    def steps(self, grid: Grid, round_index: int, seed: int) -> tuple[int, ...]:
        """The steps that a round trains. Raises ValueError where the grid has none for the kernel or the schedule."""
        try:
            return self.schedule(trainable_steps(self.kernel, grid), len(grid), round_index, seed)
        except ValueError as error:
            raise ValueError(f"{self.kernel}: {error}") from error


@dataclass(frozen=True)
class Lag:
    """A sampling policy that trails the trained one, with decay min(``slope`` i, ``limit``) after round i."""

    slope: float = 0.001
    limit: float = 0.5

    def decay(self, round_index: int) -> float:
        """The fraction of the old weights that remains after a round."""
        return min(self.slope * round_index, self.limit)


def with_credit(recipe: Recipe, credit: AnyCallable) -> Recipe:
    """Replace the credit of a recipe, by ``credit.NormalizedSum`` or ``rewards.combine.EnsembleCredit`` for example."""
    return replace(recipe, credit=credit)


def flow_grpo(
    kernel: Kernel = FlowSDE(0.7),  # noqa: B008  # kernels are frozen
    window: int | None = None,
    window_reach: float = 0.5,
    clip_range: float = 1e-4,
    kl: float = 0.0,
    kl_form: KLForm = "exact",
    std: Std = "group",
    shared_noise: bool = True,
) -> Recipe:
    """Flow-GRPO (arXiv 2505.05470, sections 4.1-4.2): group-normalized rewards, a clipped surrogate on SDE steps.

    The default choice: stable for any reward, without gradients through it. Left out: rewards per step.

    Args:
        kernel: The stochastic sampler (eq. 9).
        window: Steps to train per round, the others are sampled by the ODE (Flow-GRPO-Fast); None trains all.
        window_reach: The fraction of the grid that a window begins in.
        clip_range: The range of the ratio of new to old density.
        kl: The weight of the distance from the reference policy, against reward hacking.
        kl_form: The form of this distance, see ``losses.kl_penalty``.
        std: The standard deviation of advantages: of the group, or "global" as in the published code.
        shared_noise: One initial noise per group.
    """
    return Recipe(
        kernel=kernel,
        schedule=AllSteps() if window is None else RandomWindow(window, window_reach),
        shared_noise=shared_noise,
        credit=GroupRelative(std),
        objective=PolicyGradient(ClippedSurrogate(clip_range), kl, kl_form),
    )


def dense_grpo(
    kernel: Kernel = FlowSDE(0.7),  # noqa: B008
    window: int | None = None,
    window_reach: float = 0.5,
    clip_range: float = 1e-4,
    kl: float = 0.0,
    completion_steps: int | None = None,
    floor: float = 0.01,
    shared_noise: bool = True,
) -> Recipe:
    """DenseGRPO (arXiv 2601.20218, section 4): each step is credited with its gain in reward, normalized in the group.

    The gain is that of the ODE's sample from the latent after the step over that from the latent before it. Use it
    where the reward is cheap next to the network and one score per trajectory learns slowly. Its calibrated noise is a
    kernel: ``genalign.training.noise_calibration.calibrated``.

    Args:
        kernel: The stochastic sampler.
        window: Steps to train per round; None trains all.
        window_reach: The fraction of the grid that a window begins in.
        clip_range: The range of the ratio of new to old density.
        kl: The weight of the distance from the reference policy.
        completion_steps: ODE steps per completion; None takes all remaining steps of the grid.
        floor: The lower bound of a step's spread, not in the paper: see ``advantages.stepwise_advantages``.
        shared_noise: One initial noise per group.
    """
    plain = flow_grpo(kernel, window, window_reach, clip_range, kl, shared_noise=shared_noise)
    return replace(plain, credit=RewardGain(floor), completion=Completion(completion_steps))


def guard_grpo(
    kernel: Kernel = FlowSDE(0.7),  # noqa: B008
    window: int | None = None,
    window_reach: float = 0.5,
    clip_range: float = 2e-6,
    std: Std = "group",
) -> Recipe:
    """GRPO-Guard (arXiv 2510.22319, eq. 8): Flow-GRPO with normalized log-ratios and equalized steps.

    Use it where Flow-GRPO over-optimizes: one clip range then holds for both signs of the advantage and all steps.

    Args:
        kernel: The stochastic sampler.
        window: Steps to train per round; None trains all.
        window_reach: The fraction of the grid that a window begins in.
        clip_range: The range of the normalized ratio, smaller than Flow-GRPO's.
        std: The standard deviation of advantages.
    """
    plain = flow_grpo(kernel, window, window_reach, std=std)
    return replace(plain, objective=PolicyGradient(GuardedSurrogate(clip_range)))


def mix_grpo(
    kernel: Kernel = FlowSDE(0.7),  # noqa: B008
    window: int = 4,
    rounds_each: int = 25,
    stride: int = 1,
    decay: float = 0.0,
    clip_range: float = 1e-4,
) -> Recipe:
    """MixGRPO (arXiv 2507.21802, section 3.3): Flow-GRPO with a window that slides from the first steps to the last.

    Use it to train few steps per round, the early ones, which decide the composition, first.

    Args:
        kernel: The stochastic sampler within the window.
        window: Steps to train per round.
        rounds_each: Rounds at each position of the window.
        stride: Steps between positions.
        decay: The decay of the rounds at later positions; 0 for none.
        clip_range: The range of the ratio of new to old density.
    """
    return replace(flow_grpo(kernel, clip_range=clip_range), schedule=SlidingWindow(window, rounds_each, stride, decay))


def tempflow_grpo(
    kernel: Kernel = FlowSDE(0.7),  # noqa: B008
    clip_range: float = 1e-4,
    completion_steps: int | None = None,
) -> Recipe:
    """The noise-aware weights of TempFlow-GRPO (arXiv 2508.04324, section 4.2, eq. 8) on step-wise gains.

    Use it where late steps, which change little, should count less. Left out: branching from the deterministic
    trajectory at every step.
    """
    dense = dense_grpo(kernel, clip_range=clip_range, completion_steps=completion_steps)
    return replace(dense, objective=PolicyGradient(ClippedSurrogate(clip_range), weights=noise_weighted))


def ddpo(eta: float = 1.0, clip_range: float = 1e-4, window: int | None = None, window_reach: float = 0.5) -> Recipe:
    """DDPO (arXiv 2305.13301, section 4.3): the clipped surrogate on DDIM steps, with a noise per sample.

    For diffusion models such as SD 1.5 and SDXL: it works on any path and prediction type.

    Args:
        eta: The stochasticity of DDIM, in [0, 1].
        clip_range: The range of the ratio of new to old density.
        window: Steps to train per round; None trains all.
        window_reach: The fraction of the grid that a window begins in.
    """
    return flow_grpo(DDIM(eta), window, window_reach, clip_range, shared_noise=False)


def adv_grpo(
    kernel: Kernel = CPS(0.8),  # noqa: B008
    window: int = 2,
    window_reach: float = 0.5,
    clip_range: float = 1e-5,
    std: Std = "global",
) -> Recipe:
    """The generator of Adv-GRPO (arXiv 2511.20256): Flow-GRPO on two steps by CPS.

    Use it with a discriminator as the reward: name one of ``rewards.adversarial``, which learns after every round.

    Args:
        kernel: The stochastic sampler within the window.
        window: Steps to train per round.
        window_reach: The fraction of the grid that a window begins in.
        clip_range: The range of the ratio of new to old density.
        std: The standard deviation of advantages.
    """
    return flow_grpo(kernel, window, window_reach, clip_range, std=std)


def prdp(
    kernel: Kernel = FlowSDE(0.7),  # noqa: B008
    window: int | None = None,
    window_reach: float = 0.5,
    beta: float = 3e-5,
    clip_range: float = 1e-4,
    steps: Literal["mean", "sum"] = "mean",
    shared_noise: bool = True,
) -> Recipe:
    """PRDP (arXiv 2402.08714, eq. 14-21): differences of log-ratios regress on differences of rewards.

    All pairs of a prompt's samples take part. Use it for large prompt sets, where policy gradients are unstable.

    Args:
        kernel: The stochastic sampler.
        window: Steps to train per round; None trains all.
        window_reach: The fraction of the grid that a window begins in.
        beta: The strength of the KL constraint to the reference policy.
        clip_range: The range of a step's log-ratio around that of the sampling policy.
        steps: The reduction of log-ratios over steps, see ``losses.prdp_loss``.
        shared_noise: One initial noise per group.
    """
    plain = flow_grpo(kernel, window, window_reach, shared_noise=shared_noise)
    return replace(plain, credit=PlainReward(), objective=CoupledObjective(PRDPLoss(beta, clip_range, steps)))


def matching(credit: Credit, objective: MatchingObjective, lag: Lag | None = None) -> Recipe:
    """A recipe of the matching family: ODE samples from a noise each, and losses on forward-process errors."""
    return Recipe(ODE(), NoSteps(), shared_noise=False, credit=credit, objective=objective, lag=lag)


def dragon(
    loss: Literal["dpo", "kto"] = "dpo",
    beta: float = 100.0,
    draws: int = 2,
    tolerance: float = 0.0,
    pairs: int = 1,
    anchor: float = 0.0,
    low: float = 0.02,
) -> Recipe:
    """DRAGON (arXiv 2504.15217) for rewards of single samples: the best of each prompt's samples against the worst.

    With "dpo" this is online Diffusion-DPO. Use it for rewards that only rank, or for samplers without densities.

    Args:
        loss: Diffusion-DPO on pairs, or Diffusion-KTO without them.
        beta: The strength of the loss.
        draws: Noise levels per sample and update.
        tolerance: A pair whose rewards differ by no more is left out.
        pairs: Pairs per prompt: the best and the worst, the second best and the second worst, and so on.
        anchor: The weight of the distance from the reference policy.
        low: The least noise level, a fraction of the path's range: the content of a prompt is decided at high ones.
    """
    return matching(
        BestAndWorst(tolerance, pairs), MatchingObjective(_preference_loss(loss, beta), draws, low, anchor=anchor)
    )


def dragon_set(
    reward: AnyCallable,
    features: AnyCallable,
    criterion: Criterion = "plus",
    quality: float = 0.0,
    loss: Literal["dpo", "kto"] = "dpo",
    beta: float = 100.0,
    draws: int = 2,
    anchor: float = 0.0,
) -> Recipe:
    """DRAGON (arXiv 2504.15217) for rewards of whole sets, such as a Frechet distance or the Vendi score.

    Two sets of a round's samples swap members until the reward tells them apart. Use it to match a distribution or to
    raise diversity.

    Args:
        reward: The ``SetReward`` of features (n, d).
        features: The ``FeatureFunction`` of samples (B, ...).
        criterion: What a swap must raise, see ``preference_pairs.greedy_swap``.
        quality: The weight of the samples' own rewards.
        loss: Diffusion-DPO on pairs, or Diffusion-KTO without them.
        beta: The strength of the loss.
        draws: Noise levels per sample and update.
        anchor: The weight of the distance from the reference policy.
    """
    objective = MatchingObjective(_preference_loss(loss, beta), draws, anchor=anchor)
    return replace(matching(SetContrast(reward, criterion, quality=quality), objective), features=features)


def nft(
    beta: float = 1.0,
    draws: int = 2,
    anchor: float = 1e-4,
    std: Std = "global",
    lag: Lag = Lag(),
) -> Recipe:
    """DiffusionNFT (arXiv 2509.16117, eq. 5), sampling by a policy that lags behind.

    Use it for fast training with any sampler: no step is stored or replayed.

    Args:
        beta: The guidance strength.
        draws: Noise levels per sample and update.
        anchor: The weight of the distance from the reference policy.
        std: The standard deviation of advantages.
        lag: The lag of the sampling policy.
    """
    return matching(GroupRelative(std), MatchingObjective(NFTLoss(beta), draws, anchor=anchor, old=True), lag)


def awm(draws: int = 2, anchor: float = 1e-3, std: Std = "global") -> Recipe:
    """Advantage-weighted matching (arXiv 2509.25050): the flow-matching loss weighted by advantages.

    Use it as the plainest policy gradient without densities. Left out: the second anchor, to an average of the weights.
    """
    return matching(GroupRelative(std), MatchingObjective(AWMLoss(), draws, anchor=anchor))


def _preference_loss(loss: Literal["dpo", "kto"], beta: float) -> MatchingLoss:
    return DPOLoss(beta) if loss == "dpo" else KTOLoss(beta)
