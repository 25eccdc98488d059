"""The candidates of a search as trees: parent, scores, first and last step of each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Node:
    """One candidate of a search.

    Attributes:
        prompt: Index of its prompt.
        parent: Number of the candidate that it was copied from; None for new noise.
        start_step: Number of steps done when it was added.
        scores: Pairs of the number of steps done and the scores then, one for each reward.
        end_step: Number of steps done when it was dropped or finished; None before.
    """

    prompt: int
    parent: int | None
    start_step: int
    scores: list[tuple[int, tuple[float, ...]]] = field(default_factory=list)
    end_step: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the candidate as JSON, in which a failed score is null."""
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

    def record_scores(self, ids: Sequence[int], step: int, scores: Sequence[Sequence[float]]) -> None:
        """Record the scores of candidates that have done ``step`` steps, one row of values for each."""
        for number, values in zip(ids, scores, strict=True):
            self.nodes[number].scores.append((step, tuple(values)))

    def close(self, ids: Sequence[int], step: int) -> None:
        """Mark candidates as pruned or finished after ``step`` steps."""
        for number in ids:
            self.nodes[number].end_step = step

    def as_list(self) -> list[dict[str, Any]]:
        """Return all candidates as JSON, in the order of their numbers."""
        return [node.as_dict() for node in self.nodes]
