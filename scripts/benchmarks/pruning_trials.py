"""Pruning tried on recorded trajectories: what a schedule finds, what it costs, and which one is the best."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from genalign.search.pruning import PruneSchedule
from genalign.search.ranking import best_per_prompt


@dataclass(frozen=True)
class Costs:
    """The costs of the calls for one sample, in seconds or in network calls alone.

    A finished sample takes ``steps`` network calls, a decoding and a call of the selection reward. ``looks`` are the
    costs of scoring a preview, by kind of preview.
    """

    steps: int
    forward: float
    decode: float
    reward: float
    looks: Mapping[str, float]

    def sample(self, steps: int | None = None) -> float:
        """A whole sample; one of all ``steps`` is a budget of one."""
        return (steps or self.steps) * self.forward + self.decode + self.reward

    def pruning(self, schedule: PruneSchedule, way: str, candidates: int) -> float:
        """What a schedule really costs."""
        counts, done = schedule.counts(candidates), [0, *(step + 1 for step in schedule.steps), self.steps]
        moves = sum(alive * (end - begin) for alive, (begin, end) in zip(counts, itertools.pairwise(done), strict=True))
        scored = sum(counts[:-1]) * self.looks[way]
        return moves * self.forward + scored + counts[-1] * (self.decode + self.reward)

    def affordable(self, schedule: PruneSchedule, way: str, budget: float, most: int) -> int:
        """How many candidates ``budget`` samples' cost begins; 0 where it begins none, or more than ``most``.

        A schedule that could begin more than were recorded does not spend its budget on those: it has no result there.
        """
        limit = budget * self.sample() * (1 + 1e-9)
        count = max((n for n in range(1, most + 2) if self.pruning(schedule, way, n) <= limit), default=0)
        return count if count <= most else 0

    def share(self, schedule: PruneSchedule, way: str, budget: float, most: int) -> float:
        """What a schedule spends of ``budget`` samples' cost."""
        return self.pruning(schedule, way, self.affordable(schedule, way, budget, most)) / (budget * self.sample())


def schedules(levels: Sequence[int]) -> list[PruneSchedule]:
    """One to three steps of ``levels`` with equal shares."""
    result = []
    for count, shares in ((1, (0.2, 0.33, 0.5)), (2, (0.33, 0.5, 0.6)), (3, (0.4, 0.5, 0.65))):
        for steps in itertools.combinations(levels, count):
            result += [PruneSchedule(steps, (share,) * count) for share in shares]
    return result


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


class Trials:
    """Simulated pruning of recorded candidates by the scores of their previews.

    ``scores`` (P, subsets or 1, N, L) are of previews at ``levels``, for ``subsets`` random subsets of the N candidates
    of each of P prompts. ``ends`` (P, N, 2) are the scores of the finished samples by the selection reward and by the
    verifier. ``tasks`` are those of the P prompts: a mean is over tasks of the means over their prompts.
    """

    def __init__(self, scores: Tensor, ends: Tensor, levels: Sequence[int], subsets: int, tasks: Sequence[str]) -> None:
        self.ends, self.levels, self.subsets, self.tasks = ends, tuple(levels), subsets, tuple(tasks)
        looks, clean = (x.expand(-1, subsets, -1, -1) for x in (scores, ends[:, None, :, :1]))
        self._pool = ScorePool(torch.cat([looks, clean], dim=3).flatten(0, 1)[..., None])

    @property
    def most(self) -> int:
        """How many candidates were recorded."""
        return self.ends.shape[1]

    def pruned(self, schedule: PruneSchedule, candidates: int) -> Tensor:
        """The mean ends (P, 2) of what a schedule returns of so many candidates."""
        trials, generator = len(self.ends) * self.subsets, torch.Generator().manual_seed(candidates)
        subset = torch.rand(trials, self.most, generator=generator).argsort(dim=1)[:, :candidates]
        places = tuple(self.levels.index(step) for step in schedule.steps)
        result = self._pool.winners(PruneSchedule(places, schedule.keep), subset).view(len(self.ends), -1)
        return self.ends.double().gather(1, result[..., None].expand(-1, -1, 2)).mean(1)

    def at(self, schedule: PruneSchedule, way: str, budget: float, costs: Costs) -> Tensor:
        """The same of as many candidates as ``budget`` samples' cost begins."""
        return self.pruned(schedule, costs.affordable(schedule, way, budget, self.most))

    def reward(self, ends: Tensor) -> float:
        """The mean selection reward of ``ends`` (P, 2)."""
        return float(task_mean(ends[:, 0], self.tasks))

    def best(self, way: str, budget: float, costs: Costs) -> PruneSchedule:
        """The schedule of most reward at a budget, of those whose candidates were recorded.

        Raises ValueError where the budget begins none, or more than were recorded, under every schedule.
        """
        possible = [result for result in schedules(self.levels) if costs.affordable(result, way, budget, self.most)]
        if not possible:
            raise ValueError(
                f"no schedule begins 1 to {self.most} candidates for the cost of {budget} samples: give another budget,"
                " or record more candidates"
            )
        return max(possible, key=lambda schedule: self.reward(self.at(schedule, way, budget, costs)))


def task_mean(values: Tensor, tasks: Sequence[str]) -> Tensor:
    """The mean (...) over tasks of the means of values (P, ...) over their prompts, as rows of results weigh them."""
    rows = [[row for row, own in enumerate(tasks) if own == task] for task in dict.fromkeys(tasks)]
    return torch.stack([values[own].mean(0) for own in rows]).mean(0)


def maximum_probabilities(total: int, count: int) -> Tensor:
    """Return the probability (total,) float64 of each value, lowest first, to be the largest of ``count`` draws.

    Draws are without replacement: C(i - 1, count - 1) / C(total, count) for the i-th value. Raises ValueError unless
    ``count`` is 1 to ``total``.
    """
    if not 1 <= count <= total:
        raise ValueError(f"count must be 1 to {total}, the candidates of the pool, not {count}")
    weights = [math.comb(i, count - 1) / math.comb(total, count) for i in range(total)]
    return torch.tensor(weights, dtype=torch.float64)


def best_of(ends: Tensor, count: int) -> Tensor:
    """The exact expected clean scores (P, 2) of best-of-``count`` of ``ends`` (P, N, 2), by the selection reward."""
    order = ends[:, :, 0].argsort(dim=1)
    ranked = ends.double().gather(1, order[:, :, None].expand_as(ends))
    chances = maximum_probabilities(ends.shape[1], min(count, ends.shape[1]))
    expected: Tensor = torch.einsum("pns,n->ps", ranked, chances)
    return expected
