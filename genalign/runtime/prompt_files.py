"""Read prompts from .txt and .jsonl files, and the prompts.jsonl that lists the samples of a folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from genalign.types import Prompt, PromptSet


def load_prompts(path: Path) -> PromptSet:
    """Read prompts from a ``.txt`` file, one a line, or from a ``.jsonl`` file of GenEval metadata.

    Raises FileNotFoundError, or ValueError naming the line that cannot be used.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no prompt file {path}: give a .txt (one prompt a line) or a GenEval .jsonl file")
    if path.suffix == ".jsonl":
        prompts = [Prompt(row["prompt"], row) for row in _rows(path, "prompt")]
    else:
        prompts = [Prompt(line.strip()) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"{path} holds no prompts: write one a line")
    return PromptSet(path.stem, tuple(prompts))


def read_listing(folder: Path) -> dict[str, Prompt]:
    """Read the prompts of the files in ``folder``, by file name, from its prompts.jsonl.

    Each line is an object such as {"file_name": "a/1.png", "prompt": "a red circle"}, with optional metadata; names are
    relative to the folder. Raises FileNotFoundError, or ValueError naming the line that cannot be used.
    """
    path = folder / "prompts.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: write a line with file_name and prompt for each sample")
    return {row["file_name"]: Prompt(row["prompt"], row) for row in _rows(path, "file_name", "prompt")}


def _rows(path: Path, *texts: str) -> Iterator[dict[str, Any]]:
    """Yield the objects of a .jsonl file. Raises ValueError for a line without a text under each of ``texts``."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in texts):
            names = " and ".join(f'"{name}"' for name in texts)
            raise ValueError(f"{path}, line {number}: expected an object with {names}, found {line[:80]!r}")
        yield row
