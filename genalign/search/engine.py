"""The operations that strategies are made of: candidates are moved from noise to samples, decoded, scored and counted.

Shapes: N candidates, P prompts, K rewards.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from genalign.diffusion.noise import derived_seed
from genalign.diffusion.noise_shift import first_latents
from genalign.diffusion.paths import expand
from genalign.diffusion.rollout import step_noise
from genalign.diffusion.transitions import ODE, Kernel, transition
from genalign.scoring.budget import Ledger, Metered, metered_reward, metered_rewards
from genalign.scoring.score import NamedReward, combine, score
from genalign.search.lineage import Lineage
from genalign.search.ranking import best_per_prompt
from genalign.search.reward_failures import RewardFailures
from genalign.types import Grid, Pipeline, Prompt, RewardFunction

logger = logging.getLogger(__name__)

TOP = 4  # finished candidates of each prompt that a search holds on to, the best ones
_PER_CANDIDATE = ("prompt", "ids", "step_seeds", "noise", "x", "preview", "plain")


@dataclass(frozen=True)
class Particles:
    """N candidates after the same number of sampling steps; all tensors are on the CPU.

    Attributes:
        prompt: Index (N,) long of each candidate's prompt.
        ids: Number (N,) long of each candidate in the lineage.
        step_seeds: Seed (N,) long of the noise of each candidate's stochastic steps.
        noise: Initial noise (N, ...), before the shift of a noise hypernetwork.
        x: Current latents (N, ...).
        preview: Clean latents (N, ...) predicted at the last step; before the first step and after the last one, ``x``.
        plain: Whether each (N,) is what plain sampling, by the ODE, makes of the first noise of its prompt.
        steps_done: Number of sampling steps taken.
    """

    prompt: Tensor
    ids: Tensor
    step_seeds: Tensor
    noise: Tensor
    x: Tensor
    preview: Tensor
    plain: Tensor
    steps_done: int

    def __len__(self) -> int:
        return len(self.prompt)

    def rows(self, index: Tensor) -> Particles:
        """Select the candidates ``index`` (M,) long, in this order."""
        selected: dict[str, Any] = {name: getattr(self, name)[index] for name in _PER_CANDIDATE}
        return replace(self, **selected)

    def split(self, size: int) -> Iterator[Particles]:
        """Yield batches of at most ``size`` candidates."""
        for first in range(0, len(self), size):
            yield self.rows(torch.arange(first, min(first + size, len(self))))


def concatenate(parts: Sequence[Particles]) -> Particles:
    """Concatenate candidates after the same number of steps."""
    fields: dict[str, Any] = {name: torch.cat([getattr(part, name) for part in parts]) for name in _PER_CANDIDATE}
    return replace(parts[0], **fields)


@dataclass(frozen=True)
class ScoredParticles:
    """Candidates after the last step, with their decoded ``samples`` (N, ...) and ``scores`` (N, K).

    The rewards have ``weights`` (K,), whose signs count in the order of the candidates.
    """

    candidates: Particles
    samples: Tensor
    scores: Tensor
    weights: tuple[float, ...]

    def rows(self, index: Tensor) -> ScoredParticles:
        """Select the candidates ``index`` (M,) long, in this order."""
        return ScoredParticles(self.candidates.rows(index), self.samples[index], self.scores[index], self.weights)

    def extend(self, other: ScoredParticles) -> ScoredParticles:
        """Return these candidates followed by ``other``."""
        return ScoredParticles(
            concatenate([self.candidates, other.candidates]),
            torch.cat([self.samples, other.samples]),
            torch.cat([self.scores, other.scores]),
            self.weights,
        )

    def best(self, count: int = 1) -> Tensor:
        """Return the rows of the ``count`` best candidates of every prompt; several rewards count by their rank sum."""
        return best_per_prompt(self.scores, self.candidates.prompt, count, self.weights)


class SearchRun:
    """One search over P prompts: it moves, decodes and scores candidates, and records the lineage.

    ``ledger`` counts the calls of denoiser, decoder and rewards. ``top`` are the ``TOP`` best finished candidates of
    every prompt so far, and ``plain`` the plain samples among the finished candidates, by prompt.

    Strategies, guides and preview scorers reach the networks through a run only, so no call goes uncounted.

    Args:
        pipeline: The model.
        prompts: The prompts, whose candidates go through the networks together.
        rewards: The rewards.
        grid: The sampling steps.
        guidance: Scale of classifier-free guidance; 1 is none.
        batch_size: Largest number of candidates in a call.
        seed: Name that all random numbers of this search are derived from.
        kernel: The rule of the moves for which a strategy has none of its own, and of the plain samples.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        prompts: Sequence[Prompt],
        rewards: Sequence[NamedReward],
        grid: Grid,
        guidance: float,
        batch_size: int,
        seed: str,
        kernel: Kernel = ODE(),  # noqa: B008  # frozen
    ) -> None:
        self.kernel = kernel
        self.ledger, self.lineage, self.prompts = Ledger(), Lineage(), tuple(prompts)
        self.failures, self._unmetered = RewardFailures(), (pipeline, tuple(rewards))
        self.pipeline = Metered(pipeline, self.ledger)
        self.rewards = self.failures.watched(metered_rewards(rewards, self.ledger))
        self.top: ScoredParticles | None = None
        self.plain: dict[int, ScoredParticles] = {}
        self.finished_scores: list[Tensor] = []
        self.grid, self.guidance, self.batch_size, self.seed = grid, guidance, batch_size, seed
        self.conditioning = pipeline.encode(prompts)

    @property
    def weights(self) -> tuple[float, ...]:
        """The weights (K,) of the rewards."""
        return tuple(reward.weight for reward in self.rewards)

    @property
    def steps(self) -> int:
        """The number of sampling steps."""
        return len(self.grid)

    @property
    def unmetered_rewards(self) -> tuple[NamedReward, ...]:
        """The rewards themselves: their calls are not counted in the ledger."""
        return self._unmetered[1]

    def afresh(self) -> SearchRun:
        """Return a run of the same prompts and settings with a ledger and a lineage of its own."""
        pipeline, rewards = self._unmetered
        arguments = (self.grid, self.guidance, self.batch_size, self.seed, self.kernel)
        return SearchRun(pipeline, self.prompts, rewards, *arguments)

    def metered(self, name: str, function: RewardFunction) -> RewardFunction:
        """Wrap a scoring network that is not one of the rewards, so its calls are counted as "reward/NAME"."""
        return metered_reward(name, function, self.ledger)

    def start(self, count: int) -> Particles:
        """Return ``count`` new candidates of every prompt, ordered by prompt.

        Candidate j of a prompt has the same seeds whatever the number of candidates.
        """
        places = [(p, j) for p in range(len(self.prompts)) for j in range(count)]
        noise = self.pipeline.initial_noise([derived_seed(self.seed, p, "x", j) for p, j in places])
        self.conditioning = self.conditioning.to(noise.device)
        seeds = [derived_seed(self.seed, p, "w", j) for p, j in places]
        candidates = self.start_from(noise, [p for p, _ in places], seeds)
        return replace(candidates, plain=torch.tensor([j == 0 for _, j in places]))

    def start_from(
        self, noise: Tensor, prompts: Sequence[int], step_seeds: Sequence[int], shift: bool = True
    ) -> Particles:
        """Return new candidates.

        Args:
            noise: Their initial noise (N, ...).
            prompts: The prompt (N) of each.
            step_seeds: The seeds (N) of the noise of stochastic steps.
            shift: Let a noise hypernetwork, if the model has one, shift the noise.
        """
        ids, prompt = torch.tensor(self.lineage.add(prompts, [None] * len(prompts), 0)), torch.tensor(prompts)
        x, noise = (self.shifted(noise, prompt) if shift else noise).cpu(), noise.cpu()
        plain = torch.zeros(len(noise), dtype=torch.bool)
        return Particles(prompt, ids, torch.tensor(step_seeds), noise, x, x, plain, 0)

    @torch.no_grad()
    def shifted(self, noise: Tensor, prompt: Tensor) -> Tensor:
        """Return the latents (N, ...) that sampling begins with, of initial noise (N, ...) for prompts (N,)."""
        rows = zip(torch.split(noise, self.batch_size), torch.split(prompt, self.batch_size), strict=True)
        level, guidance = self.grid[0], self.guidance
        parts = [first_latents(self.pipeline, part, level, self.conditioning[own], guidance) for part, own in rows]
        return torch.cat(parts)

    @torch.no_grad()
    def advance(self, candidates: Particles, to: int, kernel: Kernel | None = None) -> Particles:
        """Move candidates until ``to`` steps are done, which costs one NFE a step, or two under guidance."""
        parts, kernel = [], kernel or self.kernel
        for part in candidates.split(self.batch_size):
            while part.steps_done < to:
                part = self.move(part, self.predict(part), kernel)
            parts.append(part)
        return concatenate(parts)

    def predict(self, batch: Particles) -> Tensor:
        """Return the network's output (N, ...) for candidates that fit into one batch."""
        step = self.grid[batch.steps_done]
        return self.pipeline.predict(batch.x, step, self.conditioning[batch.prompt], self.guidance).cpu()

    def move(self, candidates: Particles, prediction: Tensor, kernel: Kernel, shift: Tensor | float = 0.0) -> Particles:
        """Take one step with the network's output ``prediction`` (N, ...).

        Args:
            candidates: The candidates before the step.
            prediction: The network's output for them.
            kernel: The rule of the move.
            shift: Added to the mean of the move, (N, ...).
        """
        step = self.grid[candidates.steps_done]
        move = transition(self.pipeline.path, kernel, candidates.x, prediction, step)
        x = move.mean + shift
        if float(move.std.max()) > 0:
            noise = step_noise(candidates.step_seeds.tolist(), candidates.steps_done, candidates.x)
            x = x + expand(move.std, x) * noise
        done = candidates.steps_done + 1
        preview = x if done == self.steps else self.pipeline.path.x0(candidates.x, prediction, step)
        plain = candidates.plain & (kernel == self.kernel and isinstance(shift, float))
        return replace(candidates, x=x, preview=preview, plain=plain, steps_done=done)

    def in_batches(self, candidates: Particles, function: Callable[[Particles], Tensor]) -> Tensor:
        """Concatenate the results of ``function`` on batches of candidates."""
        return torch.cat([function(part) for part in candidates.split(self.batch_size)])

    @torch.no_grad()
    def decoded_scores(self, candidates: Particles) -> Tensor:
        """Return the rewards (N, K) of decoded previews, NaN where one failed."""
        return self.in_batches(candidates, lambda part: self._decode_and_score(part)[1])

    @torch.no_grad()
    def finish(self, candidates: Particles) -> ScoredParticles:
        """Take the remaining steps by the run's kernel, decode and score."""
        candidates = self.advance(candidates, self.steps)
        parts = [self._decode_and_score(part) for part in candidates.split(self.batch_size)]
        samples, scores = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return self.finished(ScoredParticles(candidates, samples, scores, self.weights))

    def finished(self, scored: ScoredParticles) -> ScoredParticles:
        """Record candidates after their last step, hold on to the best ones and the plain ones, and return them all."""
        candidates = scored.candidates
        self.lineage.close(candidates.ids.tolist(), self.steps)
        self.record_scores(candidates, scored.scores)
        self.finished_scores.append(scored.scores)
        everything = scored if self.top is None else self.top.extend(scored)
        self.top = everything.rows(everything.best(TOP))
        for row in candidates.plain.nonzero()[:, 0]:
            self.plain[int(candidates.prompt[row])] = scored.rows(row[None])
        return scored

    def _decode_and_score(self, batch: Particles) -> tuple[Tensor, Tensor]:
        if batch.steps_done == 0:
            raise ValueError("candidates have no preview before their first step: advance them first")
        samples = self.pipeline.decode(batch.preview)
        return samples.cpu(), score(self.rewards, samples, self.prompts_of(batch))

    def prompts_of(self, candidates: Particles) -> list[Prompt]:
        """Return the prompt of each candidate."""
        return [self.prompts[p] for p in candidates.prompt.tolist()]

    def weighted_sum(self, scores: Tensor) -> Tensor:
        """Return the weighted sum (N,) of the rewards' scores (N, K)."""
        return combine(scores, self.weights)

    def warn(self, message: str) -> None:
        """Log a warning about this search; a run that only counts is silent."""
        logger.warning(message)

    def record_scores(self, candidates: Particles, scores: Tensor) -> None:
        """Add scores (N, K) to the lineage."""
        self.lineage.record_scores(candidates.ids.tolist(), candidates.steps_done, scores.tolist())

    def keep(self, candidates: Particles, index: Tensor) -> Particles:
        """Select the candidates ``index`` (M,) long and close the others in the lineage."""
        survivors = candidates.rows(index)
        self.lineage.close(set(candidates.ids.tolist()) - set(survivors.ids.tolist()), candidates.steps_done)
        return survivors

    def resample(self, candidates: Particles, ancestors: Tensor) -> Particles:
        """Replace candidate i by a copy of candidate ``ancestors[i]`` that keeps the step seed of place i."""
        self.lineage.close(candidates.ids.tolist(), candidates.steps_done)
        return replace(self.copy(candidates.rows(ancestors)), step_seeds=candidates.step_seeds)

    def branch(self, candidates: Particles, count: int) -> Particles:
        """Replace every candidate by ``count`` adjacent copies with step seeds of their own."""
        self.lineage.close(candidates.ids.tolist(), candidates.steps_done)
        copies = self.copy(candidates.rows(torch.arange(len(candidates)).repeat_interleave(count)))
        seeds = [derived_seed(self.seed, "branch", number) for number in copies.ids.tolist()]
        return replace(copies, step_seeds=torch.tensor(seeds))

    def copy(self, candidates: Particles) -> Particles:
        """Return new candidates of the lineage whose parents are ``candidates``."""
        ids = self.lineage.add(candidates.prompt.tolist(), candidates.ids.tolist(), candidates.steps_done)
        return replace(candidates, ids=torch.tensor(ids))
