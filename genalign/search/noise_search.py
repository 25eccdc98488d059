"""Searches over noise by complete samples: the neighbourhood of the best noise, and evolution.

Scores are of finished samples, so that any reward serves, and every step may be deterministic.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from genalign.diffusion.noise import derived_seed, seeded_noise
from genalign.search.engine import Particles, ScoredParticles, SearchRun, joined
from genalign.search.strategy import PromptBudget, score_bill, walk_bill


@dataclass(frozen=True)
class ZeroOrder:
    """Zero-order search (arXiv 2501.09732, section 4.1): every round tries ``neighbours`` of the best noise so far, at
    cosine ``theta`` to it and of the same length. Without ``rounds`` it goes on while the budget lasts.

    Public code begins anew where no neighbour is better; here the next round draws other neighbours.
    """

    rounds: int | None = None
    neighbours: int = 4
    theta: float = 0.95

    def __post_init__(self) -> None:
        if self.neighbours < 1 or not -1 < self.theta < 1:
            raise ValueError(f"neighbours must be at least 1 and theta in (-1, 1), not {self}")

    def __call__(self, run: SearchRun, allowance: PromptBudget) -> ScoredParticles:
        rounds = allowance.largest(self.rounds, lambda n: self.bill(run, n), "rounds")
        found = run.finish(run.start(1))
        prompts = [p for p in range(len(run.prompts)) for _ in range(self.neighbours)]
        for number in range(rounds):
            tried = torch.cat([self._around(run, pivot, p, number) for p, pivot in enumerate(found.candidates.noise)])
            found = found.joined(run.finish(run.begin(tried, prompts, [0] * len(prompts))))
            found = found.rows(found.best())
        return found

    def _around(self, run: SearchRun, centre: Tensor, prompt: int, number: int) -> Tensor:
        seeds = [derived_seed(run.seed, prompt, "neighbour", number, k) for k in range(self.neighbours)]
        return neighbours_of(centre, seeded_noise(seeds, centre[None]), self.theta)

    def bill(self, run: SearchRun, rounds: int) -> Counter[str]:
        """What one prompt costs."""
        count = 1 + rounds * self.neighbours
        return walk_bill(run, count, run.steps) + score_bill(run, count)


def neighbours_of(centre: Tensor, noise: Tensor, theta: float) -> Tensor:
    """Vectors (n, ...) of the length of ``centre`` (...), at cosine ``theta`` to it, in the directions of ``noise``."""
    flat, drawn = centre.double().flatten(), noise.double().flatten(1)
    length = flat.norm()
    unit = flat / length
    across = drawn - (drawn @ unit)[:, None] * unit
    across = across / across.norm(dim=1, keepdim=True)
    mixed = length * (theta * unit + (1 - theta * theta) ** 0.5 * across)
    neighbours: Tensor = mixed.view_as(noise).to(centre)
    return neighbours


@dataclass(frozen=True)
class Evolution:
    """Evolutionary search (EvoSearch, arXiv 2505.17618): generation g begins at step ``starts[g]`` with ``sizes[g]``
    children of each prompt's ``elites`` best trajectories so far, the first from fresh noise.

    A child has its parent's state there with the noise in it renewed: x = alpha x0 + sigma eps, where eps becomes
    sqrt(1 - strength^2) eps + strength z. The paper adds z times the sampler's standard deviation instead, which at
    the first step is the same. Parents are taken in turn, best first.
    """

    starts: tuple[int, ...] = (0, 2, 4)
    sizes: tuple[int, ...] = (8, 4, 4)
    elites: int = 2
    strength: float = 0.2

    def __post_init__(self) -> None:
        if len(self.starts) != len(self.sizes) or list(self.starts) != sorted(set(self.starts)) or self.starts[0] != 0:
            raise ValueError(f"starts must ascend from 0, with one size each, not {self.starts} and {self.sizes}")
        if min(self.sizes) < 1 or not 1 <= self.elites <= self.sizes[0] or not 0 < self.strength <= 1:
            raise ValueError(
                f"sizes and elites must be at least 1, elites at most the first size, strength in (0, 1], not {self}"
            )

    def __call__(self, run: SearchRun, allowance: PromptBudget) -> ScoredParticles:
        if self.starts[-1] >= run.steps:
            raise ValueError(f"generation at step {self.starts[-1]} is past the end of {run.steps} steps")
        allowance.largest(1, lambda n: self.bill(run), "evolutions")
        states, found = self._complete(run, run.start(self.sizes[0]), 0)
        for generation in range(1, len(self.starts)):
            parents = found.best(self.elites)
            children = self._children(run, states[generation].rows(parents), generation)
            born, tried = self._complete(run, children, generation)
            states = {g: joined([states[g], born[g]]) for g in born}
            found = found.joined(tried)
        return found

    def _complete(
        self, run: SearchRun, begun: Particles, generation: int
    ) -> tuple[Mapping[int, Particles], ScoredParticles]:
        """Candidates at the starts of later generations, and at their end."""
        states = {}
        for later in range(generation + 1, len(self.starts)):
            begun = states[later] = run.advance(begun, self.starts[later])
        return states, run.finish(begun)

    def _children(self, run: SearchRun, parents: Particles, generation: int) -> Particles:
        """``sizes[generation]`` of every prompt, from its parents in turn."""
        level = run.grid[parents.done]
        turns = [
            (parents.prompt == p).nonzero()[:, 0][torch.arange(self.sizes[generation]) % self.elites]
            for p in range(len(run.prompts))
        ]
        chosen = parents.rows(torch.cat(turns))
        assert chosen.preview is not None, "only the first generation begins without a preview"
        eps = (chosen.x - float(level.alpha) * chosen.preview) / float(level.sigma)
        names = run.lineage.add(chosen.prompt.tolist(), chosen.names, chosen.done)
        z = seeded_noise([derived_seed(run.seed, "mutation", name) for name in names], chosen.x)
        renewed = (1 - self.strength**2) ** 0.5 * eps + self.strength * z
        return replace(chosen, names=names, x=float(level.alpha) * chosen.preview + float(level.sigma) * renewed)

    def bill(self, run: SearchRun) -> Counter[str]:
        """What one prompt costs."""
        total: Counter[str] = Counter()
        for start, size in zip(self.starts, self.sizes, strict=True):
            total += walk_bill(run, size, run.steps - start) + score_bill(run, size)
        return total
