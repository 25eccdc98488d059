"""Where candidates came from and what became of them: what a report draws as trees."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Life:
    """One candidate: its prompt, the candidate it was copied from, the steps at which it began and ended, and its
    scores, as (steps done, values)."""

    prompt: int
    parent: int | None
    born: int
    scores: list[tuple[int, tuple[float, ...]]] = field(default_factory=list)
    ended: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON; a score that failed is null."""
        scores = [[step, [value if math.isfinite(value) else None for value in values]] for step, values in self.scores]
        return {
            "prompt": self.prompt,
            "parent": self.parent,
            "born": self.born,
            "scores": scores,
            "ended": self.ended,
        }


class Lineage:
    """All candidates of a run, by number."""

    def __init__(self) -> None:
        self.lives: list[Life] = []

    def born(self, prompts: Sequence[int], parents: Sequence[int | None], step: int) -> tuple[int, ...]:
        """Begin candidates; their numbers."""
        first = len(self.lives)
        self.lives += [Life(prompt, parent, step) for prompt, parent in zip(prompts, parents, strict=True)]
        return tuple(range(first, len(self.lives)))

    def scored(self, names: Sequence[int], step: int, scores: Sequence[Sequence[float]]) -> None:
        """Note the scores of candidates that are ``step`` steps on their way."""
        for name, values in zip(names, scores, strict=True):
            self.lives[name].scores.append((step, tuple(values)))

    def ended(self, names: Sequence[int], step: int) -> None:
        """Give candidates up, or finish them."""
        for name in names:
            self.lives[name].ended = step

    def as_list(self) -> list[dict[str, Any]]:
        """For JSON, in the order of their numbers."""
        return [life.as_dict() for life in self.lives]
