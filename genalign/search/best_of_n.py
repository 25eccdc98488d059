"""Best-of-N: the baseline of every search."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from genalign.diffusion.transitions import ODE, Kernel
from genalign.search.engine import ScoredParticles, SearchRun
from genalign.search.strategy import PromptBudget, score_bill, walk_bill


@dataclass(frozen=True)
class BestOfN:
    """``candidates`` complete samples of every prompt, by the ODE or any kernel; as many as the budget has for None."""

    candidates: int | None = None
    kernel: Kernel = ODE()  # noqa: RUF009  # kernels are frozen

    def __call__(self, run: SearchRun, allowance: PromptBudget) -> ScoredParticles:
        count = allowance.largest(self.candidates, lambda n: self.bill(run, n), "candidates")
        return run.finish(run.advance(run.start(count), run.steps, self.kernel))

    def bill(self, run: SearchRun, candidates: int) -> Counter[str]:
        """What one prompt costs."""
        return walk_bill(run, candidates, run.steps) + score_bill(run, candidates)
