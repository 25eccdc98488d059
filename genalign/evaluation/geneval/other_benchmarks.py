"""Readers for the prompt files of other benchmarks, which this package does not contain."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

from genalign.runtime.prompt_files import load_prompts
from genalign.runtime.text_files import read_text
from genalign.types import Prompt, PromptSet


def read_compbench(*paths: Path) -> PromptSet:
    """Read files of T2I-CompBench (arXiv:2307.06350) such as ``color_val.txt``, with one prompt per line.

    The task is the category in the file's name.
    """
    prompts: list[Prompt] = []
    for path in paths:
        task = re.sub(r"_(train|val)\w*$", "", path.stem)
        prompts += [Prompt(prompt.text, {"tag": task, "prompt": prompt.text}) for prompt in load_prompts(path).prompts]
    return PromptSet("t2i-compbench", tuple(prompts))


def read_dpg(folder: Path, questions: Path | None = None) -> PromptSet:
    """Read DPG-Bench (ELLA, arXiv:2403.05135) from its folder of prompts, one ``.txt`` file each.

    ``questions`` is its table dpg_bench.csv. The metadata then has ``questions``, ``categories`` and ``parents``: for
    each question its category, and the indices of the questions whose answer must be yes before it counts. DPG-Bench's
    own script skips the table's first row; it is included here.

    Raises FileNotFoundError for a folder without prompts, ValueError for a table that does not fit.
    """
    paths = sorted(folder.glob("*.txt"))
    if not paths:
        raise FileNotFoundError(f"{folder} has no .txt files: give DPG-Bench's folder of prompts")
    table = {} if questions is None else _read_dpg_questions(questions)
    if questions is not None and (missing := [path.stem for path in paths if path.stem not in table]):
        raise ValueError(f"{questions} has no questions for {missing[0]} and {len(missing) - 1} others of {folder}")
    prompts = []
    for path in paths:
        text = read_text(path).strip()
        prompts.append(Prompt(text, {"tag": "dpg", "item": path.stem, **table.get(path.stem, {}), "prompt": text}))
    return PromptSet("dpg-bench", tuple(prompts))


def _read_dpg_questions(path: Path) -> dict[str, dict[str, object]]:
    """Read the questions of each item, with the numbers of propositions replaced by indices."""
    items: dict[str, list[dict[str, str]]] = {}
    table: dict[str, dict[str, object]] = {}
    try:
        for row in csv.DictReader(io.StringIO(read_text(path), newline="")):
            items.setdefault(row["item_id"], []).append(row)
        for item, rows in items.items():
            index = {int(row["proposition_id"]): i for i, row in enumerate(rows)}
            parents = [[int(number) for number in row["dependency"].split(",")] for row in rows]
            table[item] = {
                "questions": [row["question_natural_language"] for row in rows],
                "categories": [row["category_broad"] for row in rows],
                "parents": [[index[number] for number in numbers if number != 0] for numbers in parents],
            }
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} is not DPG-Bench's table of questions: {error!r}") from None
    return table


def read_ocr(path: Path) -> PromptSet:
    """Read prompts that quote the text to draw, one per line, such as Flow-GRPO's (arXiv:2505.05470).

    The first text in double quotes becomes ``text`` in the metadata. Raises ValueError for a prompt without quotes.
    """
    prompts: list[Prompt] = []
    for number, prompt in enumerate(load_prompts(path).prompts, start=1):
        match = re.search(r'"([^"]+)"|“([^”]+)”', prompt.text)
        if match is None:
            raise ValueError(f"{path}, prompt {number}: no text in double quotes to be drawn in {prompt.text!r}")
        prompts.append(Prompt(prompt.text, {"tag": "ocr", "text": match[1] or match[2], "prompt": prompt.text}))
    return PromptSet(path.stem, tuple(prompts))
