"""Guided proposals: how the moves of particles are pushed towards reward.

A guide estimates g, the gradient (N, ...) of the log of what the target adds to the model at a state. A move of mean m
and deviation s is then drawn around m + s^2 g, the first-order optimum; the weights of sequential Monte Carlo make up
for the difference, so that a guide changes what is found and not what is aimed at.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from genalign.diffusion.noise import derived_seed, seeded_noise
from genalign.diffusion.transitions import Kernel, transition
from genalign.scoring.budget import DECODE, FORWARD, backward, reward_call
from genalign.scoring.score import score
from genalign.search.engine import Particles, SearchRun


class Guide(Protocol):
    """Pushes moves towards reward."""

    def __call__(self, run: SearchRun, part: Particles, kernel: Kernel, lam: float) -> tuple[Tensor, Tensor]:
        """The network's output at the candidates, which fit in one batch, and g for a target of exp(lam reward)."""

    def bill(self, run: SearchRun, candidates: int) -> Counter[str]:
        """What one guided move of so many costs, its forward included."""


@dataclass(frozen=True)
class RewardGradient:
    """g = ``scale`` lam grad r(preview), through decoder and denoiser: universal guidance (arXiv 2302.07121) as the
    proposal of twisted sequential Monte Carlo (arXiv 2306.17775; DAS, arXiv 2501.05803). For differentiable rewards.
    """

    scale: float = 1.0

    @torch.enable_grad()
    def __call__(self, run: SearchRun, part: Particles, kernel: Kernel, lam: float) -> tuple[Tensor, Tensor]:
        x = part.x.detach().clone().requires_grad_(True)
        step = run.grid[part.done]
        prediction = run.pipeline.predict(x, step, run.conditioning[part.prompt], run.guidance)
        samples = run.pipeline.decode(run.pipeline.path.x0(x.to(prediction.device), prediction, step))
        asked = [run.prompts[p] for p in part.prompt.tolist()]
        total = sum(reward.weight * reward(samples, asked).sum() for reward in run.rewards)
        if not isinstance(total, Tensor) or not total.requires_grad:
            raise ValueError("the rewards give no gradient to guide by: use DoobGuide, which needs none, or no guide")
        (gradient,) = torch.autograd.grad(total, x)
        return prediction.detach().cpu(), self.scale * lam * gradient.nan_to_num(0.0).cpu()

    def bill(self, run: SearchRun, candidates: int) -> Counter[str]:
        """A forward, a decode and the rewards, each with its backward."""
        return _with_backwards(run, candidates, candidates)


@dataclass(frozen=True)
class DoobGuide:
    """Doob's h-transform by samples of the next state (DOIT, arXiv 2602.16198), for any reward.

    ``proposals`` next states, in antithetic pairs, have their clean estimates from the network's output here; with
    weights softmax((r - mean) / (std ``tau``)) their noises average to v, and g is ``gamma`` times the product of
    J^T v / s with the Jacobian J of the move's mean: one backward through the denoiser. It does not know lam.
    """

    proposals: int = 8
    tau: float = 0.5
    gamma: float = 0.5

    def __post_init__(self) -> None:
        if self.proposals < 2 or self.proposals % 2 or not self.tau > 0:
            raise ValueError(f"proposals must be even, 2 or more, and tau positive, not {self}")

    def __call__(self, run: SearchRun, part: Particles, kernel: Kernel, lam: float) -> tuple[Tensor, Tensor]:
        step = run.grid[part.done]
        with torch.enable_grad():
            x = part.x.detach().clone().requires_grad_(True)
            prediction = run.pipeline.predict(x, step, run.conditioning[part.prompt], run.guidance)
            move = transition(run.pipeline.path, kernel, x.to(prediction.device), prediction, step)
            direction = self._direction(run, part, move.mean.detach(), prediction.detach(), kernel)
            (gradient,) = torch.autograd.grad((move.mean * direction).sum(), x)
        return prediction.detach().cpu(), self.gamma * gradient.cpu()

    def _direction(self, run: SearchRun, part: Particles, mean: Tensor, prediction: Tensor, kernel: Kernel) -> Tensor:
        """V / s (N, ...)."""
        step = run.grid[part.done]
        std = float(kernel(step).s)
        half = [self._noise(run, part, k, mean) for k in range(self.proposals // 2)]
        noises = torch.stack([*half, *(-noise for noise in half)])
        eps = run.pipeline.path.eps(part.x.to(mean), prediction, step)
        scores = torch.stack([self._scores(run, part, mean + std * noise, eps) for noise in noises])
        known = torch.where(scores.isnan(), scores.nan_to_num().min(), scores)
        spread = known.std(0).clamp(min=1e-12)
        weights = torch.softmax((known - known.mean(0)) / (spread * self.tau), dim=0).to(mean)
        return (weights.view(*weights.shape, *[1] * (mean.ndim - 1)) * noises).sum(0) / std

    def _noise(self, run: SearchRun, part: Particles, number: int, like: Tensor) -> Tensor:
        return seeded_noise([derived_seed(seed, "doob", part.done, number) for seed in part.step_seeds], like)

    @torch.no_grad()
    def _scores(self, run: SearchRun, part: Particles, following: Tensor, eps: Tensor) -> Tensor:
        """The rewards' weighted sum (N,) of the clean estimates of next states."""
        step = run.grid[part.done]
        clean = (following - float(step.sigma_next) * eps) / float(step.alpha_next)
        samples = run.pipeline.decode(clean)
        scores = score(run.rewards, samples, [run.prompts[p] for p in part.prompt.tolist()])
        return run.combined(scores)

    def bill(self, run: SearchRun, candidates: int) -> Counter[str]:
        """A forward with its backward, and a decode and the rewards for every proposal."""
        forwards = candidates * (2 if run.guidance > 1 else 1)
        scored = {DECODE: candidates * self.proposals}
        scored |= {reward_call(reward.name): candidates * self.proposals for reward in run.rewards}
        return Counter({FORWARD: forwards, backward(FORWARD): forwards} | scored)


def _with_backwards(run: SearchRun, candidates: int, scored: int) -> Counter[str]:
    calls = {FORWARD: candidates * (2 if run.guidance > 1 else 1), DECODE: scored}
    calls |= {reward_call(reward.name): scored for reward in run.rewards}
    return Counter(calls | {backward(call): count for call, count in calls.items()})


def guided_log_ratio(noise: Tensor, shift: Tensor, std: float) -> Tensor:
    """Log p - log q (N,) float64, summed over dimensions, of x' = m + shift + std noise drawn by q around m + shift in
    place of p around m: -(2 std noise shift + shift^2) / (2 std^2).
    """
    moved = shift.double() / std
    return -(noise.double() * moved + 0.5 * moved.square()).flatten(1).sum(1)
