"""The guidance of a run that trains a few-step student, into which the teacher's CFG scale is distilled."""

from __future__ import annotations

from genalign.algorithms.interfaces import Objective, traits_of
from genalign.diffusion.sampling import Sampling
from genalign.types import Pipeline, RecordsStudent


def rollout_guidance(pipeline: Pipeline, sampling: Sampling, objective: Objective) -> float:
    """Return the guidance scale of a run's rollouts, which is 1 for a few-step student.

    The pipeline records that its weights become a student's, so every file that they are saved to says so.

    Raises:
        ValueError: The student would be sampled with guidance.
    """
    student = traits_of(objective).student_guidance
    if student is not None and isinstance(pipeline, RecordsStudent):
        pipeline.record_student(student)
    guidance = sampling.guidance_scale(pipeline)
    if student is not None and guidance > 1:
        raise ValueError(
            f"this recipe distills guidance {student:g} into a few-step student: set sampling.guidance to 1 or null,"
            f" not {guidance:g}"
        )
    return guidance
