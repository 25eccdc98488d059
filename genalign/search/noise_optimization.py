"""Noise optimisation: gradients of differentiable rewards through the sampling steps, to the noise itself.

P prompts, one sample of each; M noises of a sample: the initial one, and one for each stochastic step.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from genalign.diffusion.noise import derived_seed, seeded_noise
from genalign.diffusion.transitions import DDIM, ODE, Kernel, transition
from genalign.scoring.budget import DECODE, FORWARD, backward, reward_call
from genalign.search.engine import ScoredParticles, SearchRun
from genalign.search.strategy import PromptBudget, Strategy


@dataclass(frozen=True)
class NoiseOptimization(ABC):
    """Gradient steps on a sample's noises, each of unit variance; the best sample of all iterations is returned.

    ``iterations`` None makes as many as the budget has. ``begin``, such as ``Prune``, finds the noise to start from,
    with the ``share`` of the budget. ``recompute`` holds one step's graph at a time, for one more forward of each step
    (gradient checkpointing). Gradients are clipped to the norm ``clip`` for each prompt.
    """

    iterations: int | None = None
    learning_rate: float = 5.0
    clip: float = 0.1
    begin: Strategy | None = None
    share: float = 0.5
    recompute: bool = False

    @property
    @abstractmethod
    def kernel(self) -> Kernel:
        """How the noises make a sample."""

    @abstractmethod
    def optimizer(self, noises: Tensor) -> torch.optim.Optimizer:
        """Over ``noises`` (P, M, ...)."""

    @abstractmethod
    def penalty(self, noises: Tensor) -> Tensor:
        """What keeps ``noises`` (P, M, ...) like noise: (P,), added to minus the reward."""

    def __call__(self, run: SearchRun, allowance: PromptBudget) -> ScoredParticles:
        initial = self._initial(run, allowance)
        iterations = allowance.after(run).largest(self.iterations, lambda n: self.bill(run, n), "iterations")
        unit = initial / _first_level(run)
        noises = torch.cat([unit[:, None], self._step_noises(run, initial)], dim=1).requires_grad_(True)
        optimizer, found = self.optimizer(noises), None
        weights = torch.tensor([reward.weight for reward in run.rewards], device=noises.device)
        for number in range(iterations):
            tried, scores = self._sampled(run, noises)
            found = _better(found, tried)
            if number + 1 < iterations:
                loss = self.penalty(noises).sum() - (scores @ weights).sum()
                (gradient,) = torch.autograd.grad(loss, noises)
                noises.grad = _clipped(gradient, self.clip)
                optimizer.step()
        assert found is not None, "there is at least one iteration"
        return found

    def _initial(self, run: SearchRun, allowance: PromptBudget) -> Tensor:
        """Noise (P, ...) to start from."""
        if self.begin is None:
            return run.start(1).noise
        first = self.begin(run, allowance.part(self.share))
        return first.candidates.noise[first.best()]

    def _stochastic(self, run: SearchRun) -> list[int]:
        return [i for i in range(run.steps) if float(self.kernel(run.grid[i]).s) > 0]

    def _step_noises(self, run: SearchRun, like: Tensor) -> Tensor:
        """(P, M - 1, ...)."""
        steps = self._stochastic(run)
        rows = [
            seeded_noise([derived_seed(run.seed, p, "step", i) for i in steps], like) for p in range(len(like)) if steps
        ]
        return torch.stack(rows) if rows else like.new_empty(len(like), 0, *like.shape[1:])

    def _sampled(self, run: SearchRun, noises: Tensor) -> tuple[ScoredParticles, Tensor]:
        """Samples as candidates of their own, and their scores (P, K) with a gradient."""
        prompts = list(range(len(run.prompts)))
        x, noisy = noises[:, 0] * _first_level(run), self._stochastic(run)
        begun = run.begin(x.detach(), prompts, [0] * len(prompts))
        for i in range(run.steps):
            noise = noises[:, 1 + noisy.index(i)] if i in noisy else None
            x = (
                checkpoint(self._move, run, x, noise, i, use_reentrant=False)
                if self.recompute
                else self._move(run, x, noise, i)
            )
        samples = run.pipeline.decode(x)
        scores = torch.stack([reward(samples, run.prompts).float() for reward in run.rewards], dim=1)
        if not scores.requires_grad:
            raise ValueError("the rewards give no gradient: noise optimisation needs one; use ZeroOrder or Evolution")
        latents = x.detach().cpu()
        ended = replace(begun, x=latents, preview=latents, done=run.steps)
        run.note(ended, scores.detach().cpu())
        run.lineage.close(ended.names, run.steps)
        return ScoredParticles(ended, samples.detach().cpu(), scores.detach().cpu()), scores

    def _move(self, run: SearchRun, x: Tensor, noise: Tensor | None, index: int) -> Tensor:
        step = run.grid[index]
        prediction = run.pipeline.predict(x, step, run.conditioning, run.guidance)
        move = transition(run.pipeline.path, self.kernel, x.to(prediction.device), prediction, step)
        return move.mean if noise is None else move.sample(noise.to(prediction.device))

    def bill(self, run: SearchRun, iterations: int) -> Counter[str]:
        """What one prompt costs, without what ``begin`` does; the last iteration has no gradient."""
        calls = Counter({FORWARD: run.steps * (2 if run.guidance > 1 else 1), DECODE: 1})
        calls.update({reward_call(reward.name): 1 for reward in run.rewards})
        total: Counter[str] = Counter()
        for call, count in calls.items():
            total[call] = count * iterations
            total[backward(call)] = count * (iterations - 1)
        if self.recompute:
            total[FORWARD] += calls[FORWARD] * (iterations - 1)
        return +total


def _first_level(run: SearchRun) -> float:
    """The spread of initial latents: 1, but on a path whose noise goes beyond (``EDMPath``)."""
    return max(1.0, float(run.grid.sigma[0]))


def _better(found: ScoredParticles | None, tried: ScoredParticles) -> ScoredParticles:
    if found is None:
        return tried
    both = found.joined(tried)
    return both.rows(both.best())


def _clipped(gradient: Tensor, limit: float) -> Tensor:
    norms = gradient.flatten(1).norm(dim=1).view(-1, *[1] * (gradient.ndim - 1))
    clipped: Tensor = gradient * (limit / norms.clamp(min=limit))
    return clipped


@dataclass(frozen=True)
class ReNO(NoiseOptimization):
    """Reward-based noise optimisation (ReNO, arXiv 2406.04312): SGD with Nesterov momentum on the initial noise of a
    model of one or a few steps, with the negative log density of the noise's length, ``norm_weight`` times
    |e|^2 / 2 - (d - 1) log |e|, which is least at |e|^2 = d - 1.
    """

    momentum: float = 0.9
    norm_weight: float = 0.01

    @property
    def kernel(self) -> Kernel:
        """The ODE."""
        return ODE()

    def optimizer(self, noises: Tensor) -> torch.optim.Optimizer:
        """SGD."""
        return torch.optim.SGD([noises], lr=self.learning_rate, momentum=self.momentum, nesterov=self.momentum > 0)

    def penalty(self, noises: Tensor) -> Tensor:
        """Of the length."""
        flat = noises.float().flatten(1)
        length = flat.norm(dim=1)
        energy: Tensor = length.square() / 2 - (flat.shape[1] - 1) * length.log()
        return self.norm_weight * energy


@dataclass(frozen=True)
class DNO(NoiseOptimization):
    """Direct noise optimisation (arXiv 2405.18881): AdamW on all noises of a stochastic sampler.

    ``gamma`` weighs the log probability that noise would have the mean and the covariance that were found, over
    sub-vectors of ``width`` values, as they lie and in ``permutations`` random orders; it is flat inside the typical
    set. 0 leaves it out, as the public code does.
    """

    learning_rate: float = 0.01
    clip: float = 1.0
    eta: float = 1.0
    gamma: float = 0.0
    width: int = 16
    permutations: int = 100

    @property
    def kernel(self) -> Kernel:
        """DDIM's."""
        return DDIM(self.eta)

    def optimizer(self, noises: Tensor) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW([noises], lr=self.learning_rate)

    def penalty(self, noises: Tensor) -> Tensor:
        """Of what is unlike noise."""
        if not self.gamma:
            return noises.new_zeros(len(noises))
        return self.gamma * torch.stack([self._unlikeliness(own.flatten()) for own in noises])

    def _unlikeliness(self, values: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        orders = [torch.randperm(len(values), generator=generator).to(values.device) for _ in range(self.permutations)]
        shuffled = [noise_log_probability(values[order], self.width) for order in orders]
        return -noise_log_probability(values, self.width) - torch.stack(shuffled).mean()


def noise_log_probability(values: Tensor, width: int) -> Tensor:
    """An upper bound of the log probability () that N(0, I) noise, cut into n = len / ``width`` sub-vectors, has as
    large a mean and as odd a covariance: log 2 + min(-n M^2 / (2 k), -log 2) for the norm M of the mean and
    log 2 + min(-n D^2 / 2, -log 2), D = (sqrt(1 + C) - 1 - sqrt(k / n))_+ for the spectral norm C of cov - I
    (arXiv 2405.18881, section 4).
    """
    parts = values[: len(values) // width * width].view(-1, width)
    n = len(parts)
    mean = parts.mean(0)
    covariance = parts.T @ parts / n
    odd = torch.linalg.matrix_norm(covariance - torch.eye(width).to(covariance), ord=2)
    excess = torch.relu((1 + odd).sqrt() - 1 - math.sqrt(width / n))
    of_mean = (-n * mean.square().sum() / (2 * width)).clamp(max=-math.log(2))
    of_covariance = (-n * excess.square() / 2).clamp(max=-math.log(2))
    return of_mean + of_covariance + 2 * math.log(2)
