"""Rewards that share the answers of one judge: each is one of its grades.

Judges with several grades are ``rewards.remote.vlm_judges.WrittenRubricJudge`` and ``RubricJudge``, or any other
``DimensionJudge``, such as a network with several heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from genalign.scoring.shared_results import SharedResults
from genalign.types import Prompt


class DimensionJudge(Protocol):
    """A judge that grades a sample by several names at once. Judges that are equal share their answers."""

    def dimensions(self, samples: Tensor, prompts: Sequence[Prompt]) -> Mapping[str, Tensor]:
        """Grade samples (B, ...) by every name, always the same ones, (B,) each; NaN where there is no grade."""


_graded = SharedResults[Mapping[str, Tensor]]()


@dataclass(frozen=True)
class DimensionReward:
    """One grade of a judge, as a reward with its own name and weight.

    Rewards of equal judges ask once about a batch, see ``genalign.scoring.shared_results.SharedResults``. The judges of
    a configuration are equal if their settings are.

    Args:
        judge: A judge with several grades: ``rewards.remote.vlm_judges.WrittenRubricJudge``, ``RubricJudge``, or any
            other ``DimensionJudge``.
        dimension: The name of the grade that is the score, such as "Alignment".
    """

    judge: DimensionJudge
    dimension: str

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Score samples (B, ...) as (B,), float32 on the CPU; NaN where the answer has no such grade.

        Raises ValueError for a dimension that is no name of the judge.
        """
        if len(samples) != len(prompts):
            raise ValueError(f"there must be one prompt per sample, not {len(prompts)} for {len(samples)}")
        with torch.no_grad():
            grades = _graded(self.judge, samples, prompts, lambda: self.judge.dimensions(samples, prompts))
        if self.dimension not in grades:
            raise ValueError(f"the judge has no {self.dimension!r}: choose from {', '.join(grades)}")
        return grades[self.dimension].detach().float().cpu()
