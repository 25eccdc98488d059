"""Prompt files, and the order in which training meets prompts."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from genalign.types import Prompt, PromptSet


def load_prompts(path: Path) -> PromptSet:
    """Prompts from a ``.txt`` file (one a line) or a ``.jsonl`` file of GenEval metadata (``prompt``, ``tag``, ...).

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
    """The prompts of the files in ``folder`` by their names relative to it, from its prompts.jsonl: an object a line,
    {"file_name": "a/1.png", "prompt": "a red circle"}, and metadata.

    Raises FileNotFoundError, or ValueError naming the line that cannot be used.
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


def drawn_in_turn(prompts: PromptSet, count: int, seed: int) -> list[Prompt]:
    """``count`` distinct prompts, or all where there are fewer: one of every task in turn, each task's in a seeded
    order."""
    rng = np.random.default_rng(seed)
    tasks = [[group[i] for i in rng.permutation(len(group))] for group in prompts.by_task().values()]
    turns = itertools.zip_longest(*tasks)
    return [prompt for turn in turns for prompt in turn if prompt is not None][:count]


def _from_json(path: Path, number: int, line: str) -> Prompt:
    try:
        metadata = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
    if not isinstance(metadata, dict) or not isinstance(metadata.get("prompt"), str):
        raise ValueError(f'{path}, line {number}: each line must be an object with a text under "prompt"')
    return Prompt(metadata["prompt"], metadata)


@dataclass(frozen=True)
class PromptSampler:
    """``count`` distinct prompts per round, in a seeded order that meets every prompt of a task before any again, and
    the tasks in turn, so that small tasks are met as often as large ones."""

    prompts: PromptSet
    count: int
    seed: int

    def __post_init__(self) -> None:
        if not 1 <= self.count <= len(self.prompts):
            raise ValueError(
                f"prompts_per_round is {self.count}, but the prompt set {self.prompts.name!r} has {len(self.prompts)}:"
                " choose a number between 1 and that"
            )

    def rounds(self) -> Iterator[tuple[Prompt, ...]]:
        """Endless rounds of ``count`` prompts."""
        decks = [_deck(prompts, f"{self.seed}/{task}") for task, prompts in sorted(self.prompts.by_task().items())]
        stream = (next(deck) for _ in iter(int, 1) for deck in decks)
        while True:
            chosen: dict[str, Prompt] = {}
            while len(chosen) < self.count:
                prompt = next(stream)
                chosen.setdefault(prompt.text, prompt)
            yield tuple(chosen.values())


def _deck(prompts: tuple[Prompt, ...], seed: str) -> Iterator[Prompt]:
    rng = random.Random(seed)
    while True:
        yield from rng.sample(prompts, len(prompts))
