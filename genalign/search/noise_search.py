"""Searches over noise by complete samples: zero-order search around the best noise, and evolution.

Scores are of finished samples, so any reward serves, and every step may be deterministic.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from genalign.diffusion.noise import derived_seed, seeded_noise
from genalign.scoring.budget import Budget
from genalign.search.engine import Particles, ScoredParticles, SearchRun, concatenate
from genalign.search.strategy import largest_size


@dataclass(frozen=True)
class ZeroOrder:
    """Zero-order search (arXiv 2501.09732, section 4.1).

    Every one of ``rounds`` samples from ``neighbors`` of the best noise so far, at cosine ``theta`` to it and of the
    same length. ``rounds`` None makes as many as the budget allows. Public code restarts if no neighbor is better;
    here the next round draws other neighbors.

    Args:
        rounds: Number of rounds; None takes as many as the budget allows.
        neighbors: Number of noises that a round tries around the best one.
        theta: Cosine between the best noise and its neighbors, in (-1, 1).
    """

    rounds: int | None = None
    neighbors: int = 4
    theta: float = 0.95

    def __post_init__(self) -> None:
        if self.neighbors < 1 or not -1 < self.theta < 1:
            raise ValueError(f"neighbors must be at least 1 and theta in (-1, 1), not {self}")

    def __call__(self, run: SearchRun, budget: Budget | None) -> ScoredParticles:
        rounds = largest_size(run, budget, self.rounds, lambda n: replace(self, rounds=n), "rounds")
        best = run.finish(run.start(1))
        prompts = [p for p in range(len(run.prompts)) for _ in range(self.neighbors)]
        for number in range(rounds):
            tried = []
            for p, center in enumerate(best.candidates.noise):
                seeds = [derived_seed(run.seed, p, "neighbour", number, k) for k in range(self.neighbors)]
                tried.append(neighbors_of(center, seeded_noise(seeds, center[None]), self.theta))
            finished = run.finish(run.start_from(torch.cat(tried), prompts, [0] * len(prompts)))
            everything = best.extend(finished)
            best = everything.rows(everything.best())
        return best


def neighbors_of(center: Tensor, noise: Tensor, theta: float) -> Tensor:
    """Turn ``center`` (...) towards each row of ``noise`` (n, ...) by an angle of cosine ``theta``, at equal length."""
    flat, directions = center.double().flatten(), noise.double().flatten(1)
    length = flat.norm()
    unit = flat / length
    across = directions - (directions @ unit)[:, None] * unit
    across = across / across.norm(dim=1, keepdim=True)
    mixed = length * (theta * unit + (1 - theta * theta) ** 0.5 * across)
    neighbors: Tensor = mixed.view_as(noise).to(center)
    return neighbors


@dataclass(frozen=True)
class Evolution:
    """Evolutionary search (EvoSearch, arXiv 2505.17618).

    Generation g starts at step ``starts[g]`` with ``sizes[g]`` children of each prompt's ``elites`` best trajectories
    so far; the first generation starts from fresh noise. A child has the state of its parent at that step, with new
    noise: x = alpha x0 + sigma eps, where eps becomes sqrt(1 - strength^2) eps + strength z. The paper adds z times the
    sampler's standard deviation instead, which is the same at the first step. Parents take turns, the best first.

    Args:
        starts: Sampling step at which each generation starts, ascending from 0.
        sizes: Number of children in each generation; None takes as many as the budget allows, half of them in the
            first generation.
        elites: Number of the best trajectories that have children.
        strength: Fraction of new noise in a child, in (0, 1].
    """

    starts: tuple[int, ...] = (0, 2, 4)
    sizes: tuple[int, ...] | None = (8, 4, 4)
    elites: int = 2
    strength: float = 0.2

    def __post_init__(self) -> None:
        if not self.starts or list(self.starts) != sorted(set(self.starts)) or self.starts[0] != 0:
            raise ValueError(f"starts must ascend from 0, not {self.starts}")
        if self.elites < 1 or not 0 < self.strength <= 1:
            raise ValueError(f"elites must be at least 1 and strength in (0, 1], not {self}")
        if self.sizes is None:
            return
        if len(self.sizes) != len(self.starts) or min(self.sizes) < 1 or self.elites > self.sizes[0]:
            raise ValueError(
                f"sizes must be at least 1, one for each of the {len(self.starts)} starts, and the first at least"
                f" elites={self.elites}, not {self.sizes}"
            )

    def of_size(self, candidates: int) -> Evolution:
        """Return this search with the sizes of so many candidates: half of them start from fresh noise.

        The later generations share the others, the earlier ones those that are left over. No generation is empty, and
        the first one holds the elites, so few candidates are rounded up.
        """
        first, later = math.ceil(candidates / 2), len(self.starts) - 1
        share, left = divmod(candidates - first, later) if later else (0, 0)
        children = (max(1, share + (place < left)) for place in range(later))
        return replace(self, sizes=(max(self.elites, first if later else candidates), *children))

    def __call__(self, run: SearchRun, budget: Budget | None) -> ScoredParticles:
        if self.starts[-1] >= run.steps:
            raise ValueError(f"generation at step {self.starts[-1]} is past the end of {run.steps} steps")
        if self.sizes is None:
            return self.of_size(largest_size(run, budget, None, self.of_size, "candidates"))(run, None)
        largest_size(run, budget, 1, lambda _: self, "evolutions")
        states, everything = self._complete(run, run.start(self.sizes[0]), 0)
        for generation, size in enumerate(self.sizes[1:], start=1):
            parents = states[generation].rows(everything.best(self.elites))
            children, finished = self._complete(run, self._mutate(run, parents, size), generation)
            states = {g: concatenate([states[g], children[g]]) for g in children}
            everything = everything.extend(finished)
        return everything

    def _complete(
        self, run: SearchRun, candidates: Particles, generation: int
    ) -> tuple[Mapping[int, Particles], ScoredParticles]:
        """Return the candidates at the start of each later generation, and at their end."""
        states = {}
        for later in range(generation + 1, len(self.starts)):
            candidates = states[later] = run.advance(candidates, self.starts[later])
        return states, run.finish(candidates)

    def _mutate(self, run: SearchRun, parents: Particles, size: int) -> Particles:
        """Return ``size`` children of every prompt, from its parents in turn."""
        turns = [
            (parents.prompt == p).nonzero()[:, 0][torch.arange(size) % self.elites] for p in range(len(run.prompts))
        ]
        copies = run.copy(parents.rows(torch.cat(turns)))
        z = seeded_noise([derived_seed(run.seed, "mutation", number) for number in copies.ids.tolist()], copies.x)
        level = run.grid[copies.steps_done]
        alpha, sigma = float(level.alpha), float(level.sigma)
        eps = (copies.x - alpha * copies.preview) / sigma
        mutated = (1 - self.strength**2) ** 0.5 * eps + self.strength * z
        x = alpha * copies.preview + sigma * mutated
        return replace(copies, x=x, plain=torch.zeros_like(copies.plain))
