"""Prompts in a seeded order for training rounds, a draw that is balanced over tasks, and a held-out split."""

from __future__ import annotations

import hashlib
import itertools
import math
import random
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np

from genalign.types import Prompt, PromptSet


def drawn_in_turn(prompts: PromptSet, count: int, seed: int) -> list[Prompt]:
    """Return up to ``count`` distinct prompts: one of every task in turn, each task's in a seeded order."""
    rng = np.random.default_rng(seed % 2**64)  # NumPy takes no negative seed
    tasks = [[group[i] for i in rng.permutation(len(group))] for group in prompts.by_task().values()]
    turns = itertools.zip_longest(*tasks)
    return [prompt for turn in turns for prompt in turn if prompt is not None][:count]


def split_held_out(prompts: PromptSet, fraction: float) -> tuple[PromptSet, PromptSet]:
    """Divide a set into prompts to train on and a ``fraction`` of its different texts that is held out.

    The fraction is rounded up; of four prompts or more at least two are held out. The split depends on the texts alone,
    and each task is held out in proportion. Raises ValueError where no prompt would be left on one side.
    """
    by_task = sorted(
        {prompt.text: prompt.task for prompt in prompts.prompts}.items(),
        key=lambda item: (item[1], hashlib.sha256(item[0].encode()).digest()),
    )
    count = max(math.ceil(fraction * len(by_task)), min(2, len(by_task) // 2))
    if not 0 < count < len(by_task):
        raise ValueError(
            f"the prompt set {prompts.name!r} has {len(by_task)} prompts, of which none is left to train on or to hold"
            " out: give the evaluations prompts of their own"
        )
    held_out = {by_task[(2 * place + 1) * len(by_task) // (2 * count)][0] for place in range(count)}
    parts = [tuple(p for p in prompts.prompts if (p.text in held_out) is out) for out in (False, True)]
    return PromptSet(prompts.name, parts[0]), PromptSet(f"{prompts.name} (held out)", parts[1])


@dataclass(frozen=True)
class PromptSampler:
    """A seeded order of prompts for training, ``count`` distinct ones per round.

    The tasks take turns, so small tasks come as often as large ones; within a task every prompt comes once before
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

    def further(self, index: int, prompts: Collection[Prompt]) -> list[Prompt]:
        """List the other prompts of the set for the round ``index``, each text once, in an order of this round.

        The tasks take turns. It does not depend on what other rounds have taken, nor change their order.

        Args:
            index: The round.
            prompts: The prompts that the round has.
        """
        taken = {prompt.text for prompt in prompts}
        seed = hashlib.sha256(f"{self.seed}/{index}/further".encode()).digest()[:8]
        order = drawn_in_turn(self.prompts, len(self.prompts), int.from_bytes(seed))
        return list({prompt.text: prompt for prompt in order if prompt.text not in taken}.values())
