"""Noise-aware rewards (TTSnap, arXiv 2511.22242): scorers of previews that predict the reward of the clean sample.

A scorer takes the weights that its student learned at the level that it scores at (``reward_learning.noise_aware``),
and refuses levels at which it ranks badly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from genalign.reward_learning.noise_aware import LevelQuality, PreviewDataset, RewardIdentity
from genalign.scoring.score import NamedReward
from genalign.search.engine import Particles, ScoredParticles, SearchRun
from genalign.search.strategy import Previews, previews_of
from genalign.types import Prompt, RewardFunction

_SAME_LEVEL = 0.03  # noise levels that differ by less are one


@torch.no_grad()
def sample_with_previews(run: SearchRun, count: int, steps: Sequence[int]) -> tuple[Tensor, ScoredParticles]:
    """Sample ``count`` candidates of every prompt of a run by the ODE.

    Returns the previews (M, S, ...) float16 after the network evaluations ``steps`` (ascending, from 0), and the final
    samples.
    """
    candidates, previews = run.start(count), []
    for step in steps:
        candidates = run.advance(candidates, step + 1)
        previews.append(candidates.preview.half())
    return torch.stack(previews, dim=1), run.finish(candidates)


def record_previews(run: SearchRun, count: int, steps: Sequence[int]) -> PreviewDataset:
    """Sample as ``sample_with_previews`` and keep the candidates whose rewards are finite."""
    previews, finished = sample_with_previews(run, count, steps)
    clean = run.weighted_sum(finished.scores)
    finite = clean.isfinite()
    sigmas = run.grid.noise_share[list(steps)].float()
    return PreviewDataset(previews[finite], sigmas, finished.candidates.prompt[finite], clean[finite], run.prompts)


@dataclass(frozen=True)
class ScorerLevel:
    """A noise level of a scorer: its validation, and the student's ``weights`` there by name."""

    quality: LevelQuality
    weights: Mapping[str, Tensor]


@dataclass(frozen=True)
class NoiseAware:
    """A ``PreviewScorer`` by a trained student, whose calls are counted as "reward/noise-aware".

    The student is made of the reward that the search selects by, at the first call; another one than the scorer was
    trained for is refused.

    Attributes:
        make_student: Makes the student of a reward, as it was before its training.
        input_kind: What the student scores: latents, or decoded previews.
        levels: What it learned at every level.
        reward: The reward that it was trained for.
        least_tau: Levels at which Kendall's tau is below this are refused, as are those that were not validated.
    """

    make_student: Callable[[RewardFunction], nn.Module]
    input_kind: Literal["latents", "samples"]
    levels: tuple[ScorerLevel, ...]
    reward: RewardIdentity
    least_tau: float = 0.1
    _students: list[nn.Module] = field(default_factory=list, init=False, repr=False, compare=False)

    def __call__(self, run: SearchRun, candidates: Particles) -> Tensor:
        return self.score(previews_of(run, candidates))

    @torch.no_grad()
    def score(self, previews: Previews) -> Tensor:
        """Return the expected rewards (N, K) of the clean samples, NaN for rewards of weight 0, which only report.

        Raises ValueError for a noise level or a reward that the scorer was not trained for.
        """
        used = torch.tensor([reward.weight != 0 for reward in previews.rewards])
        return torch.where(used, self.expected(previews).cpu()[:, None], torch.nan)

    def expected(self, previews: Previews) -> Tensor:
        """Return the expected rewards (N,) of the clean samples, differentiable in the previews' latents.

        Raises ValueError for a noise level or a reward that the scorer was not trained for.
        """
        weights = self.level(previews.noise_share).weights

        def predict(inputs: Tensor, prompts: Sequence[Prompt]) -> Tensor:
            student = self.student(previews.rewards).to(inputs.device)
            own = {name: weight.to(inputs.device) for name, weight in weights.items()}
            scores: Tensor = functional_call(student, own, (inputs, prompts))
            return scores

        counted, scores = previews.metered("noise-aware", predict), []
        for part in previews.split():
            inputs = part.decode(part.latents) if self.input_kind == "samples" else part.latents.to(part.device)
            scores.append(counted(inputs, part.prompts).float())
        return torch.cat(scores)

    def student(self, rewards: Sequence[NamedReward]) -> nn.Module:
        """Return the student of the one reward that counts. Raises ValueError if the scorer was trained for another."""
        if not self._students:
            counting = [reward for reward in rewards if reward.weight]
            if len(counting) != 1 or counting[0].weight < 0:
                names = ", ".join(f"{reward.name} (weight {reward.weight:g})" for reward in counting)
                raise ValueError(
                    f"a noise-aware scorer predicts one reward of a positive weight, and this search selects by"
                    f" {names}: give the others the weight 0, which only reports them, or leave the scorer out"
                )
            (reward,), identity = counting, RewardIdentity.of(counting[0].function)
            if identity != self.reward:
                raise ValueError(
                    f"this search selects by {reward.name!r}, {identity.path}, and the scorer was trained for"
                    f" {self.reward.beside(identity)}: train one for it with genalign train-noise-aware"
                )
            self._students.append(self.make_student(reward.function).eval())
        return self._students[0]

    def covers(self, noise_share: float) -> bool:
        """Return whether the scorer was validated at this noise level."""
        return abs(self._nearest(noise_share).quality.sigma - noise_share) <= _SAME_LEVEL

    def _nearest(self, sigma: float) -> ScorerLevel:
        return min(self.levels, key=lambda level: abs(level.quality.sigma - sigma))

    def level(self, sigma: float) -> ScorerLevel:
        """Return the level at ``sigma``. Raises ValueError for one that was not validated, or where it ranks badly."""
        nearest = self._nearest(sigma)
        quality = nearest.quality
        if not self.covers(sigma):
            levels = ", ".join(f"{level.quality.sigma:.2f}" for level in self.levels)
            raise ValueError(
                f"this scorer was validated at noise levels {levels}, not at {sigma:.2f}: prune at one of these levels"
            )
        if quality.tau < self.least_tau:
            raise ValueError(
                f"at noise level {sigma:.2f} this scorer ranks with Kendall's tau {quality.tau:.2f}, below"
                f" {self.least_tau:.2f}: prune later, or train it on more trajectories"
            )
        return nearest
