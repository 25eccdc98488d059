"""Guided proposals: moves of particles that are shifted towards a higher reward.

A guide estimates g, the gradient (N, ...) of the log density that the target adds to the model at a state. A move of
mean m and deviation s is drawn around m + s^2 g instead, the optimum to first order. The weights of sequential Monte
Carlo correct for the shift, so that a guide changes how fast particles reach the target, but not the target.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from genalign.algorithms.reward_gradient import latent_gradient
from genalign.diffusion.noise import derived_seed, seeded_noise
from genalign.diffusion.transitions import Kernel, transition
from genalign.scoring.score import score
from genalign.search.engine import Particles, SearchRun


@dataclass(frozen=True)
class Guidance:
    """What a guide says of N particles: the network's ``prediction`` (N, ...) and the ``gradient`` g (N, ...).

    ``scores`` (N, K) are the rewards of the previews that the prediction gives, where the guide computed all of them:
    they are not computed again to weigh the particles.
    """

    prediction: Tensor
    gradient: Tensor
    scores: Tensor | None = None


class Guide(Protocol):
    """Estimates the gradient that shifts moves towards a higher reward."""

    def __call__(self, run: SearchRun, batch: Particles, kernel: Kernel, lam: float) -> Guidance:
        """Guide particles that fit into one batch.

        Args:
            run: The search; all networks are called through it, so that it counts them.
            batch: The particles before the move.
            kernel: The rule of the move.
            lam: Strength of the target exp(lam reward) at this step.
        """


@dataclass(frozen=True)
class RewardGradient:
    """The gradient of a differentiable reward of the preview, g = ``scale`` lam grad r, through decoder and denoiser.

    It is universal guidance (arXiv 2302.07121) as the proposal of twisted sequential Monte Carlo (arXiv 2306.17775;
    DAS, arXiv 2501.05803).
    """

    scale: float = 1.0

    @torch.enable_grad()
    def __call__(self, run: SearchRun, batch: Particles, kernel: Kernel, lam: float) -> Guidance:
        x = batch.x.detach().clone().requires_grad_(True)
        step = run.grid[batch.steps_done]
        prediction = run.pipeline.predict(x, step, run.conditioning[batch.prompt], run.guidance)
        preview = run.pipeline.path.x0(x.to(prediction.device), prediction, step)
        weighted = [reward for reward in run.rewards if reward.weight]  # the others are only reported
        found = latent_gradient(run.pipeline, weighted, preview, run.prompts_of(batch))
        (gradient,) = torch.autograd.grad(preview, x, found.gradient)
        scores = found.scores.cpu() if len(weighted) == len(run.rewards) else None
        return Guidance(prediction.detach().cpu(), self.scale * lam * gradient.nan_to_num(0.0).cpu(), scores)


@dataclass(frozen=True)
class DoobGuide:
    """Doob's h-transform estimated from samples of the next state, for any reward (DOIT, arXiv 2602.16198).

    The clean estimates of ``proposals`` next states, in antithetic pairs, come from the network's output at the current
    state. Their noises, weighted by softmax((r - mean) / (std ``tau``)), average to v, and g is ``gamma`` J^T v / s
    with the Jacobian J of the move's mean: one backward pass through the denoiser. It does not depend on lam.
    """

    proposals: int = 8
    tau: float = 0.5
    gamma: float = 0.5

    def __post_init__(self) -> None:
        if self.proposals < 2 or self.proposals % 2 or not self.tau > 0:
            raise ValueError(f"proposals must be even, 2 or more, and tau positive, not {self}")

    def __call__(self, run: SearchRun, batch: Particles, kernel: Kernel, lam: float) -> Guidance:
        step = run.grid[batch.steps_done]
        with torch.enable_grad():
            x = batch.x.detach().clone().requires_grad_(True)
            prediction = run.pipeline.predict(x, step, run.conditioning[batch.prompt], run.guidance)
            move = transition(run.pipeline.path, kernel, x.to(prediction.device), prediction, step)
            direction = self._direction(run, batch, move.mean.detach(), prediction.detach(), float(kernel(step).s))
            (gradient,) = torch.autograd.grad((move.mean * direction).sum(), x)
        return Guidance(prediction.detach().cpu(), self.gamma * gradient.cpu())

    @torch.no_grad()
    def _direction(self, run: SearchRun, batch: Particles, mean: Tensor, prediction: Tensor, std: float) -> Tensor:
        """Return v / s (N, ...) for moves of this mean (N, ...) and deviation."""
        step = run.grid[batch.steps_done]
        eps = run.pipeline.path.eps(batch.x.to(mean), prediction, step)
        # antithetic noises, and the rewards (proposals, N) of the clean estimates of the next states
        seeds = [
            [derived_seed(seed, "doob", batch.steps_done, k) for seed in batch.step_seeds.tolist()]
            for k in range(self.proposals // 2)
        ]
        half = torch.stack([seeded_noise(row, mean) for row in seeds])
        noises = torch.cat([half, -half])
        rewards = []
        for noise in noises:
            clean = (mean + std * noise - float(step.sigma_next) * eps) / float(step.alpha_next)
            scores = score(run.rewards, run.pipeline.decode(clean), run.prompts_of(batch))
            rewards.append(run.weighted_sum(scores))
        values = torch.stack(rewards)
        values = torch.where(values.isnan(), values.nan_to_num().min(), values)
        # the weighted mean of the noises
        spread = values.std(0).clamp(min=1e-12)
        weights = torch.softmax((values - values.mean(0)) / (spread * self.tau), dim=0).to(mean)
        return (weights.view(*weights.shape, *[1] * (mean.ndim - 1)) * noises).sum(0) / std


def guided_log_ratio(noise: Tensor, shift: Tensor, std: float) -> Tensor:
    """Return log p - log q (N,) float64, summed over dimensions, of x' = m + shift + std noise.

    q has the mean m + shift and p the mean m: -(2 std noise shift + shift^2) / (2 std^2).
    """
    moved = shift.double() / std
    return -(noise.double() * moved + 0.5 * moved.square()).flatten(1).sum(1)
