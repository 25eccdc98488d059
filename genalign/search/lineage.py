"""The candidates of a search as trees: parent, scores, first and last step of each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
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

    def close(self, ids: Iterable[int], step: int) -> None:
        """Mark candidates as pruned or finished after ``step`` steps."""
        for number in ids:
            self.nodes[number].end_step = step

    def as_list(self, first: int, prompt: int) -> list[dict[str, Any]]:
        """Return all candidates as JSON, numbered from ``first`` and their prompts from ``prompt``.

        A failed score is null.
        """
        return [
            {
                "prompt": prompt + node.prompt,
                "parent": None if node.parent is None else first + node.parent,
                "born": node.start_step,
                "scores": [[step, [v if math.isfinite(v) else None for v in values]] for step, values in node.scores],
                "ended": node.end_step,
            }
            for node in self.nodes
        ]
