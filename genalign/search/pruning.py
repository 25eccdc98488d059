"""Pruning (TTSnap, arXiv 2511.22242): many candidates start, and those with low preview scores are dropped.

Pruning step s comes after the network evaluation at sigma_s: a candidate that is dropped there has cost s + 1 NFE.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

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
class Prune:
    """Pruning by the run's rewards of decoded previews, or by ``scorer``, such as a noise-aware reward.

    See ``PruneSchedule`` for ``steps`` and ``keep``. Several rewards count by the sum of ranks among the candidates
    left. ``candidates`` None starts as many as the budget pays for.
    """

    steps: tuple[int, ...] = (3, 5, 8)
    keep: tuple[float, ...] = (0.5, 0.5, 0.5)
    candidates: int | None = None
    scorer: PreviewScorer | None = None

    @property
    def schedule(self) -> PruneSchedule:
        """The schedule; raises ValueError for impossible steps or fractions."""
        return PruneSchedule(tuple(self.steps), tuple(self.keep))

    def __call__(self, run: SearchRun, allowance: PromptBudget) -> ScoredParticles:
        self.schedule.check(run.steps)
        count = allowance.largest(run, self.candidates, lambda n: replace(self, candidates=n), "candidates")
        alive = run.start(count)
        for step, left in zip(self.steps, self.schedule.counts(count)[1:], strict=True):
            alive = run.advance(alive, step + 1)
            scores = score_previews(run, alive, self.scorer)
            alive = run.keep(alive, best_per_prompt(scores, alive.prompt, left))
        return run.finish(alive)


@dataclass(frozen=True)
class ScorePool:
    """Scores (P, N, S, K) of P prompts x N candidates at S steps, to try schedules without sampling again.

    The last step is the clean sample. ``hashes`` (P, N) identify trajectories. Raises ValueError for another shape, or
    for duplicate trajectories, which would make N candidates look like more.
    """

    scores: Tensor
    hashes: Tensor | None = None

    def __post_init__(self) -> None:
        if self.scores.ndim != 4:
            raise ValueError(f"a pool's scores are (P, N, S, K), not {tuple(self.scores.shape)}")
        for place, row in enumerate(self.hashes if self.hashes is not None else ()):
            if (distinct := len(torch.unique(row))) < len(row):
                raise ValueError(
                    f"prompt {place} has {distinct} distinct trajectories among {len(row)}: drop the duplicates, or"
                    " sample them with other seeds"
                )

    def pruned(self, schedule: PruneSchedule, subset: Tensor) -> Tensor:
        """Return the survivors (P, M) of the schedule among ``subset``: (n,) candidates, or (P, n) of each prompt."""
        alive = subset.expand(len(self.scores), -1)
        for step, left in zip(schedule.steps, schedule.counts(subset.shape[-1])[1:], strict=True):
            alive = self._best(alive, step, left)
        return alive

    def winners(self, schedule: PruneSchedule, subset: Tensor) -> Tensor:
        """Return the survivor (P,) of the best clean score."""
        return self._best(self.pruned(schedule, subset), -1, 1)[:, 0]

    def _best(self, alive: Tensor, step: int, count: int) -> Tensor:
        """Return the ``count`` best of ``alive`` (P, n) by the scores of a step."""
        prompt = torch.arange(len(alive))[:, None]
        scores = self.scores[prompt, alive, step].flatten(0, 1)
        rows = best_per_prompt(scores, prompt.expand_as(alive).flatten(), count)
        return alive.flatten()[rows].view(len(alive), count)


def maximum_probabilities(total: int, count: int) -> Tensor:
    """Return the probability (total,) float64 of each value, lowest first, to be the largest of ``count`` draws.

    Draws are without replacement: C(i - 1, count - 1) / C(total, count) for the i-th value. Raises ValueError unless
    ``count`` is 1 to ``total``.
    """
    if not 1 <= count <= total:
        raise ValueError(f"count must be 1 to {total}, the candidates of the pool, not {count}")
    weights = [math.comb(i, count - 1) / math.comb(total, count) for i in range(total)]
    return torch.tensor(weights, dtype=torch.float64)
