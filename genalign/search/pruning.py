"""Noise-aware pruning (TTSnap, arXiv 2511.22242): many candidates begin; those whose previews score low are given up.

Step s is "after the network was evaluated at sigma_s": a candidate that is given up there cost s + 1 forwards.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from genalign.search.engine import Particles, ScoredParticles, SearchRun
from genalign.search.ranking import top
from genalign.search.strategy import PreviewScorer, PromptBudget, score_bill, scorer_or_default, walk_bill


@dataclass(frozen=True)
class PruneSchedule:
    """After the network evaluations ``steps`` (ascending, from 0), the share ``keep`` of what is alive goes on, rounded
    up: never fewer than asked.
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
        """Raises ValueError for a step at which nothing could be saved any more."""
        if self.steps and self.steps[-1] >= total - 1:
            raise ValueError(
                f"step {self.steps[-1]} is past the end: of {total} steps, 0 to {total - 2} can be pruned at"
            )

    def counts(self, candidates: int) -> tuple[int, ...]:
        """How many are alive at first and after each step."""
        alive = [candidates]
        for share in self.keep:
            alive.append(kept(alive[-1], share))
        return tuple(alive)


def kept(alive: int, share: float) -> int:
    """``share`` of ``alive``, rounded up but for what binary fractions add: 0.3 of 10 are 3."""
    return max(1, math.ceil(round(alive * share, 9)))


@dataclass(frozen=True)
class Prune:
    """Pruning by ``scorer``: the run's rewards of decoded previews, or a noise-aware reward. Of several rewards the sum
    of ranks among the living decides. ``candidates`` None begins as many as the budget has.
    """

    steps: tuple[int, ...] = (3, 5, 8)
    keep: tuple[float, ...] = (0.5, 0.5, 0.5)
    candidates: int | None = None
    scorer: PreviewScorer | None = None

    @property
    def schedule(self) -> PruneSchedule:
        """Steps and shares, checked."""
        return PruneSchedule(tuple(self.steps), tuple(self.keep))

    def __call__(self, run: SearchRun, allowance: PromptBudget) -> ScoredParticles:
        self.schedule.check(run.steps)
        count = allowance.largest(self.candidates, lambda n: self.bill(run, n), "candidates")
        return run.finish(self.survivors(run, count))

    def survivors(self, run: SearchRun, count: int) -> Particles:
        """Of ``count`` candidates of each prompt, those that no step gave up, on their way."""
        alive = run.start(count)
        for step, left in zip(self.steps, self.schedule.counts(count)[1:], strict=True):
            alive = run.advance(alive, step + 1)
            scores = scorer_or_default(self.scorer)(run, alive)
            run.note(alive, scores)
            alive = run.keep(alive, top(scores, alive.prompt, left))
        return alive

    def bill(self, run: SearchRun, candidates: int) -> Counter[str]:
        """What one prompt costs, by the counts that are really alive."""
        counts = self.schedule.counts(candidates)
        done = [0, *(step + 1 for step in self.steps), run.steps]
        total: Counter[str] = Counter()
        for alive, begin, end in zip(counts, done, done[1:], strict=False):
            total += walk_bill(run, alive, end - begin)
            total += scorer_or_default(self.scorer).bill(run, alive) if end < run.steps else score_bill(run, alive)
        return total


@dataclass(frozen=True)
class Pool:
    """Recorded scores of P prompts x N candidates at S steps (P, N, S, K), the last step being the clean sample: what
    schedules are tried on without sampling again. ``hashes`` (P, N) tell equal trajectories.

    Raises ValueError for another shape, or duplicate trajectories, which would make N candidates look like more.
    """

    scores: Tensor
    hashes: Tensor | None = None

    def __post_init__(self) -> None:
        if self.scores.ndim != 4:
            raise ValueError(f"a pool's scores are (P, N, S, K), not {tuple(self.scores.shape)}")
        if self.hashes is not None:
            for place, row in enumerate(self.hashes):
                if len(torch.unique(row)) < len(row):
                    raise ValueError(
                        f"prompt {place} has {len(torch.unique(row))} distinct trajectories among {len(row)}: drop the"
                        " duplicates, or sample them with other seeds"
                    )

    def pruned(self, schedule: PruneSchedule, subset: Tensor) -> Tensor:
        """The survivors' places (P, M), by the schedule, among ``subset`` of the candidates: (n,), or (P, n) with one
        for each prompt.
        """
        alive = subset.expand(len(self.scores), -1)
        for step, left in zip(schedule.steps, schedule.counts(subset.shape[-1])[1:], strict=True):
            alive = self._top(alive, step, left)
        return alive

    def winners(self, schedule: PruneSchedule, subset: Tensor) -> Tensor:
        """The places (P,) of what the schedule returns, by the clean scores."""
        return self._top(self.pruned(schedule, subset), -1, 1)[:, 0]

    def _top(self, alive: Tensor, step: int, count: int) -> Tensor:
        """The ``count`` best by the scores of a step of each prompt's ``alive`` (P, n)."""
        prompt = torch.arange(len(alive))[:, None]
        chosen = top(self.scores[prompt, alive, step].flatten(0, 1), prompt.expand_as(alive).flatten(), count)
        return alive.flatten()[chosen].view(len(alive), count)


def maximum_probabilities(total: int, count: int) -> Tensor:
    """How likely each of ``total`` values, the lowest first, is the largest of ``count`` drawn without replacement:
    C(i - 1, count - 1) / C(total, count) for the i-th, (total,) float64. ValueError for more than there are.
    """
    if not 1 <= count <= total:
        raise ValueError(f"count must be 1 to {total}, the candidates of the pool, not {count}")
    weights = [math.comb(i, count - 1) / math.comb(total, count) for i in range(total)]
    return torch.tensor(weights, dtype=torch.float64)
