"""Readers of other benchmarks' prompt files, which are not in this package, into prompt sets."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path

from genalign.runtime.prompt_files import load_prompts
from genalign.types import Prompt, PromptSet

_QUOTED = re.compile(r'"([^"]+)"|“([^”]+)”')


def read_compbench(*paths: Path) -> PromptSet:
    """T2I-CompBench (arXiv:2307.06350): its files ``color_val.txt`` and so on, one prompt a line; the task is the
    category in the file's name.
    """
    made: list[Prompt] = []
    for path in paths:
        task = re.sub(r"_(train|val)\w*$", "", path.stem)
        made += [Prompt(prompt.text, {"tag": task, "prompt": prompt.text}) for prompt in load_prompts(path).prompts]
    return PromptSet("t2i-compbench", tuple(made))


def read_dpg(folder: Path, questions: Path | None = None) -> PromptSet:
    """DPG-Bench (ELLA, arXiv:2403.05135): its folder of prompts, one a ``.txt`` file.

    ``questions`` is its table (dpg_bench.csv), which gives ``questions`` in the metadata and, in the same order, their
    ``categories`` and as ``parents`` the places of those that must be true before each can be. Its own script leaves
    the table's first row out; here it is asked as well.

    Raises FileNotFoundError for a folder without prompts, ValueError for a table that does not fit.
    """
    found = sorted(folder.glob("*.txt"))
    if not found:
        raise FileNotFoundError(f"{folder} has no .txt files: give DPG-Bench's folder of prompts")
    table = {} if questions is None else _dpg_questions(questions)
    if questions is not None and (missing := [path.stem for path in found if path.stem not in table]):
        raise ValueError(f"{questions} has no questions for {missing[0]} and {len(missing) - 1} others of {folder}")
    made = []
    for path in found:
        text = path.read_text(encoding="utf-8").strip()
        made.append(Prompt(text, {"tag": "dpg", "item": path.stem, **table.get(path.stem, {}), "prompt": text}))
    return PromptSet("dpg-bench", tuple(made))


def _dpg_questions(path: Path) -> dict[str, dict[str, object]]:
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    items: dict[str, list[dict[str, str]]] = {}
    try:
        for row in rows:
            items.setdefault(row["item_id"], []).append(row)
        return {item: _dpg_item(asked) for item, asked in items.items()}
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} is not DPG-Bench's table of questions: {error!r}") from None


def _dpg_item(rows: Sequence[dict[str, str]]) -> dict[str, object]:
    place = {int(row["proposition_id"]): index for index, row in enumerate(rows)}
    needed = [[int(number) for number in row["dependency"].split(",")] for row in rows]
    return {
        "questions": [row["question_natural_language"] for row in rows],
        "categories": [row["category_broad"] for row in rows],
        "parents": [[place[number] for number in numbers if number != 0] for numbers in needed],
    }


def read_ocr(path: Path) -> PromptSet:
    """Prompts that have the text to be drawn in double quotes, one a line, as in Flow-GRPO's (arXiv:2505.05470); the
    first quoted text is ``text`` in the metadata. Raises ValueError naming a prompt without.
    """
    made: list[Prompt] = []
    for number, prompt in enumerate(load_prompts(path).prompts, start=1):
        found = _QUOTED.search(prompt.text)
        if found is None:
            raise ValueError(f"{path}, prompt {number}: no text in double quotes to be drawn in {prompt.text!r}")
        made.append(Prompt(prompt.text, {"tag": "ocr", "text": found[1] or found[2], "prompt": prompt.text}))
    return PromptSet(path.stem, tuple(made))
