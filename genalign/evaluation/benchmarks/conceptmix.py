"""ConceptMix (arXiv:2408.14339): an object and k further concepts in one prompt, all of which must be right."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genalign.evaluation.benchmarks.benchmark import (
    Benchmark,
    answers_of,
    average,
    by_prompt,
    distinct_prompts,
    missing_counts,
    percent,
    require_metadata,
)
from genalign.evaluation.benchmarks.tifa import QuestionJudge, as_json, ask
from genalign.evaluation.evaluate import SampleRecord
from genalign.evaluation.scorers import ExplainedScores
from genalign.runtime.text_files import read_json
from genalign.types import Prompt, PromptSet


def read_conceptmix(paths: Sequence[Path]) -> PromptSet:
    """Read files such as "300_sentences_k=2.json", a list of objects with sentence and question, a list of texts.

    The task is "k=2" as in the file's name, or by the number of questions less one: k concepts beside the object.
    Raises ValueError that names an invalid row.
    """
    prompts: list[Prompt] = []
    for path in paths:
        rows = read_json(path)
        if not isinstance(rows, list):
            raise ValueError(f"{path} is not a list: give a file of ConceptMix's sentence_collection")
        match = re.search(r"k=\d+", path.stem)
        for number, row in enumerate(rows, start=1):
            prompts.append(_prompt(f"{path}, item {number}", row, match and match[0]))
    return distinct_prompts("conceptmix", prompts)


def _prompt(where: str, row: Any, k: str | None) -> Prompt:
    """Turn a row into a prompt, without blank questions, as the original skips them."""
    text = row.get("sentence") or row.get("prompt") if isinstance(row, dict) else None
    listed = row.get("question") if isinstance(row, dict) else None
    if not isinstance(text, str) or not isinstance(listed, list) or not all(isinstance(q, str) for q in listed):
        raise ValueError(f"{where}: a row of ConceptMix has a sentence and its questions, in a list named question")
    questions = [question.strip() for question in listed if question.strip()]
    if not questions:
        raise ValueError(f"{where}: there is no question about {text!r}")
    return Prompt(text, {"tag": k or f"k={len(questions) - 1}", "questions": questions, "prompt": text})


@dataclass(frozen=True)
class FullMarkScorer:
    """1 for an image that gets a yes to every question, else 0; NaN if an answer is missing."""

    judge: QuestionJudge

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> ExplainedScores:
        """Score images (B, 3, H, W) in [0, 1]; the details are the probabilities of yes."""
        answers = ask(self.judge, samples, [require_metadata(prompt, "questions") for prompt in prompts])
        scores = [float((part >= 0.5).all()) if part.isfinite().all() else torch.nan for part in answers]
        return ExplainedScores(torch.tensor(scores), [as_json(part) for part in answers])


def aggregate_conceptmix(records: Sequence[SampleRecord], prompts: PromptSet) -> dict[str, float]:
    """Average full marks over prompts and then over k, in percent; the concept fraction is over all answers."""
    marks, fractions, everything = dict[str, list[float]](), dict[str, list[float | None]](), list[float | None]()
    for prompt, rows in by_prompt(records, prompts):
        count = len(require_metadata(prompt, "questions"))
        answers = [answer for row in rows for answer in answers_of(row, "conceptmix", count)]
        everything += answers
        marks.setdefault(prompt.task, []).append(average(row.scores["conceptmix"] for row in rows))
        right = [None if answer is None else float(answer >= 0.5) for answer in answers]
        fractions.setdefault(prompt.task, []).extend(right)
    return {
        "full mark": average(percent(values) for values in marks.values()),
        "concept fraction": average(percent(values) for values in fractions.values()),
        **{f"full mark, {k}": percent(marks[k]) for k in sorted(marks)},
        **{f"concept fraction, {k}": percent(fractions[k]) for k in sorted(fractions)},
        **missing_counts(everything, (row.scores["conceptmix"] for row in records)),
    }


CONCEPTMIX = Benchmark(
    name="conceptmix",
    read=read_conceptmix,
    needs=lambda prompts, judges: ("questions",),
    scorers=lambda judges: {"conceptmix": FullMarkScorer(judges.need("questions"))},
    aggregate=aggregate_conceptmix,
    rules=(
        "conceptmix-1: full marks and concept fraction by k, then averaged over k; yes at a probability of 1/2; an"
        " unreadable answer is missing, where the original counts no; the question judge stands for GPT-4o"
    ),
)
