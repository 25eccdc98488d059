"""Feynman-Kac steering as a strategy: particles that are weighed, resampled and, where asked for, guided."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from genalign.diffusion.rollout import step_noise
from genalign.diffusion.transitions import Kernel
from genalign.search.engine import Particles, ScoredParticles, SearchRun, joined
from genalign.search.guidance import Guide, guided_log_ratio
from genalign.search.smc import FKSettings, FKState, require_stochastic
from genalign.search.strategy import PreviewScorer, PromptBudget, score_bill, scorer_or_default, walk_bill


@dataclass(frozen=True)
class FKSteering(FKSettings):
    """The settings of ``smc.FKSettings`` at work on our own pipelines. ``particles`` None takes as many as the budget
    has; ``scorer`` scores previews; ``guide`` pushes every move, and costs what it says.
    """

    scorer: PreviewScorer | None = None
    guide: Guide | None = None

    def __call__(self, run: SearchRun, allowance: PromptBudget) -> ScoredParticles:
        count = allowance.largest(self.particles, lambda n: self.bill(run, n), "particles")
        finished, state = self.steered(run, count)
        return finished.rows(state.choose())

    def steered(self, run: SearchRun, count: int) -> tuple[ScoredParticles, FKState]:
        """All of the ``count`` particles of each prompt at their end, and their weights."""
        kernel, particles = self._kernel(run), run.start(count)
        state = FKState(self, particles.prompt, run.steps, run.seed)
        *early, last = self.scoring_steps(run.steps)
        for step in early:
            particles, ratio = self._advance(run, particles, step + 1, kernel)
            scores = scorer_or_default(self.scorer)(run, particles)
            run.note(particles, scores)
            state.weigh(run.combined(scores), step, ratio)
            if (ancestors := state.resample()) is not None:
                particles = run.copy(particles, ancestors)
        particles, ratio = self._advance(run, particles, run.steps, kernel)
        finished = run.finish(particles)
        state.weigh(run.combined(finished.scores), last, ratio)
        return finished, state

    def _kernel(self, run: SearchRun) -> Kernel:
        if self.kernel is None:
            raise ValueError("a search moves by a kernel of its own: name one, such as DDIM(1.0)")
        require_stochastic(self.kernel, run.grid)
        return self.kernel

    def _advance(
        self, run: SearchRun, particles: Particles, to: int, kernel: Kernel
    ) -> tuple[Particles, Tensor | None]:
        """The particles at ``to``, and log p - log q (N,) of the guided moves."""
        if self.guide is None:
            return run.advance(particles, to, kernel), None
        parts = [self._guided(run, part, to, kernel, self.guide) for part in particles.split(run.batch_size)]
        return joined([part for part, _ in parts]), torch.cat([ratio for _, ratio in parts])

    @torch.no_grad()
    def _guided(
        self, run: SearchRun, part: Particles, to: int, kernel: Kernel, guide: Guide
    ) -> tuple[Particles, Tensor]:
        total = torch.zeros(len(part), dtype=torch.float64)
        while part.done < to:
            std = float(kernel(run.grid[part.done]).s)
            if std == 0:
                part = run.move(part, run.predict(part), kernel)
                continue
            prediction, gradient = guide(run, part, kernel, self.strength(part.done, run.steps))
            shift = std**2 * gradient
            total += guided_log_ratio(step_noise(part.step_seeds, part.done, part.x), shift, std)
            part = run.move(part, prediction, kernel, shift)
        return part, total

    def bill(self, run: SearchRun, particles: int) -> Counter[str]:
        """What one prompt costs."""
        scored = len(self.scoring_steps(run.steps)) - 1
        total = score_bill(run, particles)
        for _ in range(scored):
            total += scorer_or_default(self.scorer).bill(run, particles)
        return total + self._walk_bill(run, particles)

    def _walk_bill(self, run: SearchRun, particles: int) -> Counter[str]:
        if self.guide is None:
            return walk_bill(run, particles, run.steps)
        noisy = sum(float(self._kernel(run)(run.grid[i]).s) > 0 for i in range(run.steps))
        guided = self.guide.bill(run, particles)
        total = Counter({call: count * noisy for call, count in guided.items()})
        return total + walk_bill(run, particles, run.steps - noisy)
