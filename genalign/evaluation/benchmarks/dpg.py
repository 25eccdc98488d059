"""DPG-Bench (ELLA, arXiv:2403.05135): long prompts, judged by yes/no questions that depend on each other."""

from __future__ import annotations

import csv
import io
import logging
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
from genalign.evaluation.benchmarks.tifa import QuestionJudge, as_json, ask, questions
from genalign.evaluation.evaluate import SampleRecord
from genalign.evaluation.scorers import ExplainedScores
from genalign.runtime.text_files import read_text
from genalign.types import Prompt, PromptSet

_log = logging.getLogger(__name__)


def read_dpg(paths: Sequence[Path]) -> PromptSet:
    """Read the table dpg_bench.csv, and with it the folder of prompts, one ``.txt`` file each, if that is given.

    The metadata has ``questions``, ``categories`` ("entity - whole") and ``parents``: for each question the indices of
    those whose answer must be yes before it counts. Raises FileNotFoundError for a missing file or a folder without
    prompts, ValueError for a table that does not fit.
    """
    folders, tables = [path for path in paths if path.is_dir()], [path for path in paths if not path.is_dir()]
    if len(tables) != 1 or len(folders) > 1:
        raise ValueError("give DPG-Bench's table dpg_bench.csv, and its folder of prompts if you have it")
    items = _read_table(tables[0])
    texts = {item: str(row["text"]) for item, row in items.items()}
    if folders:
        texts = {path.stem: read_text(path).strip() for path in sorted(folders[0].glob("*.txt"))}
        if not texts:
            raise FileNotFoundError(f"{folders[0]} has no .txt files: give DPG-Bench's folder of prompts")
        if missing := [item for item in texts if item not in items]:
            raise ValueError(
                f"{tables[0]} has no questions for {missing[0]} and {len(missing) - 1} others of {folders[0]}"
            )
    prompts = [
        Prompt(text, {"tag": "dpg", "item": item, **items[item]["metadata"], "prompt": text})
        for item, text in texts.items()
    ]
    return distinct_prompts("dpg-bench", prompts)


def _read_table(path: Path) -> dict[str, dict[str, Any]]:
    """Read text and questions of each item, with the numbers of propositions replaced by indices."""
    rows_by_item: dict[str, list[dict[str, str]]] = {}
    table: dict[str, dict[str, Any]] = {}
    unknown = 0
    try:
        for row in csv.DictReader(io.StringIO(read_text(path), newline="")):
            rows_by_item.setdefault(row["item_id"], []).append(row)
        for item, rows in rows_by_item.items():
            index = {int(row["proposition_id"]): i for i, row in enumerate(rows)}
            parents = [[int(number) for number in row["dependency"].split(",")] for row in rows]
            unknown += sum(number != 0 and number not in index for numbers in parents for number in numbers)
            metadata = {
                "questions": [row["question_natural_language"] for row in rows],
                "categories": [
                    " - ".join(filter(None, (row["category_broad"], row["category_detailed"]))) for row in rows
                ],
                "parents": [[index[number] for number in numbers if number in index] for numbers in parents],
            }
            table[item] = {"text": rows[0]["text"].strip(), "metadata": metadata}
    except (KeyError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not DPG-Bench's table of questions: {error!r}") from None
    if unknown:
        _log.warning("dependencies on no question of their item are ignored: %d in %s", unknown, path)
    return table


@dataclass(frozen=True)
class DpgScorer:
    """The share of a prompt's questions that are answered yes, where a question counts only if its parents do.

    As in the original, a child of a zeroed question is zeroed too. NaN if an answer is missing.
    """

    judge: QuestionJudge

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> ExplainedScores:
        """Score images (B, 3, H, W) in [0, 1]; the details are the probabilities of yes."""
        groups = [questions(prompt) for prompt in prompts]
        answers = ask(self.judge, samples, [[question.text for question in group] for group in groups])
        scores = []
        for part, group in zip(answers, groups, strict=True):
            counted = (part >= 0.5).float()
            for number, question in enumerate(group):  # in the table's order, as the original
                if any(counted[parent] == 0 for parent in question.parents):
                    counted[number] = 0
            scores.append(counted.mean() if part.isfinite().all() else torch.tensor(torch.nan))
        return ExplainedScores(torch.stack(scores), [as_json(part) for part in answers])


def aggregate_dpg(records: Sequence[SampleRecord], prompts: PromptSet) -> dict[str, float]:
    """Average the scores over images, then over prompts; categories are the shares of answers that are yes, in percent.

    Categories count answers before gating, of all images.
    """
    means, broad, detailed = [], dict[str, list[float | None]](), dict[str, list[float | None]]()
    everything: list[float | None] = []
    for prompt, rows in by_prompt(records, prompts):
        means.append(average(row.scores["dpg"] for row in rows))
        categories = require_metadata(prompt, "categories")
        answers = [answer for row in rows for answer in answers_of(row, "dpg", len(categories))]
        everything += answers
        for category, answer in zip(categories * len(rows), answers, strict=True):
            right = None if answer is None else float(answer >= 0.5)
            broad.setdefault(category.split(" - ")[0], []).append(right)
            if " - " in category:
                detailed.setdefault(category, []).append(right)
    parts = {name: percent(values) for group in (broad, detailed) for name, values in sorted(group.items())}
    return {"dpg": percent(means), **parts, **missing_counts(everything, (row.scores["dpg"] for row in records))}


DPG = Benchmark(
    name="dpg",
    read=read_dpg,
    needs=lambda prompts, judges: ("questions",),
    scorers=lambda judges: {"dpg": DpgScorer(judges.need("questions"))},
    aggregate=aggregate_dpg,
    rules=(
        "dpg-1: gated yes/no questions; yes at a probability of 1/2; the table's first row counts; categories over all"
        " images; the question judge stands for mPLUG-large"
    ),
    images=4,
)
