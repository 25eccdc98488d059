"""``search``: run a strategy on prompts within a budget."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from genalign.diffusion.sampling import Sampling
from genalign.scoring.budget import Budget, Ledger, measure_prices
from genalign.scoring.score import NamedReward, RewardError, named, probe
from genalign.search.engine import ScoredParticles, SearchRun
from genalign.search.strategy import Strategy
from genalign.types import Grid, Pipeline, Prompt, PromptSet, RewardFunction

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SearchResult:
    """The best sample of each of P prompts.

    Attributes:
        samples: Decoded samples (P, ...).
        scores: Their scores (P, K) by the rewards.
        lineage: Every candidate of the search as JSON (see ``lineage.Lineage.as_list``).
        winners: The number in the lineage of each prompt's best candidate.
        ledger: The calls made.
        budget: The budget, with the prices that it was planned with.
        seconds: Wall-clock seconds.
    """

    samples: Tensor
    scores: Tensor
    lineage: list[dict[str, Any]]
    winners: tuple[int, ...]
    ledger: Ledger
    budget: Budget | None
    seconds: float

    @property
    def unused(self) -> float:
        """The budget left over, in its unit, as a mean over prompts. Raises ValueError without a budget."""
        if self.budget is None:
            raise ValueError("there was no budget")
        return self.budget.limit - self.budget.spent(self.ledger) / len(self.winners)


def search(
    pipeline: Pipeline,
    prompts: str | Sequence[str],
    reward: RewardFunction | Mapping[str, RewardFunction] | Sequence[NamedReward],
    strategy: Strategy,
    budget: Budget | None = None,
    sampling: Sampling = Sampling(),  # it is frozen
    batch_size: int = 32,
    seed: int | str = 0,
) -> SearchResult:
    """Search for a good sample of every prompt, one prompt after the other.

    Args:
        pipeline: The model.
        prompts: One prompt or several.
        reward: One reward, or several by name. Several count by the sum of their ranks among a prompt's candidates, or
            where one number is needed (FK steering, gradients) by their weighted sum.
        strategy: The search.
        budget: The limit for each prompt; None if the strategy's settings say how much it does.
        sampling: The sampling steps and the guidance.
        batch_size: Largest number of candidates in a call.
        seed: Seed of all random numbers.

    Raises:
        ValueError: No prompt, an impossible strategy, or a budget too small for one sample.
        RewardError: A reward raises, or does not return one score per sample in their order.
    """
    each = PromptSet.of(prompts).prompts
    if not each:
        raise ValueError("there is no prompt to search for")
    rewards, grid, guidance = named(reward), sampling.grid(pipeline), sampling.guidance_scale(pipeline)
    check_rewards(pipeline, rewards, each[0], grid, guidance)
    if budget is not None and budget.seconds is not None and budget.prices is None:
        budget = replace(budget, prices=measure_prices(pipeline, rewards, each[:1] * batch_size, grid, guidance))

    start, ledger = time.perf_counter(), Ledger()
    best: list[ScoredParticles] = []
    lineage: list[dict[str, Any]] = []
    winners: list[int] = []
    for place, prompt in enumerate(each):
        run = SearchRun(pipeline, [prompt], rewards, grid, guidance, batch_size, f"{seed}/{place}")
        finished = strategy(run, budget)
        best.append(finished.rows(finished.best()))
        if bool(best[-1].scores.isnan().any()):
            logger.warning("the best sample of %r could not be scored by every reward", prompt.text)
        winners.append(len(lineage) + int(best[-1].candidates.ids))
        lineage += run.lineage.as_list(len(lineage), place)
        ledger.counts.update(run.ledger.counts)
    return SearchResult(
        samples=torch.cat([winner.samples for winner in best]),
        scores=torch.cat([winner.scores for winner in best]),
        lineage=lineage,
        winners=tuple(winners),
        ledger=ledger,
        budget=budget,
        seconds=time.perf_counter() - start,
    )


@torch.no_grad()
def check_rewards(
    pipeline: Pipeline, rewards: Sequence[NamedReward], prompt: Prompt, grid: Grid, guidance: float
) -> None:
    """Score two noisy previews in both orders, to detect a reward that mixes up its samples before it decides anything.

    The calls are not counted.

    Args:
        pipeline: The model.
        rewards: The rewards to check.
        prompt: The prompt of both previews.
        grid: The sampling steps.
        guidance: Scale of classifier-free guidance.

    Raises:
        RewardError: A reward raises, returns another shape, or scores in another order than that of its samples.
    """
    x = pipeline.initial_noise([1, 2])
    prediction = pipeline.predict(x, grid[0], pipeline.encode([prompt.text] * 2), guidance)
    samples = pipeline.decode(pipeline.path.x0(x, prediction, grid[0]))
    probe(rewards, samples, [prompt] * 2)
    for reward in rewards:
        forth, back = reward(samples, [prompt] * 2), reward(samples.flip(0), [prompt] * 2).flip(0)
        spread = float((forth[0] - forth[1]).abs())
        if float((forth - back).abs().max()) > 0.5 * spread + 1e-4 * float(forth.abs().max()):
            raise RewardError(
                f"reward {reward.name!r} gave {forth.tolist()} to two samples, and {back.tolist()} in the other order:"
                " return one score per sample, in the order of the samples"
            )
