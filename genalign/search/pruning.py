"""Pruning (TTSnap, arXiv 2511.22242): many candidates start, and those with low preview scores are dropped.

Pruning step s comes after the network evaluation at sigma_s: a candidate that is dropped there has cost s + 1 NFE.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from genalign.search.engine import ScoredParticles, SearchRun
from genalign.search.ranking import best_per_prompt
from genalign.search.strategy import PreviewScorer, PromptBudget, score_previews


@dataclass(frozen=True)
class PruneSchedule:
    """When to prune and how much.

    After each of the network evaluations ``steps`` (ascending, from 0), the fraction ``keep`` of the candidates goes
    on, rounded up, and at least one.
    """

    steps: tuple[int, ...] = (3, 5, 8)
    keep: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        if len(self.steps) != len(self.keep):
            raise ValueError(f"one keep for each step: got {len(self.steps)} steps and {len(self.keep)} shares")
        if any(step < 0 for step in self.steps) or list(self.steps) != sorted(set(self.steps)):
            raise ValueError(f"steps must ascend from 0 or more, not {self.steps}")
        if any(not 0 < share <= 1 for share in self.keep):
            raise ValueError(f"keep holds shares in (0, 1], not {self.keep}")

    def check(self, total: int) -> None:
        """Raise ValueError for a step after which no network evaluation of the ``total`` could be saved."""
        if self.steps and self.steps[-1] >= total - 1:
            raise ValueError(
                f"step {self.steps[-1]} is past the end: of {total} steps, 0 to {total - 2} can be pruned at"
            )

    def counts(self, candidates: int) -> tuple[int, ...]:
        """Return the number of candidates at the start and after each pruning step."""
        alive = [candidates]
        for share in self.keep:
            exact = round(alive[-1] * share, 9)  # 0.3 of 10 are 3, without the error of binary fractions
            alive.append(max(1, math.ceil(exact)))
        return tuple(alive)


@dataclass(frozen=True)
class Prune(PruneSchedule):
    """Pruning by the run's rewards of decoded previews, or by ``scorer``, such as a noise-aware reward.

    Several rewards count by the sum of ranks among the candidates left. ``candidates`` None starts as many as the
    budget pays for.
    """

    candidates: int | None = None
    scorer: PreviewScorer | None = None

    def __call__(self, run: SearchRun, allowance: PromptBudget) -> ScoredParticles:
        self.check(run.steps)
        count = allowance.largest(run, self.candidates, lambda n: replace(self, candidates=n), "candidates")
        alive = run.start(count)
        for step, left in zip(self.steps, self.counts(count)[1:], strict=True):
            alive = run.advance(alive, step + 1)
            scores = score_previews(run, alive, self.scorer)
            alive = run.keep(alive, best_per_prompt(scores, alive.prompt, left))
        return run.finish(alive)
