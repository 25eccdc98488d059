"""Feynman-Kac steering (arXiv 2501.06848): sequential Monte Carlo towards p(x0) exp(lam r(x0)).

K particles of each prompt are sampled together. At some steps their previews are scored, potentials G weigh them, and
particles of little weight are replaced by copies of others. The potentials along a path multiply to exp(lam r(x0)).
``FKState`` knows scores, steps and prompts, but no latents: its caller moves and scores N particles of P prompts, and
copies them as the ancestors say.

The scale of a reward decides which ``lam`` means anything. "auto" takes ``AUTO_LAM`` standard deviations of the first
scores of each prompt: lam = AUTO_LAM / std, so a particle one deviation above another weighs exp(AUTO_LAM) = 7.4
times as much. By it, 78 % of prompts with 4 particles of normal scores and 94 % with 8 are resampled at once, and 40 %
and 30 % of the particles count.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from genalign.diffusion.noise import derived_seed
from genalign.diffusion.rollout import step_noise
from genalign.diffusion.transitions import DDIM, Kernel
from genalign.scoring.budget import Budget
from genalign.search.engine import Particles, ScoredParticles, SearchRun, concatenate
from genalign.search.guidance import Guide, guided_log_ratio
from genalign.search.ranking import largest_per_prompt
from genalign.search.resampling import RESAMPLERS, ResamplerName, effective_size, normalized_weights
from genalign.search.stepwise import Selection, Stepwise, StepwiseCall
from genalign.search.strategy import PreviewScorer, largest_size, score_previews, standalone
from genalign.types import Grid

logger = logging.getLogger(__name__)

Potential = Literal["difference", "max", "sum"]
Terminal = Literal["argmax", "weighted"]
AUTO_LAM = 2.0
_ROUNDING = 8 * torch.finfo(torch.float32).eps  # scores that differ by less, relative to the largest, are equal


@dataclass(frozen=True)
class FKSteering:
    """Feynman-Kac steering.

    Attributes:
        particles: Number of particles of each prompt; None for as many as the budget allows.
        lam: Strength of the target p(x0) exp(lam r(x0)); "auto" takes 2 over the standard deviation of each prompt's
            first scores that differ.
        potential: Factor of a preview with reward r: exp(lam (r - previous r)), exp(lam max) or exp(lam sum) of the
            rewards so far. At the last step every kind makes the product exp(lam r(x0)).
        resampler: Scheme that draws the ancestors.
        ess: Resample a prompt when its effective number of particles is below this fraction of them; None for always.
        start: First scoring step, as a fraction of the steps.
        stop: Last scoring step, as a fraction of the steps.
        every: Distance of scoring steps, as a fraction of the steps.
        gamma: Tempers lam as DAS does (arXiv 2501.05803): by min((1 + gamma)^i - 1, 1) in the potential of the preview
            at step i, by the power i + 1 in the guide's move from step i, not at all at the end; None for the full lam.
        terminal: "argmax" returns the particle of the best final reward (search), "weighted" one drawn by the weights
            (sampling).
        kernel: The rule of the moves; None leaves them to the scheduler of a diffusers pipeline, which must draw noise.
        scorer: Scores the previews in place of the rewards.
        guide: Shifts every stochastic move.
    """

    particles: int | None = 4
    lam: float | Literal["auto"] = "auto"
    potential: Potential = "difference"
    resampler: ResamplerName = "ssp"
    ess: float | None = 0.5
    start: float = 0.2
    stop: float = 0.8
    every: float = 0.2
    gamma: float | None = None
    terminal: Terminal = "argmax"
    kernel: Kernel | None = DDIM(1.0)  # noqa: RUF009  # kernels are frozen
    scorer: PreviewScorer | None = None
    guide: Guide | None = None

    def __post_init__(self) -> None:
        for name, choices in (("potential", Potential), ("resampler", ResamplerName), ("terminal", Terminal)):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}, not {getattr(self, name)!r}")
        if self.particles is not None and self.particles < 1:
            raise ValueError(f"particles must be at least 1, or None if a budget decides, not {self.particles}")
        self._check_lam()
        if self.ess is not None and not 0 < self.ess <= 1:
            raise ValueError(f"ess is a share of the particles in (0, 1], or None for every time, not {self.ess}")
        if not (0 <= self.start <= self.stop <= 1 and self.every > 0):
            raise ValueError(
                "start, stop and every are fractions of the steps, 0 <= start <= stop <= 1 and every > 0, not"
                f" {self.start}, {self.stop} and {self.every}"
            )
        if self.gamma is not None and not self.gamma > 0:
            raise ValueError(f"gamma must be positive, or None for the full lam at every step, not {self.gamma}")

    def _check_lam(self) -> None:
        if self.lam == "auto":
            if self.guide is not None:
                raise ValueError(
                    "a guide moves particles before there are scores to choose lam by: give lam as a number"
                )
        elif isinstance(self.lam, str) or not 0 <= self.lam < math.inf:
            raise ValueError(
                f"lam must be 'auto', or finite and 0 or more, not {self.lam}; to lower a score, negate the reward"
            )

    def scoring_steps(self, total: int) -> tuple[int, ...]:
        """Return the indices of the steps whose previews are scored, and of the last step, whose samples are scored.

        The preview of the last step but one is not scored: copies made there could hardly differ any more, and under a
        kernel without noise at the end not at all. Raises ValueError if no step is left to resample at.
        """
        count = math.floor((self.stop - self.start) / self.every + 1e-9) + 1
        steps = {round((self.start + place * self.every) * total) for place in range(count)}
        early = sorted(step for step in steps if step < total - 2)
        if not early:
            raise ValueError(
                f"no preview between {self.start} and {self.stop} of {total} steps leaves its copies time to differ:"
                " take more steps, or an earlier start"
            )
        return (*early, total - 1)

    def tempering(self, power: int) -> float:
        """Return the factor of lam by DAS's schedule, min((1 + gamma)^power - 1, 1)."""
        if self.gamma is None:
            return 1.0
        return min(math.expm1(min(power * math.log1p(self.gamma), 1.0)), 1.0)

    def __call__(self, run: SearchRun, budget: Budget | None) -> ScoredParticles:
        count = largest_size(run, budget, self.particles, lambda n: replace(self, particles=n), "particles")
        finished, state = self.steered(run, count)
        if advice := state.advice():
            run.warn(f"{advice} ({run.prompts[0].text})" if len(run.prompts) == 1 else advice)
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
            particles, log_ratio, scores = self._advance(run, particles, step + 1, self.kernel)
            if scores is None or self.scorer is not None:
                scores = score_previews(run, particles, self.scorer)
            else:
                run.record_scores(particles, scores)
            state.weigh(run.weighted_sum(scores), step, log_ratio)
            if (ancestors := state.resample()) is not None:
                particles = run.resample(particles, ancestors)
        particles, log_ratio, _ = self._advance(run, particles, run.steps, self.kernel)
        finished = run.finish(particles)
        state.weigh(run.weighted_sum(finished.scores), last, log_ratio)
        return finished, state

    def stepwise(self) -> Stepwise:
        """Describe the strategy to ``pipelines.steer``. Raises ValueError for a guide, or a scorer that needs a run."""
        if self.guide is not None:
            raise ValueError(
                "a guide moves the particles of a genalign pipeline, by genalign.search.search: leave it out for a"
                " pipeline of your own"
            )
        scorer = standalone(self.scorer)
        return Stepwise(self.particles, self.kernel, self.scoring_steps, lambda call: FKSelection(self, call), scorer)

    @torch.no_grad()
    def _advance(
        self, run: SearchRun, particles: Particles, to: int, kernel: Kernel
    ) -> tuple[Particles, Tensor | None, Tensor | None]:
        """Return the particles after ``to`` steps, log p - log q (N,) of their moves, and the guide's scores (N, K).

        The scores are of the particles' previews, or None where the guide did not score all of them. Without
        a guide both are None.
        """
        if self.guide is None:
            return run.advance(particles, to, kernel), None, None
        parts, log_ratios, scored = [], [], []
        for part in particles.split(run.batch_size):
            log_ratio, scores = torch.zeros(len(part), dtype=torch.float64), None
            while part.steps_done < to:
                std = float(kernel(run.grid[part.steps_done]).s)
                if std == 0:
                    part, scores = run.move(part, run.predict(part), kernel), None
                    continue
                assert not isinstance(self.lam, str), "refused above"
                lam = self.lam * self.tempering(part.steps_done + 1)
                guidance = self.guide(run, part, kernel, lam)
                shift, noise = std**2 * guidance.gradient, step_noise(part.step_seeds.tolist(), part.steps_done, part.x)
                log_ratio += guided_log_ratio(noise, shift, std)
                part, scores = run.move(part, guidance.prediction, kernel, shift), guidance.scores
            parts.append(part)
            log_ratios.append(log_ratio)
            scored += [] if scores is None else [scores]
        guide_scores = torch.cat(scored) if len(scored) == len(parts) else None
        return concatenate(parts), torch.cat(log_ratios), guide_scores


def require_stochastic(kernel: Kernel, grid: Grid) -> None:
    """Raise ValueError for a kernel that does not draw noise at every step of the grid but the last."""
    if not bool((kernel(grid[torch.arange(len(grid))]).s[:-1] > 0).all()):
        raise ValueError(
            f"{kernel} moves without noise, so copies of a particle would stay identical and resampling could"
            " find nothing new: use a stochastic kernel such as DDIM(1.0), or Prune, which makes no copies"
        )


class FKState:
    """The weights of N particles of P prompts during one run; a new run needs a new state.

    Prompts may have different numbers of particles, and never exchange any. The random numbers of a prompt depend on
    ``seed`` and its index alone. Tensors are float64 or long, on the CPU.

    Args:
        settings: How to weigh and resample.
        group: Index (N,) long of each particle's prompt.
        total: Number of sampling steps.
        seed: Seed of the resampling.
    """

    def __init__(self, settings: FKSteering, group: Tensor, total: int, seed: int | str) -> None:
        self.settings, self.group, self.total = settings, group.cpu(), total
        keys = torch.unique(self.group)
        self.members = [(self.group == key).nonzero()[:, 0] for key in keys]
        self._generators = [torch.Generator().manual_seed(derived_seed(seed, "resample", int(key))) for key in keys]
        self._step = -1
        lam = math.nan if settings.lam == "auto" else settings.lam
        self.lam = torch.full(
            (len(group),), lam, dtype=torch.float64
        )  # of each particle's prompt; NaN until it is known
        self.spread: float | None = (
            None  # the largest standard deviation of a prompt's scores at any step before the last
        )
        self.was_resampled = False
        self._scores = torch.full((len(group),), -math.inf, dtype=torch.float64)
        self._log_w = torch.zeros_like(self._scores)  # since the prompt was last resampled
        self._log_product = torch.zeros_like(self._scores)  # of all potentials along the path
        self._rewards = self._scores.clone() if settings.potential == "max" else self._log_w.clone()  # max or sum
        self._failed = torch.zeros(len(group), dtype=torch.bool)

    @property
    def log_weights(self) -> Tensor:
        """The log weights (N,), up to a constant of each prompt; -inf for a particle whose score failed."""
        return torch.where(self._failed, -math.inf, self._log_w)

    def weigh(self, scores: Tensor, step: int, log_ratio: Tensor | None = None) -> None:
        """Multiply the weights by the potentials of one step.

        A particle whose score is not finite has no weight until it is scored again. If all scores of a prompt failed,
        the step does not change its weights.

        Args:
            scores: Rewards (N,) of the previews, or at the last step of the samples.
            step: Index of the step that the previews belong to; steps ascend.
            log_ratio: log p - log q (N,), summed over the moves since the last call, if they were drawn from a guided
                q instead of the kernel's p.

        Raises:
            ValueError: A ratio that is not finite.
        """
        if log_ratio is not None:
            if not bool(log_ratio.isfinite().all()):
                raise ValueError("log_ratio is not finite: guide only moves that draw noise, by finite gradients")
            self._log_w += log_ratio.detach().cpu().double()
        self._step = step
        self._scores = scores.detach().cpu().double()
        valid = self._scores.isfinite()
        if count := int((~valid).sum()):
            logger.warning("%d of %d scores at step %d are not finite: weight 0", count, len(valid), step)
        self._scores = torch.where(valid, self._scores, -math.inf)
        self._measure_spread(step)
        # the log product of all potentials up to this step; while lam is not known, all scores of the prompt are equal
        tempering = 1.0 if step == self.total - 1 else self.settings.tempering(step)
        lam = tempering * self.lam.nan_to_num(0.0)
        if self.settings.potential == "difference" or step == self.total - 1:
            product = lam * torch.where(valid, self._scores, 0.0)
        else:
            combine = torch.maximum if self.settings.potential == "max" else torch.add
            self._rewards = torch.where(valid, combine(self._rewards, self._scores), self._rewards)
            product = self._log_product + lam * self._rewards
        self._log_w = torch.where(valid, self._log_w + product - self._log_product, self._log_w)
        self._log_product = torch.where(valid, product, self._log_product)
        for members in self.members:
            if bool(valid[members].any()):
                self._failed[members] = ~valid[members]

    def _measure_spread(self, step: int) -> None:
        """Note the standard deviation of each prompt's scores, and choose its lam by the first that is not 0."""
        for members in self.members:
            scores = self._scores[members]
            scores = scores[scores.isfinite()]
            std = float(scores.std(correction=0)) if len(scores) else 0.0
            if len(scores) and std <= _ROUNDING * float(scores.abs().max()):
                std = 0.0
            if step < self.total - 1:
                self.spread = max(std, self.spread or 0.0)
            if std > 0 and bool(self.lam[members].isnan().all()):
                self.lam[members] = AUTO_LAM / std

    def advice(self) -> str | None:
        """Say in one line what to try if particles were scored on their way and none was ever resampled."""
        if self.spread is None or self.was_resampled or self.settings.lam == 0 or len(self.group) == len(self.members):
            return None
        if self.spread == 0:
            return (
                "FK steering never resampled: all previews of a prompt scored the same; score later ones (start=0.5),"
                " or use BestOfN"
            )
        lam = "auto" if self.settings.lam == "auto" else f"{self.settings.lam:g}"
        remedy = (
            f"lam='auto', or lam={AUTO_LAM / self.spread:.2g}" if lam != "auto" else "a larger ess, or more particles"
        )
        return (
            f"FK steering never resampled: the scores of a prompt's previews spread by {self.spread:.2g} (standard"
            f" deviation) at lam={lam}, so all particles weigh about the same; try {remedy}"
        )

    def resample(self) -> Tensor | None:
        """Return the ancestor (N,) long of every particle, or None if no prompt needs resampling.

        A prompt whose particles are effectively many keeps them and their weights, and no prompt is resampled after the
        last step. The caller copies all that belongs to a particle but its source of noise, which stays with the place.
        """
        if self._step == self.total - 1:
            return None
        ancestors, changed, ess = torch.arange(len(self.group)), False, self.settings.ess
        draw = RESAMPLERS[self.settings.resampler]
        for members, generator in zip(self.members, self._generators, strict=True):
            log_weights = self.log_weights[members]
            if ess is None or effective_size(log_weights) < ess * len(members):
                ancestors[members] = members[draw(normalized_weights(log_weights), generator)]
                self._log_w[members], changed = 0.0, True
        if not changed:
            return None
        self.was_resampled = True
        self._scores, self._failed = self._scores[ancestors], self._failed[ancestors]
        self._log_w, self._log_product = self._log_w[ancestors], self._log_product[ancestors]
        self._rewards = self._rewards[ancestors]
        return ancestors

    def choose(self) -> Tensor:
        """Return the particle (P,) long of each prompt that ``settings.terminal`` selects, after the last step.

        Of equal rewards it is the first.
        """
        if self.settings.terminal == "argmax":
            return largest_per_prompt(self._scores, self.group, 1)
        draws = [
            members[torch.multinomial(normalized_weights(self.log_weights[members]), 1, generator=generator)]
            for members, generator in zip(self.members, self._generators, strict=True)
        ]
        return torch.cat(draws)


class FKSelection(Selection):
    """The selections of ``FKState`` in a pipeline that the strategy does not drive."""

    def __init__(self, settings: FKSteering, call: StepwiseCall) -> None:
        super().__init__(call)
        self.state = FKState(settings, call.prompt, call.steps, call.seed)

    def select(self, step: int, scores: Tensor) -> Tensor | None:
        """Weigh the particles by the previews' weighted sum of rewards, and resample where weights are uneven."""
        self.state.weigh(self.call.weighted_sum(scores), step)
        return self.state.resample()

    def choose(self, scores: Tensor) -> Tensor:
        """Weigh the finished samples, and choose one by ``settings.terminal``."""
        self.state.weigh(self.call.weighted_sum(scores), self.call.steps - 1)
        if advice := self.state.advice():
            logger.warning(advice)
        return self.state.choose()
