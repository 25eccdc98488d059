"""Judges that answer from a table, and images that they tell apart by their gray value."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from genalign.evaluation.benchmarks import Benchmark, Judges
from genalign.evaluation.evaluate import SampleRecord
from genalign.evaluation.scorers import ExplainedScores
from genalign.types import PromptSet


@dataclass(frozen=True)
class TableJudge:
    """Answers (image number, question) from a table; NaN for what the table does not hold. Image n is gray n / 100."""

    table: Mapping[tuple[int, str], float]
    questions: list[str] = field(default_factory=list)

    def __call__(self, images: Tensor, questions: Sequence[str]) -> Tensor:
        self.questions.extend(questions)
        keys = zip(image_numbers(images), questions, strict=True)
        return torch.tensor([self.table.get(key, math.nan) for key in keys])


def image_numbers(images: Tensor) -> list[int]:
    return [round(float(image.mean()) * 100) for image in images]


def gray_images(count: int, size: int = 2) -> Tensor:
    return torch.stack([torch.full((3, size, size), n / 100) for n in range(count)])


def score_images(
    benchmark: Benchmark, prompts: PromptSet, judges: Judges, per_prompt: int = 1, images: Tensor | None = None
) -> tuple[list[SampleRecord], dict[str, float]]:
    """Score images, gray ones by default, ``per_prompt`` for each prompt in order, and aggregate the records."""
    listed = [prompt for prompt in prompts.prompts for _ in range(per_prompt)]
    images = gray_images(len(listed)) if images is None else images
    scores, details = list[dict[str, float]](), list[dict[str, object]]()
    for name, scorer in benchmark.scorers(judges).items():
        judgment = scorer(images, listed)
        assert isinstance(judgment, ExplainedScores) and judgment.scores.shape == (len(listed),)
        scores.append({name: judgment.scores.tolist()})
        details.append({name: list(judgment.details)})
    records = [
        SampleRecord(
            prompt.text,
            prompt.task,
            i % per_prompt,
            i,
            None,
            {name: values[i] for column in scores for name, values in column.items()},
            {name: values[i] for column in details for name, values in column.items()},
        )
        for i, prompt in enumerate(listed)
    ]
    return records, benchmark.aggregate(records, prompts)
