"""UniGenBench (arXiv:2508.20751, 2510.18701): prompts with test points, each marked by a vision-language model."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from genalign.evaluation.benchmarks.benchmark import (
    Benchmark,
    Judges,
    answers_of,
    average,
    by_prompt,
    distinct_prompts,
    missing_counts,
    percent,
    require_metadata,
)
from genalign.evaluation.benchmarks.tifa import QuestionJudge, as_json, ask, check_answers
from genalign.evaluation.evaluate import SampleRecord
from genalign.evaluation.scorers import ExplainedScores
from genalign.runtime.text_files import read_text
from genalign.types import Prompt, PromptSet

ChecklistJudge = Callable[[Tensor, Sequence[Prompt], Sequence[Sequence[str]]], Sequence[Tensor]]
"""Marks the test points of B prompts in their images (B, 3, H, W): B tensors (n,) in [0, 1], NaN for no mark."""

_KEYS = (("Testpoints", "Testpoint Description"), ("考点", "考点对应描述"))
_COLUMNS = ("prompt", "prompt_en", "prompt_zh"), ("sub_dims", "sub_dims_en", "sub_dims_zh")


def read_unigenbench(paths: Sequence[Path]) -> PromptSet:
    """Read tables such as test_prompts_en.csv, in English or Chinese, short or long.

    The metadata has ``testpoints``, such as "Attribute - Color", and their ``descriptions``. Raises ValueError that
    names an invalid row.
    """
    prompts: list[Prompt] = []
    for path in paths:
        reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
        columns = [next((name for name in names if name in (reader.fieldnames or ())), "") for names in _COLUMNS]
        if not all(columns):
            raise ValueError(
                f"{path} is not a table of UniGenBench: it needs columns such as prompt_en and sub_dims_en"
            )
        for row in reader:
            text = row[columns[0]].strip()
            points, descriptions = _testpoints(f"{path}, line {reader.line_num}", row[columns[1]])
            metadata = {"tag": "unigenbench", "testpoints": points, "descriptions": descriptions, "prompt": text}
            prompts.append(Prompt(text, metadata))
    return distinct_prompts("unigenbench", prompts)


def _testpoints(where: str, cell: str) -> tuple[list[str], list[str]]:
    """Parse the test points and their descriptions from a cell of JSON."""
    try:
        row = json.loads(cell)
        points, descriptions = next((row[first], row[second]) for first, second in _KEYS if first in row)
        if not points or len(points) != len(descriptions):
            raise ValueError(f"{len(points)} test points with {len(descriptions)} descriptions")
    except (ValueError, KeyError, TypeError, StopIteration) as error:
        raise ValueError(f"{where}: these are no test points of UniGenBench ({error!r})") from None
    return [str(point) for point in points], [str(text) for text in descriptions]


@dataclass(frozen=True)
class QuestionChecklist:
    """A ``ChecklistJudge`` that asks a question about each test point, for judges that answer yes or no."""

    judge: QuestionJudge

    def __call__(self, images: Tensor, prompts: Sequence[Prompt], points: Sequence[Sequence[str]]) -> list[Tensor]:
        """Mark test points by the probability of yes."""
        texts = [
            [f'The image should show: "{prompt.text}". Is this requirement met: {point}?' for point in group]
            for prompt, group in zip(prompts, points, strict=True)
        ]
        return ask(self.judge, images, texts)


@dataclass(frozen=True)
class ChecklistScorer:
    """The share of a prompt's test points that an image meets. NaN if a mark is missing."""

    judge: ChecklistJudge

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> ExplainedScores:
        """Score images (B, 3, H, W) in [0, 1]; the details are the marks.

        Raises ValueError where the judge returns no marks in [0, 1] for each test point.
        """
        points = [
            [
                f"{point}: {text}"
                for point, text in zip(
                    require_metadata(prompt, "testpoints"), require_metadata(prompt, "descriptions"), strict=True
                )
            ]
            for prompt in prompts
        ]
        marks = [
            check_answers(part, len(group))
            for part, group in zip(self.judge(samples, prompts, points), points, strict=True)
        ]
        scores = [float((part >= 0.5).float().mean()) if part.isfinite().all() else torch.nan for part in marks]
        return ExplainedScores(torch.tensor(scores), [as_json(part) for part in marks])


def aggregate_unigenbench(records: Sequence[SampleRecord], prompts: PromptSet) -> dict[str, float]:
    """Compute the share of test points that are met, over all images, by primary and by sub-dimension, in percent.

    The primary dimension is the text before the hyphen; the headline is the mean over primary dimensions.
    """
    primary, sub, everything = dict[str, list[float | None]](), dict[str, list[float | None]](), list[float | None]()
    for prompt, rows in by_prompt(records, prompts):
        points = require_metadata(prompt, "testpoints")
        for row in rows:
            marks = answers_of(row, "unigenbench", len(points))
            everything += marks
            for point, mark in zip(points, marks, strict=True):
                right = None if mark is None else float(mark >= 0.5)
                primary.setdefault(point.split("-", 1)[0].strip(), []).append(right)
                if "-" in point:
                    sub.setdefault(point, []).append(right)
    return {
        "unigenbench": average(percent(values) for values in primary.values()),
        **{name: percent(values) for group in (primary, sub) for name, values in sorted(group.items())},
        **missing_counts(everything, (row.scores["unigenbench"] for row in records)),
    }


def _asks_questions(judges: Judges) -> bool:
    """Whether the question judge stands for a checklist judge that is absent."""
    return judges.checklist is None and judges.questions is not None


UNIGENBENCH = Benchmark(
    name="unigenbench",
    read=read_unigenbench,
    needs=lambda prompts, judges: ("questions" if _asks_questions(judges) else "checklist",),
    scorers=lambda judges: {
        "unigenbench": ChecklistScorer(
            QuestionChecklist(judges.need("questions")) if _asks_questions(judges) else judges.need("checklist")
        )
    },
    aggregate=aggregate_unigenbench,
    rules=(
        "unigenbench-1: test points met, by dimension; the headline is the mean over primary dimensions; the wording is"
        " the judge's own; the checklist judge, or a question for each test point, stands for Gemini 2.5 Pro"
    ),
    images=4,
)
