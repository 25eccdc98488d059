"""The candidates of a search as trees: where each was copied from, its scores, and the step at which it ended."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Node:
    """One candidate of a search.

    ``parent`` is the number of the candidate that it was copied from, ``start_step`` and ``end_step`` count the steps
    done when it was added and closed, ``scores`` holds (steps done, one value per reward).
    """

    prompt: int
    parent: int | None
    start_step: int
    scores: list[tuple[int, tuple[float, ...]]] = field(default_factory=list)
    end_step: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """JSON form, in which the score of a failed reward is null."""
        scores = [[step, [value if math.isfinite(value) else None for value in values]] for step, values in self.scores]
        return {
            "prompt": self.prompt,
            "parent": self.parent,
            "born": self.start_step,
            "scores": scores,
            "ended": self.end_step,
        }


class Lineage:
    """All candidates of a search, numbered in the order in which they were added."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []

    def add(self, prompts: Sequence[int], parents: Sequence[int | None], step: int) -> tuple[int, ...]:
        """Add candidates that start after ``step`` steps, and return their numbers."""
        first = len(self.nodes)
        self.nodes += [Node(prompt, parent, step) for prompt, parent in zip(prompts, parents, strict=True)]
        return tuple(range(first, len(self.nodes)))

    def record_scores(self, names: Sequence[int], step: int, scores: Sequence[Sequence[float]]) -> None:
        """Record the scores of candidates that have done ``step`` steps, one row of values for each."""
        for name, values in zip(names, scores, strict=True):
            self.nodes[name].scores.append((step, tuple(values)))

    def close(self, names: Sequence[int], step: int) -> None:
        """Mark candidates as pruned or finished after ``step`` steps."""
        for name in names:
            self.nodes[name].end_step = step

    def as_list(self) -> list[dict[str, Any]]:
        """JSON form of all candidates, in the order of their numbers."""
        return [node.as_dict() for node in self.nodes]
