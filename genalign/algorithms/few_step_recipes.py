"""Recipes of few-step students, which sample in one to eight steps by ``CPS(1.0)``, see ``sampling.kernel``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import nn

from genalign.algorithms.companions import FakeScore, LatentProxy
from genalign.algorithms.consistency_distillation import ConsistencyObjective
from genalign.algorithms.latent_directions import DistributionMatching, ProxyAscent, WeightedAscent
from genalign.algorithms.objective_sum import ObjectivePart, SumObjective
from genalign.algorithms.pathwise import Ascent, EqualCredit, PathwiseObjective
from genalign.algorithms.pathwise_recipes import pathwise
from genalign.algorithms.recipe import Lag, Recipe
from genalign.algorithms.step_schedules import LastSteps, NoSteps
from genalign.algorithms.tails import Chain, OneStepEstimate, RenoisedEstimate
from genalign.diffusion.transitions import CPS, ODE

_NORMALIZED, _PLAIN = Ascent(normalize_gradients=True, weight_distance=1e-4), Ascent()


def consistency(
    steps: int = 50,
    guidance: float = 1.0,
    skip: int = 1,
    huber: float = 1e-3,
    draws: int = 1,
    decay: float = 0.95,
) -> Recipe:
    """Consistency distillation (arXiv 2303.01469), of a guided teacher as in latent consistency models (2310.04378).

    The teacher is the model that training starts from. The samples are the student's own, or those of a pool on disk
    (``training.data``). Left out: the guidance as an input of the student, which learns one scale.

    Args:
        steps: The number of steps of the teacher's grid.
        guidance: The teacher's CFG scale, distilled into the student.
        skip: The number of the teacher's steps in one of its moves.
        huber: The threshold of the pseudo-Huber loss.
        draws: The number of noise levels per sample and update.
        decay: The EMA decay of the target's weights, per round.
    """
    objective = ConsistencyObjective(steps, skip, guidance, huber, draws)
    memory = Lag(slope=0.0, limit=decay, first=decay)
    return Recipe(ODE(), NoSteps(), shared_noise=False, credit=EqualCredit(), objective=objective, memory=memory)


def rg_lcd(
    scale: float = 1.0,
    proxy: Callable[[], nn.Module] | None = None,
    steps: int = 50,
    guidance: float = 1.0,
    skip: int = 1,
    huber: float = 1e-3,
    decay: float = 0.95,
    ascent: Ascent = _PLAIN,
) -> Recipe:
    """RG-LCD (arXiv 2403.11027): consistency distillation plus the rewards of the student's one-step estimates.

    Without a proxy the rewards must be differentiable, and their gradients run through the decoder. A proxy is a latent
    reward that is trained along to rank samples as the rewards do, which then need no gradient. Here the estimates are
    at other noise levels and noises than those of the consistency loss.

    Args:
        scale: The weight of the rewards.
        proxy: Builds the network of a proxy, such as ``rewards.noise_aware.LatentImageDistilled``; None for none.
        steps: The number of steps of the teacher's grid.
        guidance: The teacher's CFG scale, distilled into the student.
        skip: The number of the teacher's steps in one of its moves.
        huber: The threshold of the pseudo-Huber loss.
        decay: The EMA decay of the target's weights, per round.
        ascent: How estimates follow the rewards' gradients, and what keeps the policy near the reference.
    """
    base = consistency(steps, guidance, skip, huber, decay=decay)
    reward = PathwiseObjective(RenoisedEstimate(), ascent, toward=ProxyAscent() if proxy else None)
    parts = ObjectivePart("consistency", base.objective), ObjectivePart("reward", reward, scale)
    return replace(base, objective=SumObjective(parts), companion=LatentProxy(proxy) if proxy else None)


def reward_instruct(intermediate: bool = True, ascent: Ascent = _NORMALIZED) -> Recipe:
    """Reward-Instruct, or R0 (arXiv 2503.13070): a few-step generator trained only on rewards, near its first weights.

    Set ``sampling`` to about four steps, with the kernel ``CPS(1.0)`` for evaluations. Each reward's gradient is
    scaled to length 1 at the image, and ``ascent.weight_distance`` keeps the weights near the first ones: without it
    the paper reports collapse, and with it a worse FID. Left out: a random stochasticity for each step.

    Args:
        intermediate: Whether the reward is that of the clean estimate at a random step, without gradients before it
            (R0+); else that of the sample, with gradients through all steps.
        ascent: How samples follow the rewards' gradients, and what keeps the policy near the reference.
    """
    return pathwise(OneStepEstimate() if intermediate else Chain(), LastSteps(None), ascent, CPS(1.0))


def distribution_matching(
    guidance: float = 1.0,
    reward: float = 0.0,
    fake_steps: int = 5,
    fake_learning_rate: float = 1e-4,
    ascent: Ascent = _PLAIN,
) -> Recipe:
    """Distribution matching of a few-step generator, with or without rewards (DMD2, arXiv 2405.14867); experimental.

    The generator's clean estimates, at a random step of its own sampling, are moved by the difference of two scores:
    the teacher's, which is the model that training starts from, minus that of the generator's own samples. Left out:
    the adversarial loss of DMD2.

    Args:
        guidance: The teacher's CFG scale, distilled into the student.
        reward: The weight of the rewards' gradients; 0 only reports the rewards.
        fake_steps: The number of updates of the generator's own score per round.
        fake_learning_rate: Their learning rate.
        ascent: How samples follow the rewards' gradients, and what keeps the policy near the reference.
    """
    further = (WeightedAscent(ascent, reward),) if reward else ()
    objective = PathwiseObjective(OneStepEstimate(), ascent, further, DistributionMatching(guidance))
    base = pathwise(OneStepEstimate(), LastSteps(None), ascent, CPS(1.0))
    return replace(base, objective=objective, companion=FakeScore(fake_steps, fake_learning_rate))
