"""Recipes of the pathwise family, which backpropagate differentiable rewards through the sampler into the weights.

They differ in the tail, where the sampler carries a gradient, and are otherwise alike: every sample has its own noise
and follows the gradient of its own reward. Every reward of non-zero weight must be differentiable.
"""

from __future__ import annotations

from dataclasses import replace

from genalign.algorithms.pathwise import Ascent, EqualCredit, PathwiseObjective, Tail
from genalign.algorithms.recipe import Recipe
from genalign.algorithms.step_schedules import LastSteps, NoSteps, RandomLastSteps, StepSchedule
from genalign.algorithms.tails import (
    Chain,
    DirectAlign,
    OneStepEstimate,
    PartialChain,
    RenoisedCopies,
    ShiftedNoise,
    SparseSteps,
)
from genalign.diffusion.transitions import DDIM, ODE, Kernel

_ODE, _PLAIN, _NEAR_NOISE = ODE(), Ascent(), Ascent(anchor=0.5)


def pathwise(tail: Tail, schedule: StepSchedule, ascent: Ascent = _PLAIN, kernel: Kernel = _ODE) -> Recipe:
    """A recipe that follows the rewards' gradient through a part of the sampler.

    Args:
        tail: Where the sampler carries a gradient.
        schedule: The steps that the tail needs stored.
        ascent: How samples follow the rewards' gradients, and what keeps the policy near the reference.
        kernel: The sampler at the stored steps; all others use the ODE.
    """
    return Recipe(kernel, schedule, shared_noise=False, credit=EqualCredit(), objective=PathwiseObjective(tail, ascent))


def draft(steps: int | None = 1, ascent: Ascent = _PLAIN) -> Recipe:
    """DRaFT-K (arXiv 2309.17400): the gradient through the last ``steps`` moves; through all of them for None.

    The gradient norm grows with each step, by orders of magnitude beyond about ten steps: keep ``steps`` small, or set
    ``ascent.limit``. ``ascent.anchor`` gives DRaFT+.

    Args:
        steps: The number of moves K with a gradient; None for all.
        ascent: How samples follow the rewards' gradients, and what keeps the policy near the reference.
    """
    return pathwise(Chain(), LastSteps(steps), ascent)


def draft_lv(copies: int = 2, ascent: Ascent = _PLAIN) -> Recipe:
    """DRaFT-LV (arXiv 2309.17400): the gradient through the last move, averaged over noised copies of the sample.

    Args:
        copies: The number of copies.
        ascent: How samples follow the rewards' gradients, and what keeps the policy near the reference.
    """
    return pathwise(RenoisedCopies(copies), LastSteps(1), ascent)


def align_prop(
    mean: float = 0.16,
    std: float = 0.1,
    eta: float = 1.0,
    ascent: Ascent = _PLAIN,
) -> Recipe:
    """AlignProp (arXiv 2310.03739): the gradient through a random number of last moves, by DDIM.

    Differences: before the tail, sampling is the ODE without noise, and the number is drawn per round, not per batch.

    Args:
        mean: The mean fraction of the steps that carry a gradient; 8/50 is published.
        std: Its standard deviation.
        eta: The stochasticity of DDIM.
        ascent: How samples follow the rewards' gradients, and what keeps the policy near the reference.
    """
    return pathwise(Chain(), RandomLastSteps(mean, std), ascent, DDIM(eta))


def refl(last: float = 0.25, ascent: Ascent = _PLAIN) -> Recipe:
    """ReFL (arXiv 2304.05977): the reward of the clean latent that one late prediction implies.

    Its hinge is ``ascent.ceiling``.

    Args:
        last: The fraction of the steps, at the end, of which one is drawn for each sample.
        ascent: How samples follow the rewards' gradients, and what keeps the policy near the reference.
    """
    return pathwise(OneStepEstimate(), LastSteps(last), ascent)


def flow_bp(
    active: int = 4,
    late_bias: float = 1.0,
    rescale: float = 0.5,
    ascent: Ascent = _PLAIN,
) -> Recipe:
    """FlowBP-sparse (arXiv 2606.11075): some steps of the whole chain, each with detached inputs.

    Args:
        active: The number of steps that carry a gradient.
        late_bias: How strongly late steps are preferred in the draw; 0 draws uniformly.
        rescale: How far the active steps are scaled up to stand in for the others: 1 fully, 0 not at all.
        ascent: How samples follow the rewards' gradients, and what keeps the policy near the reference.
    """
    return pathwise(SparseSteps(active, late_bias, rescale), LastSteps(least=active), ascent)


def drtune(
    active: int = 3,
    early_stop: float = 0.4,
    ascent: Ascent = _PLAIN,
) -> Recipe:
    """DRTune (arXiv 2405.00760): equally spaced steps with detached inputs, up to a step drawn from the last ones.

    The clean latent that the last of them implies is scored.

    Args:
        active: The number of steps that carry a gradient.
        early_stop: The fraction of the steps, at the end, of which one is drawn as the last.
        ascent: How samples follow the rewards' gradients, and what keeps the policy near the reference.
    """
    tail = SparseSteps(active, rescale=0.0, even=True, early_stop=early_stop)
    return pathwise(tail, LastSteps(least=active), ascent)


def direct_align(
    low: float = 0.2,
    high: float = 0.95,
    gap: float = 0.1,
    inversion: float = 0.0,
    ascent: Ascent = _PLAIN,
) -> Recipe:
    """Direct-Align, the idea of SRPO (arXiv 2509.06942): one move from any level, with known noise.

    Its text-relative reward is ``rewards.combine.TextRelativeReward``.

    Args:
        low: The lowest level from which a sample moves, as a fraction of the path's range.
        high: The highest level.
        gap: The size of the move, in levels.
        inversion: The fraction of samples that move up, away from the rewards' gradient.
        ascent: How samples follow the rewards' gradients, and what keeps the policy near the reference.
    """
    return pathwise(DirectAlign(low, high, gap, inversion), NoSteps(), ascent)


def instruct_video(
    strength: float = 0.6,
    moves: int = 20,
    ascent: Ascent = _PLAIN,
) -> Recipe:
    """InstructVideo's editing (arXiv 2312.12490): samples are noised and denoised again, the last move with a gradient.

    Args:
        strength: The level to which a sample is noised, sigma / (alpha + sigma).
        moves: The number of steps of the whole grid, of which only those below ``strength`` run.
        ascent: How samples follow the rewards' gradients, and what keeps the policy near the reference.
    """
    return pathwise(PartialChain(strength, 1, moves), NoSteps(), ascent)


def noise_hypernetwork(ascent: Ascent = _NEAR_NOISE) -> Recipe:
    """Noise hypernetworks (arXiv 2508.09968): the adapter shifts the initial noise, and the base model samples from it.

    The loss is minus the rewards plus ``ascent.anchor`` times the mean square of the shift; 0.5 is the paper's. The
    shift is the network's own prediction with the adapter minus that without it, at the first level, so no separate
    network is needed. It is for models of one or a few steps, as the gradient goes through all of them.

    Args:
        ascent: How samples follow the rewards' gradients, and what keeps the shift small.
    """
    return replace(pathwise(ShiftedNoise(), NoSteps(), ascent), shifts_noise=True)
