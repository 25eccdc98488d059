"""Strategies that keep the best of many candidates: best-of-N, pruning and beam search."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from genalign.diffusion.transitions import DDIM, ODE, Kernel, trainable_steps
from genalign.scoring.budget import Budget
from genalign.search.engine import ScoredParticles, SearchRun
from genalign.search.ranking import best_per_prompt
from genalign.search.stepwise import Stepwise
from genalign.search.strategy import PreviewScorer, largest_size, score_previews


@dataclass(frozen=True)
class BestOfN:
    """Samples ``candidates`` times for every prompt; None for as many as the budget allows.

    Args:
        candidates: Number of samples of each prompt; None takes as many as the budget allows.
        kernel: Sampler of the candidates; None takes that of the sampling settings.
    """

    candidates: int | None = None
    kernel: Kernel | None = None

    def __call__(self, run: SearchRun, budget: Budget | None) -> ScoredParticles:
        count = largest_size(run, budget, self.candidates, lambda n: replace(self, candidates=n), "candidates")
        return run.finish(run.advance(run.start(count), run.steps, self.kernel))

    def stepwise(self) -> Stepwise:
        """Describe the strategy to ``pipelines.steer``. Raises ValueError for a kernel other than the ODE."""
        if self.kernel not in (None, ODE()):
            raise ValueError(
                "best-of-N keeps the scheduler's moves: give the pipeline another scheduler instead of a kernel"
            )
        return Stepwise(self.candidates)


@dataclass(frozen=True)
class PruneSchedule:
    """When to prune and how much.

    After each of the network evaluations ``steps`` (ascending, from 0), the fraction ``keep`` of the candidates goes
    on, rounded up, and at least one.

    Args:
        steps: Network evaluations after which candidates are dropped, ascending from 0.
        keep: Fraction of the candidates that is kept after each of ``steps``.
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

    def counts(self, candidates: int) -> tuple[int, ...]:
        """Return the number of candidates at the start and after each pruning step."""
        alive = [candidates]
        for share in self.keep:
            exact = round(alive[-1] * share, 9)  # 0.3 of 10 are 3, without the error of binary fractions
            alive.append(max(1, math.ceil(exact)))
        return tuple(alive)


@dataclass(frozen=True)
class Prune(PruneSchedule):
    """Pruning (TTSnap, arXiv 2511.22242) by the run's rewards of decoded previews, or by ``scorer``.

    A candidate that is dropped after the network evaluation at sigma_s has cost s + 1 NFE. Several rewards count by the
    sum of ranks among the candidates left. ``scorer`` may be a noise-aware reward, and ``candidates`` None starts as
    many as the budget allows.

    Args:
        steps: Network evaluations after which candidates are dropped, ascending from 0.
        keep: Fraction of the candidates that is kept after each of ``steps``.
        candidates: Number of candidates of each prompt at the start; None takes as many as the budget allows.
        scorer: A scorer of previews, such as a noise-aware reward; None decodes them and takes the rewards.
    """

    candidates: int | None = None
    scorer: PreviewScorer | None = None

    def __call__(self, run: SearchRun, budget: Budget | None) -> ScoredParticles:
        if self.steps and self.steps[-1] >= run.steps - 1:
            raise ValueError(
                f"step {self.steps[-1]} is past the end: of {run.steps} steps, 0 to {run.steps - 2} can be pruned at"
            )
        count = largest_size(run, budget, self.candidates, lambda n: replace(self, candidates=n), "candidates")
        alive, weights = run.start(count), None if self.scorer else run.weights
        for step, left in zip(self.steps, self.counts(count)[1:], strict=True):
            alive = run.advance(alive, step + 1)
            scores = score_previews(run, alive, self.scorer)
            alive = run.keep(alive, best_per_prompt(scores, alive.prompt, left, weights))
        return run.finish(alive)


@dataclass(frozen=True)
class Beam:
    """Beam search over stochastic steps, which keeps the ``chains`` best of all proposals of a prompt at every step.

    Each chain makes ``proposals`` by the stochastic ``kernel``, None for as many as the budget allows. A proposal is
    scored by the preview that the network predicts at its own latents. That prediction is the winner's next step, so
    a step costs one NFE for each proposal (public code needs one more for the winner). One chain is SVDD-PM (arXiv
    2408.08252).

    Args:
        chains: Number of chains of each prompt.
        proposals: Number of next states that each chain proposes at a step; None takes as many as the budget allows.
        kernel: The stochastic sampler of the proposals.
        scorer: A scorer of previews, such as a noise-aware reward; None decodes them and takes the rewards.
    """

    chains: int = 1
    proposals: int | None = 4
    kernel: Kernel = DDIM(1.0)  # noqa: RUF009  # kernels are frozen
    scorer: PreviewScorer | None = None

    def __post_init__(self) -> None:
        if self.chains < 1 or (self.proposals is not None and self.proposals < 1):
            raise ValueError(f"chains and proposals must be at least 1, not {self.chains} and {self.proposals}")

    @torch.no_grad()
    def __call__(self, run: SearchRun, budget: Budget | None) -> ScoredParticles:
        if not trainable_steps(self.kernel, run.grid):
            raise ValueError(f"{self.kernel} adds no noise: all proposals would be equal; use DDIM(1.0), or Prune")
        count = largest_size(run, budget, self.proposals, lambda n: replace(self, proposals=n), "proposals")
        chains, weights = run.start(self.chains), None if self.scorer else run.weights
        prediction = run.in_batches(chains, run.predict)
        for _ in range(run.steps - 1):
            proposals = run.branch(chains, count)
            proposals = run.move(proposals, prediction.repeat_interleave(count, dim=0), self.kernel)
            prediction = run.in_batches(proposals, run.predict)
            preview = run.pipeline.path.x0(proposals.x, prediction, run.grid[proposals.steps_done])
            proposals = replace(proposals, preview=preview)
            scores = score_previews(run, proposals, self.scorer)
            winners = best_per_prompt(scores, proposals.prompt, self.chains, weights)
            chains, prediction = run.keep(proposals, winners), prediction[winners]
        return run.finish(run.move(chains, prediction, self.kernel))
