"""Beam search over stochastic steps; with one chain it is SVDD-PM (arXiv 2408.08252)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from genalign.diffusion.transitions import DDIM, Kernel, trainable_steps
from genalign.search.engine import ScoredParticles, SearchRun
from genalign.search.ranking import best_per_prompt
from genalign.search.strategy import PreviewScorer, PromptBudget, score_previews


@dataclass(frozen=True)
class Beam:
    """Keeps the ``chains`` best of all proposals of a prompt at every step.

    Each chain makes ``proposals`` by the stochastic ``kernel``, None for as many as the budget pays for. A proposal is
    scored by the preview that the network predicts at its own latents. That prediction is the winner's next step, so
    that a step costs one NFE for each proposal (public code pays one more for the winner).
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
        count = allowance.largest(run, self.proposals, lambda n: replace(self, proposals=n), "proposals")
        chains = run.start(self.chains)
        prediction = run.in_batches(chains, run.predict)
        for _ in range(run.steps - 1):
            proposals = run.branch(chains, count)
            proposals = run.move(proposals, prediction.repeat_interleave(count, dim=0), self.kernel)
            prediction = run.in_batches(proposals, run.predict)
            preview = run.pipeline.path.x0(proposals.x, prediction, run.grid[proposals.steps_done])
            proposals = replace(proposals, preview=preview)
            scores = score_previews(run, proposals, self.scorer)
            winners = best_per_prompt(scores, proposals.prompt, self.chains)
            chains, prediction = run.keep(proposals, winners), prediction[winners]
        return run.finish(run.move(chains, prediction, self.kernel))
