"""The interface of strategies, and how they plan with a budget."""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from genalign.scoring.budget import Budget, Ledger
from genalign.scoring.score import NamedReward
from genalign.search.engine import Particles, ScoredParticles, SearchRun
from genalign.types import Conditioning, NoiseLevel, Pipeline, Prompt, RewardFunction


class Strategy(Protocol):
    """A search: turns noise into finished candidates of every prompt of a run, the best of which are returned.

    It spends at most ``budget`` on each prompt, and raises ValueError if that is not enough for one sample. Without a
    budget, the strategy's own settings say how many candidates it makes.
    """

    def __call__(self, run: SearchRun, budget: Budget | None) -> ScoredParticles: ...


def count_calls(run: SearchRun, strategy: Strategy, budget: Budget | None = None) -> Ledger:
    """Count the calls of ``strategy`` for one prompt of ``run`` without making them, by running it on a twin.

    Within a ``budget``, the twin spends as much of it as the strategy would.

    All scores of the twin are equal. The strategies of this package make the same calls whatever the scores: pruning
    keeps fixed numbers of candidates, and resampling copies them without a call. A strategy whose calls depend on the
    scores must make the most of them where scores are equal, or it may overdraw a budget.
    """
    twin = _CountingRun(run)
    strategy(twin, budget)
    return twin.ledger


class _CountingRun(SearchRun):
    """A twin of ``run`` for one of its prompts, with an empty ledger of its own.

    Latents and samples have the shape (N, 0), the network and the decoder copy their inputs, and all scores are 0.
    Gradients flow as in the real run, so backward passes are counted too.
    """

    def __init__(self, run: SearchRun) -> None:
        rewards = [NamedReward(reward.name, _zero_scores, reward.weight) for reward in run.rewards]
        pipeline = _WithoutValues(run.pipeline)
        arguments = (run.grid, run.guidance, sys.maxsize, run.seed, run.kernel)
        super().__init__(pipeline, run.prompts[:1], rewards, *arguments)

    def metered(self, name: str, function: RewardFunction) -> RewardFunction:
        return super().metered(name, _zero_scores)

    def warn(self, message: str) -> None:
        pass


class _WithoutValues:
    """A pipeline of latents (N, 0) whose network and decoder copy their inputs."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.path, self.denoiser, self.compute_dtype = pipeline.path, pipeline.denoiser, pipeline.compute_dtype
        self.grid, self.level, self.guidance_scale = pipeline.grid, pipeline.level, pipeline.guidance_scale

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        return Conditioning({"text": torch.zeros(len(prompts), 0)})

    def initial_noise(self, seeds: Sequence[int]) -> Tensor:
        return torch.zeros(len(seeds), 0)

    def predict(self, x: Tensor, level: NoiseLevel, conditioning: Conditioning, guidance: float) -> Tensor:
        return x.clone()

    def decode(self, latents: Tensor) -> Tensor:
        return latents.clone()


def _zero_scores(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return samples.flatten(1).sum(1)


_MOST = 2**12  # the largest size of a strategy whose calls are counted to meet a budget


def largest_size(
    run: SearchRun, budget: Budget | None, size: int | None, sized: Callable[[int], Strategy], unit: str
) -> int:
    """Return ``size`` if the budget allows it, or for None the largest size that the budget allows.

    Args:
        run: The run to plan for; its networks are not called.
        budget: The limit for each prompt; None for no limit.
        size: The size in the strategy's settings.
        sized: Returns the strategy at a size; the cost must not fall with the size.
        unit: The setting that is the size, for messages.

    Raises:
        ValueError: There is neither a size nor a budget, the size is below 1, the size, or a size of 1, costs more than
            the budget, or the budget has no end.
    """
    if size is not None and size < 1:
        raise ValueError(f"{unit} must be at least 1, not {size}")
    if budget is None:
        if size is None:
            raise ValueError(f"say how many {unit}, or give a budget")
        return size
    limit = budget.limit * (1 + 1e-9)  # sums of prices are rounded

    def cost(count: int) -> float:
        return budget.spent(count_calls(run, sized(count)))

    if size is not None and size > _MOST:
        raise ValueError(f"{unit}={size} are too many to count against a budget: take at most {_MOST}, or no budget")
    smallest = 1 if size is None else size
    if cost(smallest) > limit:
        raise ValueError(
            f"{unit}={smallest} costs {cost(smallest):.4g} for each prompt, but the budget is {budget.limit:.4g}:"
            f" raise the budget, or take fewer {unit} or fewer steps"
        )
    if size is not None:
        return size
    high = 2
    while cost(high) <= limit:
        high *= 2
        if high > _MOST:
            raise ValueError(
                f"the budget of {budget.limit:.4g} for each prompt allows more than {_MOST} {unit} at its prices:"
                " give their number, or a smaller budget"
            )
    return bisect_right(range(high), limit, lo=high // 2, key=cost) - 1


class PreviewScorer(Protocol):
    """Scores candidates on their way; scores of different steps need not be comparable.

    It decodes by ``run.pipeline.decode`` and wraps a network of its own by ``run.metered``: a run that only counts
    (``count_calls``) has previews without values, which no network can score.
    """

    def __call__(self, run: SearchRun, candidates: Particles) -> Tensor:
        """Return scores (N, K) of the previews, NaN where one failed."""


@dataclass(frozen=True)
class Previews:
    """N previews of one step, and the calls on them that are counted.

    Attributes:
        latents: Clean latents (N, ...) that the network predicts, as ``decode`` takes them.
        prompts: The prompt of each.
        noise_share: Noise level of the step, sigma / (alpha + sigma).
        rewards: The rewards that the search selects by; calls of their functions are not counted.
        decode: Decodes latents to samples.
        metered: Wraps a scoring network, by name, so its calls are counted.
        batch_size: Largest number of previews in a call; None for all of them.
        device: The device of the networks.
    """

    latents: Tensor
    prompts: Sequence[Prompt]
    noise_share: float
    rewards: Sequence[NamedReward]
    decode: Callable[[Tensor], Tensor]
    metered: Callable[[str, RewardFunction], RewardFunction]
    batch_size: int | None
    device: torch.device

    def split(self) -> Iterator[Previews]:
        """Yield batches of at most ``batch_size`` previews."""
        size = self.batch_size or len(self.latents)
        for first in range(0, len(self.latents), size):
            last = first + size
            yield replace(self, latents=self.latents[first:last], prompts=self.prompts[first:last])


@runtime_checkable
class StandaloneScorer(Protocol):
    """A scorer that needs nothing but previews, so it also works in pipelines of the user's own."""

    def score(self, previews: Previews) -> Tensor:
        """Return scores (N, K) of the previews, NaN where one failed."""


def standalone(scorer: PreviewScorer | None) -> StandaloneScorer | None:
    """Return ``scorer`` for a pipeline of the user's own. Raises ValueError for one that needs more than previews."""
    if scorer is not None and not isinstance(scorer, StandaloneScorer):
        raise ValueError(
            f"{type(scorer).__name__} scores the candidates of a search, and a pipeline of your own has only previews:"
            " give it a method score, as scorers of genalign.search.noise_aware have, or call genalign.search.search"
        )
    return scorer


def previews_of(run: SearchRun, candidates: Particles) -> Previews:
    """Return the previews of candidates of a run, after their last step."""
    return previews_at(run, candidates, candidates.preview, float(run.grid.noise_share[candidates.steps_done - 1]))


def previews_at(run: SearchRun, candidates: Particles, latents: Tensor, noise_share: float) -> Previews:
    """Return the previews ``latents`` (N, ...) of candidates of a run at a noise level, sigma / (alpha + sigma)."""
    return Previews(
        latents=latents,
        prompts=run.prompts_of(candidates),
        noise_share=noise_share,
        rewards=run.unmetered_rewards,
        decode=run.pipeline.decode,
        metered=run.metered,
        batch_size=run.batch_size,
        device=next((weight.device for weight in run.pipeline.denoiser.parameters()), torch.device("cpu")),
    )


def score_previews(run: SearchRun, candidates: Particles, scorer: PreviewScorer | None) -> Tensor:
    """Return the scores (N, K) of previews by ``scorer``, or by the run's rewards; they enter the lineage."""
    scores = scorer(run, candidates) if scorer else run.decoded_scores(candidates)
    run.record_scores(candidates, scores)
    return scores
