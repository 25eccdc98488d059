"""Prompts in a seeded order: the sampler of training rounds, and a draw that is balanced over tasks."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from genalign.types import Prompt, PromptSet


def drawn_in_turn(prompts: PromptSet, count: int, seed: int) -> list[Prompt]:
    """Return up to ``count`` distinct prompts: one of every task in turn, each task's in a seeded order."""
    rng = np.random.default_rng(seed)
    tasks = [[group[i] for i in rng.permutation(len(group))] for group in prompts.by_task().values()]
    turns = itertools.zip_longest(*tasks)
    return [prompt for turn in turns for prompt in turn if prompt is not None][:count]


@dataclass(frozen=True)
class PromptSampler:
    """A seeded order of prompts for training, ``count`` distinct ones per round.

    The tasks take turns, so that small tasks come as often as large ones; within a task every prompt comes once before
    any comes again.
    """

    prompts: PromptSet
    count: int
    seed: int

    def __post_init__(self) -> None:
        distinct = len({prompt.text for prompt in self.prompts.prompts})
        if not 1 <= self.count <= distinct:
            raise ValueError(
                f"prompts_per_round is {self.count}, but the prompt set {self.prompts.name!r} has {distinct} different"
                " prompts: choose a number between 1 and that"
            )

    def rounds(self) -> Iterator[tuple[Prompt, ...]]:
        """Yield rounds of ``count`` prompts without end."""

        def shuffled(prompts: tuple[Prompt, ...], seed: str) -> Iterator[Prompt]:
            rng = random.Random(seed)
            while True:
                yield from rng.sample(prompts, len(prompts))

        decks = [shuffled(prompts, f"{self.seed}/{task}") for task, prompts in sorted(self.prompts.by_task().items())]
        stream = (next(deck) for _ in iter(int, 1) for deck in decks)
        while True:
            distinct: dict[str, Prompt] = {}
            while len(distinct) < self.count:
                prompt = next(stream)
                distinct.setdefault(prompt.text, prompt)
            yield tuple(distinct.values())
