"""Recipes of few-step students, which sample in one to eight steps by ``CPS(1.0)``, see ``sampling.kernel``."""

from __future__ import annotations

from genalign.algorithms.consistency import ConsistencyObjective
from genalign.algorithms.pathwise import EqualCredit
from genalign.algorithms.recipe import Lag, Recipe
from genalign.algorithms.step_schedules import NoSteps
from genalign.diffusion.transitions import ODE


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
        guidance: The guidance scale of the teacher, which the student has in its weights.
        skip: The number of the teacher's steps that one of its moves spans.
        huber: The threshold of the pseudo-Huber loss.
        draws: The number of levels per sample and update.
        decay: How much of the target's weights is kept after a round.
    """
    objective = ConsistencyObjective(steps, skip, guidance, huber, draws)
    memory = Lag(slope=0.0, limit=decay, first=decay)
    return Recipe(ODE(), NoSteps(), shared_noise=False, credit=EqualCredit(), objective=objective, memory=memory)
