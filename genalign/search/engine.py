"""What every strategy works with: candidates on their way from noise to samples, moved in batches, scored and billed.

N candidates, K rewards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from genalign.diffusion.noise import derived_seed
from genalign.diffusion.rollout import step_noise
from genalign.diffusion.transitions import ODE, Kernel, transition
from genalign.scoring.budget import Ledger, Metered
from genalign.scoring.combine import combine
from genalign.scoring.score import NamedReward, score
from genalign.search.lineage import Lineage
from genalign.search.ranking import top
from genalign.types import Grid, Prompt


@dataclass(frozen=True)
class Particles:
    """N candidates that are ``done`` steps on their way.

    ``noise`` (N, ...) are their initial latents, ``x`` (N, ...) those of now, and ``preview`` (N, ...) the clean
    latents expected at the last evaluated step, which at the end are x itself; None before the first step. All are kept
    on the CPU. ``prompt`` (N,) long is the place of their prompt, ``names`` are their numbers in the lineage,
    ``step_seeds`` draw the noise of their steps.
    """

    prompt: Tensor
    names: tuple[int, ...]
    step_seeds: tuple[int, ...]
    noise: Tensor
    x: Tensor
    preview: Tensor | None
    done: int

    def __len__(self) -> int:
        return len(self.prompt)

    def rows(self, index: Tensor) -> Particles:
        """Those of ``index`` (M,) long, in its order."""
        chosen = index.tolist()
        return replace(
            self,
            prompt=self.prompt[index],
            names=tuple(self.names[i] for i in chosen),
            step_seeds=tuple(self.step_seeds[i] for i in chosen),
            noise=self.noise[index],
            x=self.x[index],
            preview=None if self.preview is None else self.preview[index],
        )

    def split(self, size: int) -> Iterator[Particles]:
        """Parts of at most ``size``."""
        for first in range(0, len(self), size):
            yield self.rows(torch.arange(first, min(first + size, len(self))))


def joined(parts: Sequence[Particles]) -> Particles:
    """Candidates that are equally far, together."""
    previews = [part.preview for part in parts if part.preview is not None]
    return replace(
        parts[0],
        prompt=torch.cat([part.prompt for part in parts]),
        names=tuple(name for part in parts for name in part.names),
        step_seeds=tuple(seed for part in parts for seed in part.step_seeds),
        noise=torch.cat([part.noise for part in parts]),
        x=torch.cat([part.x for part in parts]),
        preview=torch.cat(previews) if len(previews) == len(parts) else None,
    )


@dataclass(frozen=True)
class ScoredParticles:
    """Candidates at their end, with their decoded ``samples`` (N, ...) and their ``scores`` (N, K)."""

    candidates: Particles
    samples: Tensor
    scores: Tensor

    def rows(self, index: Tensor) -> ScoredParticles:
        """Those of ``index`` (M,) long, in its order."""
        return ScoredParticles(self.candidates.rows(index), self.samples[index], self.scores[index])

    def joined(self, other: ScoredParticles) -> ScoredParticles:
        """These, then those of ``other``."""
        return ScoredParticles(
            joined([self.candidates, other.candidates]),
            torch.cat([self.samples, other.samples]),
            torch.cat([self.scores, other.scores]),
        )

    def best(self, count: int = 1) -> Tensor:
        """The rows of the ``count`` best of every prompt; of several rewards, by the sum of ranks."""
        return top(self.scores, self.candidates.prompt, count)


class SearchRun:
    """A search over P prompts that are worked on together.

    What moves, decodes and scores candidates goes through here, so that the ledger and the lineage miss nothing.
    ``rewards`` are billed by whoever made them (``budget.metered_reward``).
    """

    def __init__(
        self,
        pipeline: Metered,
        prompts: Sequence[Prompt],
        rewards: Sequence[NamedReward],
        grid: Grid,
        guidance: float,
        batch_size: int,
        seed: str,
    ) -> None:
        self.pipeline, self.prompts, self.rewards = pipeline, tuple(prompts), tuple(rewards)
        self.grid, self.guidance, self.batch_size, self.seed = grid, guidance, batch_size, seed
        self.lineage, self._begun = Lineage(), pipeline.ledger.copy()
        self.conditioning = pipeline.encode([prompt.text for prompt in prompts])

    @property
    def spent(self) -> Ledger:
        """What this run has cost so far."""
        return self.pipeline.ledger.since(self._begun)

    def bill(self, call: str, samples: int) -> None:
        """Count what does not go through the pipeline or the rewards."""
        self.pipeline.ledger.bill(call, samples)

    @property
    def steps(self) -> int:
        """From noise to a sample."""
        return len(self.grid)

    def start(self, count: int, first: int = 0) -> Particles:
        """``count`` new candidates of every prompt, prompt by prompt: the ``first``-th and those after it of the seeds
        that belong to (run, prompt). Candidate j is the same alone and among others.
        """
        places = [(p, j) for p in range(len(self.prompts)) for j in range(first, first + count)]
        noise = self.pipeline.initial_noise([derived_seed(self.seed, p, "x", j) for p, j in places])
        return self.begin(noise, [p for p, _ in places], [derived_seed(self.seed, p, "w", j) for p, j in places])

    def begin(self, noise: Tensor, prompts: Sequence[int], step_seeds: Sequence[int]) -> Particles:
        """New candidates from initial latents (N, ...)."""
        names = self.lineage.add(prompts, [None] * len(prompts), 0)
        return Particles(torch.tensor(prompts), names, tuple(step_seeds), noise.cpu(), noise.cpu(), None, 0)

    @torch.no_grad()
    def advance(self, candidates: Particles, to: int, kernel: Kernel = ODE()) -> Particles:  # noqa: B008  # frozen
        """Move on until ``to`` steps are done: (to - done) forwards each, twice that under guidance."""
        if to <= candidates.done:
            raise ValueError(f"candidates that have done {candidates.done} steps cannot advance to {to}")
        return joined([self._walk(part, to, kernel) for part in candidates.split(self.batch_size)])

    def _walk(self, part: Particles, to: int, kernel: Kernel) -> Particles:
        while part.done < to:
            part = self.move(part, self.predict(part), kernel)
        return part

    def predict(self, part: Particles) -> Tensor:
        """The network's output (N, ...) for candidates that fit in one batch: a forward each."""
        step = self.grid[part.done]
        return self.pipeline.predict(part.x, step, self.conditioning[part.prompt], self.guidance).cpu()

    def move(self, part: Particles, prediction: Tensor, kernel: Kernel, shift: Tensor | float = 0.0) -> Particles:
        """One step by a prediction, its mean moved by ``shift`` (N, ...)."""
        step = self.grid[part.done]
        move = transition(self.pipeline.path, kernel, part.x, prediction, step)
        x = move.mean + shift
        if float(move.std.max()) > 0:
            x = x + move.std * step_noise(part.step_seeds, part.done, part.x)
        done = part.done + 1
        preview = x if done == self.steps else self.pipeline.path.x0(part.x, prediction, step)
        return replace(part, x=x, preview=preview, done=done)

    def batched(self, candidates: Particles, work: Callable[[Particles], Tensor]) -> Tensor:
        """The results of ``work`` on batches, put together."""
        return torch.cat([work(part) for part in candidates.split(self.batch_size)])

    @torch.no_grad()
    def decoded_scores(self, candidates: Particles) -> Tensor:
        """The rewards (N, K) of decoded previews, NaN where one failed: a decode and a call of each reward for each."""
        return torch.cat([scores for _, scores in self._scored(candidates)])

    @torch.no_grad()
    def finish(self, candidates: Particles) -> ScoredParticles:
        """Take the steps that are left by the ODE, decode and score."""
        ended = candidates if candidates.done == self.steps else self.advance(candidates, self.steps)
        parts = list(self._scored(ended))
        self.lineage.close(ended.names, self.steps)
        samples, scores = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        self.note(ended, scores)
        return ScoredParticles(ended, samples, scores)

    def _scored(self, candidates: Particles) -> Iterator[tuple[Tensor, Tensor]]:
        for part in candidates.split(self.batch_size):
            if part.preview is None:
                raise ValueError("candidates have no preview before their first step: advance them")
            samples = self.pipeline.decode(part.preview)
            asked = [self.prompts[p] for p in part.prompt.tolist()]
            yield samples.cpu(), score(self.rewards, samples, asked)

    def combined(self, scores: Tensor) -> Tensor:
        """The rewards' weighted sum (N,) of scores (N, K)."""
        return combine(scores, [reward.weight for reward in self.rewards])

    def note(self, candidates: Particles, scores: Tensor) -> None:
        """Remember scores (N, K) in the lineage."""
        self.lineage.record_scores(candidates.names, candidates.done, scores.tolist())

    def keep(self, candidates: Particles, index: Tensor) -> Particles:
        """Go on with those of ``index`` (M,) alone."""
        kept = candidates.rows(index)
        alive = set(kept.names)
        self.lineage.close([name for name in candidates.names if name not in alive], candidates.done)
        return kept

    def copy(self, candidates: Particles, ancestors: Tensor) -> Particles:
        """Candidate i becomes one of ``ancestors[i]`` (M,); each goes on with the noise of its own place."""
        chosen = candidates.rows(ancestors)
        self.lineage.close(candidates.names, candidates.done)
        names = self.lineage.add(chosen.prompt.tolist(), chosen.names, candidates.done)
        return replace(chosen, names=names, step_seeds=candidates.step_seeds)

    def branch(self, candidates: Particles, count: int) -> Particles:
        """``count`` copies of every candidate side by side, each with noise of its own from here on."""
        copies = candidates.rows(torch.arange(len(candidates)).repeat_interleave(count))
        self.lineage.close(candidates.names, candidates.done)
        names = self.lineage.add(copies.prompt.tolist(), copies.names, candidates.done)
        seeds = tuple(derived_seed(self.seed, "branch", name) for name in names)
        return replace(copies, names=names, step_seeds=seeds)
