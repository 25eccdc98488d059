"""GenEval 2 (arXiv:2512.16853): compositional prompts, judged by Soft-TIFA over the atoms of each prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

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
from genalign.evaluation.benchmarks.tifa import as_json, ask
from genalign.evaluation.evaluate import SampleRecord
from genalign.evaluation.scorers import ExplainedScores
from genalign.runtime.prompt_files import load_prompts
from genalign.types import Prompt, PromptSet

AnswerJudge = Callable[[Tensor, Sequence[str], Sequence[str]], Tensor]
"""Returns the probabilities (B,) of one-word answers to questions about images (B, 3, H, W) in [0, 1]."""


def read_geneval2(paths: Sequence[Path]) -> PromptSet:
    """Read geneval2_data.jsonl, whose rows have prompt, atom_count, vqa_list and skills.

    The task is the number of atoms, such as "3 atoms". Raises ValueError that names an invalid row.
    """
    prompts: list[Prompt] = []
    for path in paths:
        for number, prompt in enumerate(load_prompts(path).prompts, start=1):
            row = prompt.metadata or {}
            pairs, skills, atoms = row.get("vqa_list"), row.get("skills"), row.get("atom_count")
            valid = isinstance(pairs, list) and all(
                isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)
                for pair in pairs
            )
            if not pairs or not valid or not isinstance(skills, list) or len(skills) != len(pairs) or atoms is None:
                raise ValueError(
                    f"{path}, prompt {number}: a row of GenEval 2 has atom_count, a vqa_list of questions with their"
                    " answers, and the skill of each"
                )
            prompts.append(Prompt(prompt.text, {**row, "tag": f"{int(atoms)} atoms"}))
    return distinct_prompts("geneval-2", prompts)


@dataclass(frozen=True)
class SoftTifaScorer:
    """The geometric mean of the probabilities of the right answers: Soft-TIFA GM. NaN if an answer is missing."""

    judge: AnswerJudge

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> ExplainedScores:
        """Score images (B, 3, H, W) in [0, 1]; the details are the probabilities."""
        pairs = [require_metadata(prompt, "vqa_list") for prompt in prompts]
        answers = ask(lambda images, pairs: self.judge(images, *zip(*pairs, strict=True)), samples, pairs)
        return ExplainedScores(
            torch.stack([part.log().mean().exp() for part in answers]), [as_json(part) for part in answers]
        )


def aggregate_geneval2(records: Sequence[SampleRecord], prompts: PromptSet) -> dict[str, float]:
    """Average Soft-TIFA over images, then over prompts, in percent: GM per prompt, AM per atom.

    Parts are GM by number of atoms, and AM by skill over all its atoms.
    """
    geometric, arithmetic, by_atoms = [], [], dict[str, list[float | None]]()
    by_skill, everything = dict[str, list[float | None]](), list[float | None]()
    for prompt, rows in by_prompt(records, prompts):
        skills = require_metadata(prompt, "skills")
        answers = [answers_of(row, "geneval2", len(skills)) for row in rows]
        geometric.append(average(row.scores["geneval2"] for row in rows))
        arithmetic.append(average(average(group) for group in answers if None not in group))
        by_atoms.setdefault(prompt.task, []).append(geometric[-1])
        for skill, answer in ((s, a) for group in answers for s, a in zip(skills, group, strict=True)):
            by_skill.setdefault(skill, []).append(answer)
            everything.append(answer)
    return {
        "soft-tifa gm": percent(geometric),
        "soft-tifa am": percent(arithmetic),
        **{
            f"gm, {task}": percent(values)
            for task, values in sorted(by_atoms.items(), key=lambda item: int(item[0].split()[0]))
        },
        **{f"am, {skill}": percent(values) for skill, values in sorted(by_skill.items())},
        **missing_counts(everything, (row.scores["geneval2"] for row in records)),
    }


GENEVAL2 = Benchmark(
    name="geneval2",
    read=read_geneval2,
    needs=lambda prompts, judges: ("answers",),
    scorers=lambda judges: {"geneval2": SoftTifaScorer(judges.need("answers"))},
    aggregate=aggregate_geneval2,
    rules=(
        "geneval2-1: Soft-TIFA GM and AM; a first token that two spellings of an answer share counts once; the answer"
        " judge stands for Qwen3-VL-8B-Instruct"
    ),
)
