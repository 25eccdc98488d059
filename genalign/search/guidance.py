"""Guided proposals: moves of particles that are shifted towards a higher reward.

A guide estimates g, the gradient (N, ...) of the log density that the target adds to the model at a state. A move of
mean m and deviation s is drawn around m + s^2 g instead, the optimum to first order. The weights of sequential Monte
Carlo correct for the shift, so a guide changes how fast particles reach the target, but not the target. A move of
the ODE, which has no noise to be drawn, is shifted by ``ode_shift`` instead, without weights.
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
from genalign.search.strategy import Previews, previews_at
from genalign.types import NoiseStep


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
            run: The search; all networks are called through it, so it counts them.
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
        ascent = latent_gradient(run.pipeline, weighted, preview, run.prompts_of(batch))
        (gradient,) = torch.autograd.grad(preview, x, ascent.gradient)
        scores = ascent.scores.cpu() if len(weighted) == len(run.rewards) else None
        return Guidance(prediction.detach().cpu(), self.scale * lam * gradient.nan_to_num(0.0).cpu(), scores)


class DifferentiableScorer(Protocol):
    """Expected rewards of previews, with a gradient: a noise-aware reward (``genalign.search.noise_aware``)."""

    def covers(self, noise_share: float) -> bool:
        """Return whether it was validated at this noise level, sigma / (alpha + sigma)."""

    def expected(self, previews: Previews) -> Tensor:
        """Return expected rewards (N,) of the clean samples, differentiable in the previews' latents."""


@dataclass(frozen=True)
class NoiseAwareGradient:
    """The gradient of a noise-aware reward of the preview, g = ``scale`` lam grad r_t.

    A reward that was trained on previews stands for r_t in noisy reward guidance (arXiv 2501.13918), whose own reward
    reads the noisy latents. Moves at levels where the scorer was not validated are not shifted.

    Args:
        scorer: A noise-aware reward, such as ``rewards.noise_aware.ScorerFile``.
        scale: Factor of the gradient.
        through_denoiser: Whether the gradient of the preview runs through the denoiser, by a backward pass of each
            step; without, the noise that the network predicts is held fixed, and d preview / dx is 1 / alpha.
    """

    scorer: DifferentiableScorer
    scale: float = 1.0
    through_denoiser: bool = True

    def __call__(self, run: SearchRun, batch: Particles, kernel: Kernel, lam: float) -> Guidance:
        step, levels = run.grid[batch.steps_done], run.grid.noise_share[:-1].tolist()
        if not any(map(self.scorer.covers, levels)):
            raise ValueError(
                "the noise-aware reward was validated at none of the noise levels of these steps,"
                f" {', '.join(f'{level:.2f}' for level in levels)}: set sampling.num_steps or sigmas to its levels"
            )
        if not self.scorer.covers(levels[batch.steps_done]):
            return Guidance(run.predict(batch), torch.zeros_like(batch.x))
        with torch.set_grad_enabled(self.through_denoiser):
            x = batch.x.detach().clone().requires_grad_(self.through_denoiser)
            prediction = run.pipeline.predict(x, step, run.conditioning[batch.prompt], run.guidance)
            preview = run.pipeline.path.x0(x.to(prediction.device), prediction, step)
        leaf = preview.detach().requires_grad_()
        with torch.enable_grad():
            expected = self.scorer.expected(previews_at(run, batch, leaf, levels[batch.steps_done])).sum()
        (gradient,) = torch.autograd.grad(expected, leaf)
        if self.through_denoiser:
            (gradient,) = torch.autograd.grad(preview, x, gradient)
        else:
            gradient = gradient / float(step.alpha)
        return Guidance(prediction.detach().cpu(), self.scale * lam * gradient.nan_to_num(0.0).cpu())


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
        if float(kernel(step).s) == 0:
            raise ValueError(
                f"DoobGuide learns from the noise of a move, and {kernel} draws none: use it in FKSteering, or guide by"
                " RewardGradient or NoiseAwareGradient"
            )
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


def ode_shift(step: NoiseStep) -> float:
    """Return the factor of g in a move of the ODE: the move along x0 and eps of the density tilted by g.

    By Tweedie's formula g moves eps by -sigma g and x0 by sigma^2 / alpha g, and so the mean alpha_next x0 + sigma_next
    eps by (alpha_next sigma^2 / alpha - sigma_next sigma) g. On a flow it is noisy reward guidance (Flow-NRG, arXiv
    2501.13918), v - sigma / (1 - sigma) g. Raises ValueError where alpha is 0: such a level has no tilted x0.
    """
    if float(step.alpha) == 0:
        raise ValueError("a move from pure noise (alpha = 0) cannot be shifted along a reward's gradient")
    alpha, sigma = float(step.alpha), float(step.sigma)
    return sigma * (float(step.alpha_next) * sigma - float(step.sigma_next) * alpha) / alpha
