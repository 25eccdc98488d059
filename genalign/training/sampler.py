"""A round of samples: prompts to trajectories, decoded samples and scores.

B = P prompts x G samples, S stored steps, K rewards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from genalign.algorithms.recipes import Recipe
from genalign.diffusion.completion import complete
from genalign.diffusion.noise import derived_seed
from genalign.diffusion.rollout import Rollout, RolloutInputs, kernel_per_step, rollout, rows_are_finite
from genalign.runtime.distributed import ALL_RANKS, RankShare
from genalign.scoring.score import NamedReward, score
from genalign.types import Grid, Pipeline, Prompt

T = TypeVar("T")


@dataclass(frozen=True)
class Sampled:
    """One batch of a round: its trajectories, decoded samples (B, ...), and scores as in ``RoundScores``."""

    rollout: Rollout
    samples: Tensor
    scores: Tensor
    stepwise: Tensor | None
    features: Tensor | None


@dataclass(frozen=True)
class Sampler:
    """Makes and scores ``group_size`` samples of every prompt, in batches of ``batch_size``. With ``overlap``, a batch
    is decoded and scored in a thread while the next one is sampled; one of the two is in memory beside the other."""

    pipeline: Pipeline
    rewards: Sequence[NamedReward]
    grid: Grid
    guidance: float
    group_size: int
    batch_size: int
    overlap_scoring: bool = False

    def __call__(
        self, recipe: Recipe, steps: Sequence[int], prompts: Sequence[Prompt], name: str, share: RankShare = ALL_RANKS
    ) -> Iterator[Sampled]:
        """Batch by batch, those of a ``share``; every noise is drawn from ``name``, which no two rounds share."""
        calls = self._made(recipe, steps, prompts, name, share)
        yield from in_a_thread(calls) if self.overlap_scoring else (call() for call in calls)

    @torch.no_grad()
    def _made(
        self, recipe: Recipe, steps: Sequence[int], prompts: Sequence[Prompt], name: str, share: RankShare
    ) -> Iterator[Callable[[], Sampled]]:
        """What the denoiser has to do, and the rest of a batch to be called."""
        kernels = kernel_per_step(recipe.kernel, steps, len(self.grid))
        parts = list(self._start(recipe, prompts, name).split(self.batch_size))
        for part in (parts[number] for number in share.indices(len(parts))):
            sampled = rollout(self.pipeline, part, self.grid, kernels, self.guidance, store=steps)
            ends: tuple[Tensor, ...] = ()
            if recipe.completion is not None:
                ends = complete(self.pipeline, sampled, self.grid, self.guidance, recipe.completion).unbind(1)
            yield partial(self._scored, recipe, sampled, ends, [prompts[row] for row in part.prompt.tolist()])

    def _start(self, recipe: Recipe, prompts: Sequence[Prompt], name: str) -> RolloutInputs:
        members = [(p, g) for p in range(len(prompts)) for g in range(self.group_size)]
        noise = [derived_seed(name, p, "x", 0 if recipe.shared_noise else g) for p, g in members]
        steps = [derived_seed(name, p, "w", g) for p, g in members]
        conditioning = self.pipeline.encode([prompt.text for prompt in prompts])
        return RolloutInputs(conditioning, torch.tensor([p for p, _ in members]), tuple(noise), tuple(steps))

    @torch.no_grad()
    def _scored(self, recipe: Recipe, sampled: Rollout, ends: Sequence[Tensor], prompts: Sequence[Prompt]) -> Sampled:
        decoded = self.pipeline.decode(sampled.final)
        finite = sampled.finite() & rows_are_finite(decoded)
        samples, scores = _shown(decoded), self._scores(decoded, prompts)
        scores[~finite.cpu()] = torch.nan
        features = recipe.features(samples).float().cpu() if recipe.features else None
        kept = sampled if finite.all() else sampled.zero_rows(~finite)
        columns = [self._scores(self.pipeline.decode(x0), prompts) for x0 in ends]
        stepwise = torch.stack([*columns, scores], dim=1) if columns else None
        return Sampled(kept, samples, scores, stepwise, features)

    def _scores(self, decoded: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores (B, K), NaN for samples that are not finite."""
        scores = score(self.rewards, _shown(decoded), prompts)
        scores[~rows_are_finite(decoded).cpu()] = torch.nan
        return scores


def _shown(decoded: Tensor) -> Tensor:
    """Samples (B, ...) with black or silence for those that are not finite: one NaN must not cost a batch's scores."""
    finite = rows_are_finite(decoded)
    return decoded if finite.all() else decoded.index_fill(0, (~finite).nonzero()[:, 0], 0)


def in_a_thread(calls: Iterable[Callable[[], T]]) -> Iterator[T]:
    """What each of the calls returns, in their order: one runs while the next is being prepared, on as many cores."""
    with ThreadPoolExecutor(1, "genalign-score", torch.set_num_threads, (torch.get_num_threads(),)) as thread:
        running: Future[T] | None = None
        for call in calls:
            last, running = running, thread.submit(call)
            if last is not None:
                yield last.result()
        if running is not None:
            yield running.result()
