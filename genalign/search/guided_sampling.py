"""Sampling by the ODE along a reward's gradient: noisy reward guidance."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from genalign.diffusion.transitions import ODE
from genalign.scoring.budget import Budget
from genalign.search.engine import ScoredParticles, SearchRun, concatenate
from genalign.search.guidance import Guide, RewardGradient, ode_shift
from genalign.search.strategy import largest_size


@dataclass(frozen=True)
class NRG:
    """Noisy reward guidance (Flow-NRG, arXiv 2501.13918): the deterministic sampler, shifted along a reward's gradient.

    On a flow the velocity becomes v - lam sigma / (1 - sigma) grad r_t, and ``ode_shift`` is the same on every path. It
    samples from p(x) exp(lam r(x)) as far as the guide's r_t is log E[exp(lam r(x0)) | x_t] / lam: exactly for Gaussian
    data and a linear reward. There are no weights that would correct it, as ``FKSteering`` has for a stochastic
    sampler. Several candidates are sampled side by side, and the best one is returned.

    Args:
        lam: Strength of the target exp(lam reward), 0 or more.
        candidates: Number of samples of each prompt; None takes as many as the budget allows.
        guide: The gradient, such as ``NoiseAwareGradient``; None takes that of decoded previews, ``RewardGradient``.
            DoobGuide, which learns from the noise of moves, is refused.
        highest_noise: Largest noise level, sigma / (alpha + sigma), at which a move is shifted: near 1 the factor
            sigma / alpha grows without bound.
    """

    lam: float
    candidates: int | None = 1
    guide: Guide | None = None
    highest_noise: float = 0.98

    def __post_init__(self) -> None:
        if not 0 <= self.lam < math.inf:
            raise ValueError(f"lam must be finite and 0 or more, not {self.lam}; to lower a score, negate the reward")
        if not 0 < self.highest_noise < 1:
            raise ValueError(f"highest_noise is a noise level in (0, 1), not {self.highest_noise}")

    @torch.no_grad()
    def __call__(self, run: SearchRun, budget: Budget | None) -> ScoredParticles:
        count = largest_size(run, budget, self.candidates, lambda n: replace(self, candidates=n), "candidates")
        guide = self.guide or RewardGradient()
        parts = []
        for part in run.start(count).split(run.batch_size):
            while part.steps_done < run.steps:
                if float(run.grid.noise_share[part.steps_done]) > self.highest_noise:
                    part = run.move(part, run.predict(part), ODE())
                else:
                    guidance = guide(run, part, ODE(), self.lam)
                    shift = ode_shift(run.grid[part.steps_done]) * guidance.gradient
                    part = run.move(part, guidance.prediction, ODE(), shift)
            parts.append(part)
        return run.finish(concatenate(parts))
