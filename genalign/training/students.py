"""The guidance of a run that trains a few-step student, which has that of its teacher in its weights."""

from __future__ import annotations

from genalign.algorithms.interfaces import Objective, traits_of
from genalign.diffusion.sampling import Sampling
from genalign.types import Pipeline, RecordsStudent


def rollout_guidance(pipeline: Pipeline, sampling: Sampling, objective: Objective) -> float:
    """Return the guidance scale of a run's rollouts, which is 1 for a few-step student.

    That the weights become a student's is recorded in the pipeline, so that whatever they are saved to says so.

    Raises:
        ValueError: The student would be sampled with guidance.
    """
    student = traits_of(objective).student_guidance
    if student is not None and isinstance(pipeline, RecordsStudent):
        pipeline.record_student(student)
    guidance = sampling.guidance_scale(pipeline)
    if student is not None and guidance > 1:
        raise ValueError(
            f"this recipe trains a few-step student that has guidance {student:g} in its weights: set sampling.guidance"
            f" to 1 or null, not {guidance:g}"
        )
    return guidance
