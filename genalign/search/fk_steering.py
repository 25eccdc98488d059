"""Feynman-Kac steering as a strategy: particles are weighed, resampled and optionally guided."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from genalign.diffusion.rollout import step_noise
from genalign.diffusion.transitions import Kernel
from genalign.search.engine import Particles, ScoredParticles, SearchRun, concatenate
from genalign.search.guidance import Guide, guided_log_ratio
from genalign.search.smc import FKSettings, FKState, require_stochastic
from genalign.search.stepwise import Selection, Stepwise, StepwiseCall
from genalign.search.strategy import PreviewScorer, PromptBudget, score_previews


@dataclass(frozen=True)
class FKSteering(FKSettings):
    """Feynman-Kac steering of genalign's pipelines; see ``smc.FKSettings`` for the settings.

    ``particles`` None takes as many as the budget pays for, ``scorer`` scores the previews in place of the rewards, and
    ``guide`` shifts every stochastic move.
    """

    scorer: PreviewScorer | None = None
    guide: Guide | None = None

    def __call__(self, run: SearchRun, allowance: PromptBudget) -> ScoredParticles:
        count = allowance.largest(run, self.particles, lambda n: replace(self, particles=n), "particles")
        finished, state = self.steered(run, count)
        return finished.rows(state.choose())

    def steered(self, run: SearchRun, count: int) -> tuple[ScoredParticles, FKState]:
        """Return all of the ``count`` particles of each prompt at their end, and their weights."""
        if self.kernel is None:
            raise ValueError("a search needs a kernel to move particles by: set one, such as DDIM(1.0)")
        require_stochastic(self.kernel, run.grid)
        particles = run.start(count)
        state = FKState(self, particles.prompt, run.steps, run.seed)
        *early, last = self.scoring_steps(run.steps)
        for step in early:
            particles, log_ratio = self._advance(run, particles, step + 1, self.kernel)
            scores = score_previews(run, particles, self.scorer)
            state.weigh(run.weighted_sum(scores), step, log_ratio)
            if (ancestors := state.resample()) is not None:
                particles = run.resample(particles, ancestors)
        particles, log_ratio = self._advance(run, particles, run.steps, self.kernel)
        finished = run.finish(particles)
        state.weigh(run.weighted_sum(finished.scores), last, log_ratio)
        return finished, state

    def stepwise(self) -> Stepwise:
        """Describe the strategy to ``pipelines.steer``. Raises ValueError for a scorer or a guide of its own."""
        if self.scorer is not None or self.guide is not None:
            raise ValueError(
                "a pipeline of your own is steered by the rewards of decoded previews: leave out scorer and guide, or"
                " use them on a genalign pipeline, with genalign.search.search"
            )
        return Stepwise(self.particles, self.kernel, self.scoring_steps, lambda call: FKSelection(self, call))

    @torch.no_grad()
    def _advance(
        self, run: SearchRun, particles: Particles, to: int, kernel: Kernel
    ) -> tuple[Particles, Tensor | None]:
        """Return the particles after ``to`` steps, and log p - log q (N,) of the guided moves."""
        if self.guide is None:
            return run.advance(particles, to, kernel), None
        parts, log_ratios = [], []
        for part in particles.split(run.batch_size):
            log_ratio = torch.zeros(len(part), dtype=torch.float64)
            while part.steps_done < to:
                std = float(kernel(run.grid[part.steps_done]).s)
                if std == 0:
                    part = run.move(part, run.predict(part), kernel)
                    continue
                prediction, gradient = self.guide(run, part, kernel, self.strength(part.steps_done, run.steps))
                shift, noise = std**2 * gradient, step_noise(part.step_seeds.tolist(), part.steps_done, part.x)
                log_ratio += guided_log_ratio(noise, shift, std)
                part = run.move(part, prediction, kernel, shift)
            parts.append(part)
            log_ratios.append(log_ratio)
        return concatenate(parts), torch.cat(log_ratios)


class FKSelection(Selection):
    """The selections of ``FKState`` in a pipeline that the strategy does not drive."""

    def __init__(self, settings: FKSettings, call: StepwiseCall) -> None:
        super().__init__(call)
        self.state = FKState(settings, call.prompt, call.steps, call.seed)

    def select(self, step: int, scores: Tensor) -> Tensor | None:
        """Weigh the particles by the previews' weighted sum of rewards, and resample where weights are uneven."""
        self.state.weigh(self.call.weighted_sum(scores), step)
        return self.state.resample()

    def choose(self, scores: Tensor) -> Tensor:
        """Weigh the finished samples, and choose one by ``settings.terminal``."""
        self.state.weigh(self.call.weighted_sum(scores), self.call.steps - 1)
        return self.state.choose()
