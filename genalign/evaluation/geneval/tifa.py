"""Soft scores from yes/no questions: what a prompt asks for, put to any judge of images and questions.

In the manner of TIFA (arXiv:2303.11897) and its soft form in GenEval 2 (arXiv:2512.16853): the score of an image is a
mean of the probabilities of "yes".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from genalign.evaluation.geneval.grammar import NUMBERS, with_article
from genalign.evaluation.geneval.metadata import Clause, PromptSpec
from genalign.evaluation.geneval.vocabulary import natural_plural
from genalign.types import AnyCallable, Prompt

QuestionJudge = Callable[[Tensor, Sequence[str]], Tensor]
"""Probabilities (B,) of the answer "yes" for images (B, 3, H, W) in [0, 1] and a question for each."""

_WORDS = {number: word for word, number in NUMBERS.items()}
_PLACES = {"left of": "to the left of", "right of": "to the right of"}


@dataclass(frozen=True)
class Question:
    """A question whose answer is yes for a right image; ``parents`` are the numbers of those that it rests on."""

    text: str
    parents: tuple[int, ...] = ()


def questions(prompt: Prompt) -> tuple[Question, ...]:
    """The questions in a prompt's metadata (see ``benchmarks.read_dpg``), or those of its GenEval clauses: whether the
    objects are there, in their number, of their colour, and in their place. ValueError for a prompt without either.
    """
    if prompt.metadata is not None and "questions" in prompt.metadata:
        return _listed(prompt.text, prompt.metadata["questions"], prompt.metadata.get("parents"))
    include = PromptSpec.of(prompt).include
    made = [_presence(clause) for clause in include]
    for index, clause in enumerate(include):
        verb = "Is" if clause.count == 1 else "Are"
        if clause.color is not None:
            made.append(Question(f"{verb} {_the(clause)} {clause.color}?", (index,)))
        if clause.relation is not None and clause.target is not None:
            place = _PLACES.get(clause.relation, clause.relation)
            other = _the(include[clause.target])
            made.append(Question(f"{verb} {_the(clause)} {place} {other}?", (index, clause.target)))
    return tuple(made)


def _listed(about: str, texts: Any, parents: Any) -> tuple[Question, ...]:
    """Those of a metadata object, which somebody else may have written."""
    if not isinstance(texts, list | tuple) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"the questions of {about!r} must be a list of at least one text, not {texts!r}")
    needed = [()] * len(texts) if parents is None else parents
    if len(needed) != len(texts) or not {number for row in needed for number in row} <= set(range(len(texts))):
        raise ValueError(f"the parents of {about!r} must be a list of places in its {len(texts)} questions for each")
    return tuple(Question(text, tuple(row)) for text, row in zip(texts, needed, strict=True))


def _presence(clause: Clause) -> Question:
    if clause.count == 1:
        return Question(f"Is there {with_article(clause.name)} in the image?")
    number = _WORDS.get(clause.count, str(clause.count))
    return Question(f"Are there exactly {number} {natural_plural(clause.name)} in the image?")


def _the(clause: Clause) -> str:
    return f"the {clause.name if clause.count == 1 else natural_plural(clause.name)}"


@dataclass(frozen=True)
class TifaReward:
    """The mean probability of "yes" over the questions of a prompt, in [0, 1], by a ``QuestionJudge``.

    ``mean`` is "arithmetic" (each question alone) or "geometric" (all of them at once). Where ``gate`` is given, an
    answer counts as 0 if one that it rests on is below that probability, as in DPG-Bench.
    """

    judge: AnyCallable
    mean: Literal["arithmetic", "geometric"] = "arithmetic"
    gate: float | None = None

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores (B,), float32 on the CPU, of images (B, 3, H, W) in [0, 1]; NaN where a question has no answer.

        All questions of the batch go to the judge at once. Raises ValueError for a prompt without questions, or for
        answers that are not probabilities.
        """
        asked = [questions(prompt) for prompt in prompts]
        rows = torch.tensor([row for row, found in enumerate(asked) for _ in found], device=samples.device)
        texts = [question.text for found in asked for question in found]
        answers = _checked(self.judge(samples[rows], texts), len(texts))
        parts = torch.split(answers, [len(found) for found in asked])
        return torch.stack([self._score(part, found) for part, found in zip(parts, asked, strict=True)])

    def _score(self, answers: Tensor, asked: Sequence[Question]) -> Tensor:
        counted = answers if self.gate is None else gated(answers, asked, self.gate)
        return counted.mean() if self.mean == "arithmetic" else counted.log().mean().exp()


def _checked(answers: Tensor, count: int) -> Tensor:
    if answers.shape != (count,):
        raise ValueError(f"the judge answered {tuple(answers.shape)} for {count} questions: it must give ({count},)")
    answers = answers.detach().float().cpu()
    if bool(((answers < -1e-4) | (answers > 1 + 1e-4)).any()):
        raise ValueError("the judge's answers are not probabilities: they must be in [0, 1]")
    return answers.clamp(0, 1)


def gated(answers: Tensor, asked: Sequence[Question], gate: float) -> Tensor:
    """Answers (n,), 0 where one that they rest on, as it was answered itself, is below ``gate``."""
    held = [all(float(answers[parent]) >= gate for parent in question.parents) for question in asked]
    return answers * torch.tensor(held, dtype=answers.dtype)
