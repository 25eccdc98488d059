"""Soft scores from yes/no questions about a prompt's content, answered by any visual question answering model.

As in TIFA (arXiv:2303.11897) and its soft form in GenEval 2 (arXiv:2512.16853), an image's score is a mean of the
probabilities of "yes".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from genalign.evaluation.geneval.grammar import NUMBER_WORDS, with_article
from genalign.evaluation.geneval.metadata import Clause, PromptSpec
from genalign.evaluation.geneval.vocabulary import natural_plural
from genalign.types import AnyCallable, Prompt

QuestionJudge = Callable[[Tensor, Sequence[str]], Tensor]
"""Returns probabilities (B,) of the answer "yes" for images (B, 3, H, W) in [0, 1] and one question per image."""

_PLACES = {"left of": "to the left of", "right of": "to the right of"}


@dataclass(frozen=True)
class Question:
    """A question whose answer is yes for a right image, and the numbers of the ``parents`` that it presupposes."""

    text: str
    parents: tuple[int, ...] = ()


def questions(prompt: Prompt) -> tuple[Question, ...]:
    """Return the questions in a prompt's metadata (see ``other_benchmarks.read_dpg``), or derive them from its clauses.

    The clauses of GenEval ask for objects in their number, color and place. Raises ValueError for a prompt that has
    neither questions nor clauses.
    """
    if prompt.metadata is not None and "questions" in prompt.metadata:
        return _metadata_questions(prompt.text, prompt.metadata["questions"], prompt.metadata.get("parents"))
    include, result = PromptSpec.from_prompt(prompt).include, []
    for clause in include:
        if clause.count == 1:
            result.append(Question(f"Is there {with_article(clause.name)} in the image?"))
        else:
            number = NUMBER_WORDS.get(clause.count, clause.count)
            result.append(Question(f"Are there exactly {number} {natural_plural(clause.name)} in the image?"))
    for index, clause in enumerate(include):
        verb = "Is" if clause.count == 1 else "Are"
        if clause.color is not None:
            result.append(Question(f"{verb} {_the(clause)} {clause.color}?", (index,)))
        if clause.relation is not None and clause.target is not None:
            place = _PLACES.get(clause.relation, clause.relation)
            target = _the(include[clause.target])
            result.append(Question(f"{verb} {_the(clause)} {place} {target}?", (index, clause.target)))
    return tuple(result)


def _metadata_questions(prompt: str, texts: Any, parents: Any) -> tuple[Question, ...]:
    """Check and convert the questions in metadata, which may come from any file."""
    if not isinstance(texts, list | tuple) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"the questions of {prompt!r} must be a list of at least one text, not {texts!r}")
    rows = [()] * len(texts) if parents is None else parents
    if len(rows) != len(texts) or not {number for row in rows for number in row} <= set(range(len(texts))):
        raise ValueError(
            f"the parents of {prompt!r} must be a list with one entry for each of its {len(texts)} questions: the"
            " indices of other questions"
        )
    return tuple(Question(text, tuple(row)) for text, row in zip(texts, rows, strict=True))


def _the(clause: Clause) -> str:
    return f"the {clause.name if clause.count == 1 else natural_plural(clause.name)}"


@dataclass(frozen=True)
class TifaReward:
    """The mean probability of "yes" over the questions of a prompt, in [0, 1], by a ``QuestionJudge``.

    ``mean`` is "arithmetic" (every question counts alone) or "geometric" (one "no" makes the score 0). With ``gate``,
    an answer counts as 0 if the answer to one of its parents is below that probability, as in DPG-Bench.
    """

    judge: AnyCallable
    mean: Literal["arithmetic", "geometric"] = "arithmetic"
    gate: float | None = None

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Return scores (B,), float32 on the CPU, of images (B, 3, H, W) in [0, 1]; NaN if a question has no answer.

        The judge gets all questions of the batch at once. Raises ValueError for a prompt without questions, or for
        answers that are not probabilities.
        """
        groups = [questions(prompt) for prompt in prompts]
        texts = [question.text for group in groups for question in group]
        rows = torch.tensor([row for row, group in enumerate(groups) for _ in group], device=samples.device)
        answers = self.judge(samples[rows], texts)
        if answers.shape != (len(texts),):
            raise ValueError(
                f"the judge answered {tuple(answers.shape)} for {len(texts)} questions: it must return ({len(texts)},)"
            )
        answers = answers.detach().float().cpu()
        if bool(((answers < -1e-4) | (answers > 1 + 1e-4)).any()):
            raise ValueError("the judge's answers are not probabilities: they must be in [0, 1]")

        scores = []
        for part, group in zip(torch.split(answers.clamp(0, 1), [len(group) for group in groups]), groups, strict=True):
            if self.gate is not None:  # by the parents' answers before gating
                passed = [all(float(part[parent]) >= self.gate for parent in item.parents) for item in group]
                part = part * torch.tensor(passed, dtype=part.dtype)
            scores.append(part.mean() if self.mean == "arithmetic" else part.log().mean().exp())
        return torch.stack(scores)
