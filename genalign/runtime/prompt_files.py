"""Read prompts from .txt and .jsonl files, and the prompts.jsonl that lists the samples of a folder."""

from __future__ import annotations

import json
from pathlib import Path

from genalign.types import Prompt, PromptSet


def load_prompts(path: Path) -> PromptSet:
    """Read prompts from a ``.txt`` file, one a line, or from a ``.jsonl`` file of GenEval metadata.

    Raises FileNotFoundError, or ValueError naming the line that cannot be used.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no prompt file {path}: give a .txt (one prompt a line) or a GenEval .jsonl file")
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line]
    if not numbered:
        raise ValueError(f"{path} holds no prompts: write one a line")
    if path.suffix == ".jsonl":
        return PromptSet(path.stem, tuple(_from_json(path, number, line) for number, line in numbered))
    return PromptSet(path.stem, tuple(Prompt(line) for _, line in numbered))


def read_listing(folder: Path) -> dict[str, Prompt]:
    """Read the prompts of the files in ``folder``, by file name, from its prompts.jsonl.

    Each line is an object such as {"file_name": "a/1.png", "prompt": "a red circle"}, with optional metadata; names are
    relative to the folder. Raises FileNotFoundError, or ValueError naming the line that cannot be used.
    """
    path, prompts = folder / "prompts.jsonl", {}
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: write a line with file_name and prompt for each sample")
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            prompts[str(row["file_name"])] = Prompt(str(row["prompt"]), row)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{path}, line {number}: expected an object with "file_name" and "prompt", found {line[:80]!r}'
            ) from error
    return prompts


def _from_json(path: Path, number: int, line: str) -> Prompt:
    try:
        metadata = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
    if not isinstance(metadata, dict) or not isinstance(metadata.get("prompt"), str):
        raise ValueError(f'{path}, line {number}: each line must be an object with a text under "prompt"')
    return Prompt(metadata["prompt"], metadata)
