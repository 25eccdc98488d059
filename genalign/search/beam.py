"""Beam search over stochastic steps (SVDD-PM, arXiv 2408.08252, is the beam of one chain)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from genalign.diffusion.transitions import DDIM, Kernel, trainable_steps
from genalign.search.engine import Particles, ScoredParticles, SearchRun
from genalign.search.ranking import top
from genalign.search.strategy import PreviewScorer, PromptBudget, score_bill, scorer_or_default, walk_bill


@dataclass(frozen=True)
class Beam:
    """At every step each of a prompt's ``chains`` makes ``proposals`` by the stochastic ``kernel``; the best go on, by
    the preview that the network expects from where a proposal arrived.

    That evaluation is the winner's next step, so that a step costs a forward for each proposal (public code pays one
    more for the winner). ``proposals`` None makes as many as the budget has.
    """

    chains: int = 1
    proposals: int | None = 4
    kernel: Kernel = DDIM(1.0)  # noqa: RUF009  # kernels are frozen
    scorer: PreviewScorer | None = None

    def __post_init__(self) -> None:
        if self.chains < 1 or (self.proposals is not None and self.proposals < 1):
            raise ValueError(f"chains and proposals must be at least 1, not {self.chains} and {self.proposals}")

    @torch.no_grad()
    def __call__(self, run: SearchRun, allowance: PromptBudget) -> ScoredParticles:
        if not trainable_steps(self.kernel, run.grid):
            raise ValueError(f"{self.kernel} adds no noise: all proposals would be equal; use DDIM(1.0), or Prune")
        proposals = allowance.largest(self.proposals, lambda n: self.bill(run, n), "proposals")
        chains = run.start(self.chains)
        prediction = run.batched(chains, run.predict)
        for _ in range(run.steps - 1):
            chains, prediction = self._step(run, chains, prediction, proposals)
        return run.finish(run.move(chains, prediction, self.kernel))

    def _step(self, run: SearchRun, chains: Particles, prediction: Tensor, proposals: int) -> tuple[Particles, Tensor]:
        """The best proposals of every prompt, and the network's output for them."""
        tried = run.branch(chains, proposals)
        tried = run.move(tried, prediction.repeat_interleave(proposals, dim=0), self.kernel)
        following = run.batched(tried, run.predict)
        preview = run.pipeline.path.x0(tried.x, following, run.grid[tried.done])
        tried = replace(tried, preview=preview)
        scores = scorer_or_default(self.scorer)(run, tried)
        run.note(tried, scores)
        chosen = top(scores, tried.prompt, self.chains)
        return run.keep(tried, chosen), following[chosen]

    def bill(self, run: SearchRun, proposals: int) -> Counter[str]:
        """What one prompt costs."""
        tried = (run.steps - 1) * self.chains * proposals
        scored = scorer_or_default(self.scorer).bill(run, tried) + score_bill(run, self.chains)
        return walk_bill(run, self.chains + tried, 1) + scored
