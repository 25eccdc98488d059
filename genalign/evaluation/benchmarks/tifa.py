"""Soft scores from yes/no questions about a prompt's content, answered by any visual question answering model.

As in TIFA (arXiv:2303.11897) and its soft form in GenEval 2 (arXiv:2512.16853), an image's score is a mean of the
probabilities of "yes".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from genalign.evaluation.geneval.grammar import NUMBER_WORDS, with_article
from genalign.evaluation.geneval.metadata import Clause, PromptSpec
from genalign.evaluation.geneval.vocabulary import natural_plural
from genalign.scoring.shared_results import SharedResults
from genalign.types import AnyCallable, Metadata, Prompt

QuestionJudge = Callable[[Tensor, Sequence[str]], Tensor]
"""Returns probabilities (B,) of the answer "yes" for images (B, 3, H, W) in [0, 1] and one question per image."""

QUESTIONS_AT_ONCE = 64
"""Questions in one call of a judge: each brings a copy of its image."""

_PLACES = {"left of": "to the left of", "right of": "to the right of"}


@dataclass(frozen=True)
class Question:
    """A question whose answer is yes for a right image, and the numbers of the ``parents`` that it presupposes.

    ``part`` is what it asks about: "count", "color" or "position", or the category in a benchmark's metadata.
    """

    text: str
    parents: tuple[int, ...] = ()
    part: str | None = None


def questions(prompt: Prompt) -> tuple[Question, ...]:
    """Return the questions in a prompt's metadata, or derive them from its clauses.

    ``genalign.evaluation.benchmarks.dpg.read_dpg`` is an example of questions; GenEval's clauses ask for objects in
    their number, color and place. Raises ValueError for a prompt that has neither.
    """
    if prompt.metadata is not None and "questions" in prompt.metadata:
        return _metadata_questions(prompt.text, prompt.metadata)
    include, result = PromptSpec.from_prompt(prompt).include, []
    for clause in include:
        if clause.count == 1:
            result.append(Question(f"Is there {with_article(clause.name)} in the image?", part="count"))
        else:
            number = NUMBER_WORDS.get(clause.count, clause.count)
            text = f"Are there exactly {number} {natural_plural(clause.name)} in the image?"
            result.append(Question(text, part="count"))
    for index, clause in enumerate(include):
        verb = "Is" if clause.count == 1 else "Are"
        if clause.color is not None:
            result.append(Question(f"{verb} {_the(clause)} {clause.color}?", (index,), "color"))
        if clause.relation is not None and clause.target is not None:
            place = _PLACES.get(clause.relation, clause.relation)
            target = _the(include[clause.target])
            result.append(Question(f"{verb} {_the(clause)} {place} {target}?", (index, clause.target), "position"))
    return tuple(result)


def _metadata_questions(prompt: str, metadata: Metadata) -> tuple[Question, ...]:
    """Check and convert the questions in metadata, which may come from any file."""
    texts, parents, categories = metadata["questions"], metadata.get("parents"), metadata.get("categories")
    if not isinstance(texts, list | tuple) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"the questions of {prompt!r} must be a list of at least one text, not {texts!r}")
    rows = [()] * len(texts) if parents is None else parents
    if len(rows) != len(texts) or not {number for row in rows for number in row} <= set(range(len(texts))):
        raise ValueError(
            f"the parents of {prompt!r} must be a list with one entry for each of its {len(texts)} questions: the"
            " indices of other questions"
        )
    names = [None] * len(texts) if categories is None else categories
    if len(names) != len(texts):
        raise ValueError(f"the categories of {prompt!r} must be a list with one for each of its {len(texts)} questions")
    return tuple(Question(text, tuple(row), part) for text, row, part in zip(texts, rows, names, strict=True))


def _the(clause: Clause) -> str:
    return f"the {clause.name if clause.count == 1 else natural_plural(clause.name)}"


_answered = SharedResults[list[Tensor]]()


@dataclass(frozen=True)
class TifaReward:
    """The mean probability of "yes" over the questions of a prompt, in [0, 1], by a ``QuestionJudge``.

    ``mean`` is "arithmetic" (every question counts alone) or "geometric" (one "no" makes the score 0). With ``gate``,
    an answer counts as 0 if the answer to one of its parents is below that probability, as in DPG-Bench. ``part``
    selects the questions of one part: "count", "color" or "position", or the beginning of a category in the metadata,
    such as "entity" for "entity - whole"; a prompt that does not ask for it scores 1.0. As several rewards with equal
    judges, one for each part, they ask the questions of a batch once.
    """

    judge: AnyCallable
    mean: Literal["arithmetic", "geometric"] = "arithmetic"
    gate: float | None = None
    part: str | None = None

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Return scores (B,), float32 on the CPU, of images (B, 3, H, W) in [0, 1]; NaN if a question has no answer.

        Raises ValueError for a prompt without questions, or whose questions have no parts, or for answers that are not
        probabilities.
        """
        groups = [questions(prompt) for prompt in prompts]
        texts = [[question.text for question in group] for group in groups]
        answered = _answered(self.judge, samples, prompts, lambda: ask(self.judge, samples, texts))
        scores = []
        for answers, group, prompt in zip(answered, groups, prompts, strict=True):
            if self.gate is not None:  # by the parents' answers before gating
                passed = [all(float(answers[parent]) >= self.gate for parent in item.parents) for item in group]
                answers = answers * torch.tensor(passed, dtype=answers.dtype)
            if self.part is not None:
                answers = answers[_places(group, self.part, prompt)]
            if not len(answers):
                scores.append(torch.tensor(1.0))
            else:
                scores.append(answers.mean() if self.mean == "arithmetic" else answers.log().mean().exp())
        return torch.stack(scores)


def _places(group: Sequence[Question], part: str, prompt: Prompt) -> list[int]:
    """Return the numbers of the questions of a part. Raises ValueError if questions have none."""
    if any(question.part is None for question in group):
        raise ValueError(
            f"the questions of {prompt.text!r} have no categories, so {part!r} selects none: add them to its"
            " metadata, or leave part out"
        )
    return [place for place, question in enumerate(group) if str(question.part).split(" - ")[0] == part]


def ask(judge: QuestionJudge, samples: Tensor, texts: Sequence[Sequence[str]]) -> list[Tensor]:
    """Ask several questions about each image (B, 3, H, W), 64 at a time.

    Args:
        judge: Answers them.
        samples: B images.
        texts: At least one question for each of them.

    Returns:
        Probabilities of "yes", (n,) float32 on the CPU for the n questions of an image; NaN for no answer.

    Raises:
        ValueError: the judge returns another shape, or no probabilities.
    """
    pairs = [(row, text) for row, group in enumerate(texts) for text in group]
    parts = []
    for start in range(0, len(pairs), QUESTIONS_AT_ONCE):
        rows, part = zip(*pairs[start : start + QUESTIONS_AT_ONCE], strict=True)
        parts.append(check_answers(judge(samples[list(rows)], list(part)), len(part)))
    return list(torch.split(torch.cat(parts), [len(group) for group in texts]))


def check_answers(answers: Tensor, count: int) -> Tensor:
    """Return the probabilities (count,) of a judge, float32 on the CPU. Raises ValueError where they are none."""
    if answers.shape != (count,):
        raise ValueError(f"the judge answered {tuple(answers.shape)} for {count} questions: it must return ({count},)")
    answers = answers.detach().float().cpu()
    if bool(((answers < -1e-4) | (answers > 1 + 1e-4)).any()):
        raise ValueError("the judge's answers are not probabilities: they must be in [0, 1]")
    return answers.clamp(0, 1)


def as_json(answers: Tensor) -> list[float | None]:
    """Convert probabilities (n,) to JSON types, with None for a missing answer."""
    return [value if math.isfinite(value) else None for value in answers.tolist()]
