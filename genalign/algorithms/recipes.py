"""Named algorithms: each a short composition of a kernel, the steps it trains, a credit and an objective."""

from __future__ import annotations

from collections.abc import Callable
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
from genalign.types import FeatureFunction, Grid, SetReward


@dataclass(frozen=True)
class Recipe:
    """A training method.

    ``schedule`` chooses the steps that a round samples by ``kernel`` and stores; the others are deterministic.
    ``shared_noise``: one initial noise per group of samples. ``completion`` asks for scores of every stored state's
    ODE completion, ``features`` for those of the samples, for credit that needs them. ``lag`` lets the policy that
    samples trail the one that is trained.
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
        """The steps that a round trains. Raises ValueError where the kernel or the schedule finds none on the grid."""
        try:
            return self.schedule(trainable_steps(self.kernel, grid), len(grid), round_index, seed)
        except ValueError as error:
            raise ValueError(f"{self.kernel}: {error}") from error


@dataclass(frozen=True)
class Lag:
    """The sampling policy's decay towards the trained one after round i: min(``slope`` i, ``limit``)."""

    slope: float = 0.001
    limit: float = 0.5

    def decay(self, round_index: int) -> float:
        """How much of the old weights is kept after a round."""
        return min(self.slope * round_index, self.limit)


def window_of(size: int | None, reach: float) -> StepSchedule:
    """A random window of ``size`` steps, or every trainable step for None."""
    return AllSteps() if size is None else RandomWindow(size, reach)


def flow_grpo(
    kernel: Kernel = FlowSDE(0.7),  # noqa: B008  # kernels are frozen
    window: int | None = None,
    window_reach: float = 0.5,
    clip_range: float = 1e-4,
    kl: float = 0.0,
    kl_form: KLForm = "exact",
    std: Literal["group", "global"] = "group",
    shared_noise: bool = True,
) -> Recipe:
    """Flow-GRPO (arXiv 2505.05470, sections 4.1-4.2): group-normalised rewards, a clipped surrogate on SDE steps.

    ``window`` None trains every trainable step; a number trains that many and samples the others by the ODE
    (Flow-GRPO-Fast). ``std`` "global" is the published default. Left out: rewards per step.
    """
    return Recipe(
        kernel=kernel,
        schedule=window_of(window, window_reach),
        shared_noise=shared_noise,
        credit=GroupRelative(std),
        objective=PolicyGradient(ClippedSurrogate(clip_range), kl, kl_form),
    )


def with_credit(recipe: Recipe, credit: Callable) -> Recipe:  # type: ignore[type-arg]  # bare: any Credit is taken
    """``recipe`` with another credit, such as ``credit.NormalizedSum`` or ``rewards.combine.EnsembleCredit``."""
    return replace(recipe, credit=credit)


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
    """DenseGRPO (arXiv 2601.20218, section 4): each step is credited with what it added to the reward of the image that
    the ODE makes of the latent, normalised within the group.

    ``completion_steps`` None completes by all remaining steps of the grid. ``floor`` is not in the paper; see
    ``advantages.stepwise_advantages``. Its calibrated noise is a kernel: ``genalign.training.noise_calibration.calibrated``.
    """
    plain = flow_grpo(kernel, window, window_reach, clip_range, kl, shared_noise=shared_noise)
    return replace(plain, credit=RewardGain(floor), completion=Completion(completion_steps))


def guard_grpo(
    kernel: Kernel = FlowSDE(0.7),  # noqa: B008
    window: int | None = None,
    window_reach: float = 0.5,
    clip_range: float = 2e-6,
    std: Literal["group", "global"] = "group",
) -> Recipe:
    """GRPO-Guard (arXiv 2510.22319): Flow-GRPO with normalised log-ratios and equalised steps."""
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
    """MixGRPO (arXiv 2507.21802): Flow-GRPO with a window that slides from the first steps to the last."""
    return replace(flow_grpo(kernel, clip_range=clip_range), schedule=SlidingWindow(window, rounds_each, stride, decay))


def tempflow_grpo(
    kernel: Kernel = FlowSDE(0.7),  # noqa: B008
    clip_range: float = 1e-4,
    completion_steps: int | None = None,
) -> Recipe:
    """The noise-aware weights of TempFlow-GRPO (arXiv 2508.04324, section 4.2) on step-wise gains. Left out: branching
    from the deterministic trajectory at every step."""
    dense = dense_grpo(kernel, clip_range=clip_range, completion_steps=completion_steps)
    return replace(dense, objective=PolicyGradient(ClippedSurrogate(clip_range), weights=noise_weighted))


def ddpo(eta: float = 1.0, clip_range: float = 1e-4, window: int | None = None, window_reach: float = 0.5) -> Recipe:
    """DDPO (arXiv 2305.13301): the clipped surrogate on DDIM steps, for any path and prediction; noises of a group are
    its own."""
    return flow_grpo(DDIM(eta), window, window_reach, clip_range, shared_noise=False)


def adv_grpo(
    kernel: Kernel = CPS(0.8),  # noqa: B008
    window: int = 2,
    window_reach: float = 0.5,
    clip_range: float = 1e-5,
    std: Literal["group", "global"] = "global",
) -> Recipe:
    """Adv-GRPO's generator (arXiv 2511.20256): Flow-GRPO on two steps by CPS. What is adversarial is the reward: name a
    ``rewards.adversarial`` one, which learns after every round."""
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
    """PRDP (arXiv 2402.08714): differences of log-ratios to the reference policy regress on those of rewards, over all
    pairs of a prompt."""
    return Recipe(
        kernel=kernel,
        schedule=window_of(window, window_reach),
        shared_noise=shared_noise,
        credit=PlainReward(),
        objective=CoupledObjective(PRDPLoss(beta, clip_range, steps)),
    )


def _preference_loss(loss: Literal["dpo", "kto"], beta: float) -> MatchingLoss:
    """Diffusion-DPO on pairs or Diffusion-KTO without them."""
    return DPOLoss(beta) if loss == "dpo" else KTOLoss(beta)


def matching(credit: Credit, objective: MatchingObjective, lag: Lag | None = None) -> Recipe:
    """A recipe of the matching family: deterministic samples of different noises, learnt from by forward errors."""
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
    """DRAGON (arXiv 2504.15217) for rewards of single samples, or of a sample against a reference set: the best of each
    prompt's samples is a positive demonstration, the worst a negative one, and so on for more ``pairs``. With "dpo"
    this is online Diffusion-DPO. Samples are compared at noise levels from ``low`` of the path's range on: what a
    prompt asks for is decided at the high ones."""
    return matching(
        BestAndWorst(tolerance, pairs), MatchingObjective(_preference_loss(loss, beta), draws, low, anchor=anchor)
    )


def dragon_set(
    reward: Callable,  # type: ignore[type-arg]  # bare: any SetReward is taken
    features: Callable,  # type: ignore[type-arg]  # and any FeatureFunction
    criterion: Criterion = "plus",
    quality: float = 0.0,
    loss: Literal["dpo", "kto"] = "dpo",
    beta: float = 100.0,
    draws: int = 2,
    anchor: float = 0.0,
) -> Recipe:
    """DRAGON for rewards of whole sets, such as a Frechet distance or the Vendi score of ``features``: two sets of a
    round's samples exchange members until the reward tells them apart. ``quality`` weighs the samples' own rewards in
    it."""
    set_reward: SetReward = reward
    feature_function: FeatureFunction = features
    recipe = matching(
        SetContrast(set_reward, criterion, quality=quality),
        MatchingObjective(_preference_loss(loss, beta), draws, anchor=anchor),
    )
    return replace(recipe, features=feature_function)


def nft(
    beta: float = 1.0,
    draws: int = 2,
    anchor: float = 1e-4,
    std: Literal["group", "global"] = "global",
    lag: Lag = Lag(),
) -> Recipe:
    """DiffusionNFT (arXiv 2509.16117), sampling by a policy that lags behind."""
    return matching(GroupRelative(std), MatchingObjective(NFTLoss(beta), draws, anchor=anchor, old=True), lag)


def awm(draws: int = 2, anchor: float = 1e-3, std: Literal["group", "global"] = "global") -> Recipe:
    """Advantage-weighted matching (arXiv 2509.25050). Left out: the second anchor, to an average of the weights."""
    return matching(GroupRelative(std), MatchingObjective(AWMLoss(), draws, anchor=anchor))
