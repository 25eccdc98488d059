"""Best-of-N: the baseline of every search."""

from __future__ import annotations

from dataclasses import dataclass, replace

from genalign.diffusion.transitions import ODE, Kernel
from genalign.search.engine import ScoredParticles, SearchRun
from genalign.search.stepwise import Stepwise
from genalign.search.strategy import PromptBudget


@dataclass(frozen=True)
class BestOfN:
    """Samples ``candidates`` times for every prompt by ``kernel``; None for as many as the budget pays for."""

    candidates: int | None = None
    kernel: Kernel = ODE()  # noqa: RUF009  # kernels are frozen

    def __call__(self, run: SearchRun, allowance: PromptBudget) -> ScoredParticles:
        count = allowance.largest(run, self.candidates, lambda n: replace(self, candidates=n), "candidates")
        return run.finish(run.advance(run.start(count), run.steps, self.kernel))

    def stepwise(self) -> Stepwise:
        """Describe the strategy to ``pipelines.steer``. Raises ValueError for a kernel other than the ODE."""
        if self.kernel != ODE():
            raise ValueError(
                "best-of-N keeps the scheduler's moves: give the pipeline another scheduler instead of a kernel"
            )
        return Stepwise(self.candidates)
