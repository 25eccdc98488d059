"""``search``: run a strategy on prompts within a budget."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from genalign.diffusion.sampling import Sampling
from genalign.scoring.budget import Budget, Ledger, Metered, measure_prices, metered_rewards, peak_memory
from genalign.scoring.score import NamedReward, RewardError, named, probe
from genalign.search.engine import SearchRun
from genalign.search.strategy import PromptBudget, Strategy
from genalign.types import Grid, Pipeline, Prompt, RewardFunction

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SearchResult:
    """The best sample of each of P prompts.

    Attributes:
        samples: Decoded samples (P, ...).
        scores: Their scores (P, K) by the rewards.
        lineage: Every candidate of the search as JSON (see ``lineage.Node``).
        winners: The number in the lineage of each prompt's best candidate.
        ledger: The calls made.
        budget: The budget, with the prices that it was planned with.
        seconds: Wall-clock seconds.
        peak_memory: Peak memory in bytes (see ``budget.peak_memory``).
    """

    samples: Tensor
    scores: Tensor
    lineage: list[dict[str, Any]]
    winners: tuple[int, ...]
    ledger: Ledger
    budget: Budget | None
    seconds: float
    peak_memory: int

    @property
    def unused(self) -> float:
        """The budget left over, in its unit, as a mean over prompts. Raises ValueError without a budget."""
        if self.budget is None:
            raise ValueError("there was no budget")
        return self.budget.limit - self.budget.spent(self.ledger) / len(self.winners)


def search(
    pipeline: Pipeline,
    prompts: str | Sequence[str | Prompt],
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
    texts = [prompts] if isinstance(prompts, str) else prompts
    if not texts:
        raise ValueError("there is no prompt to search for")
    rewards, grid = named(reward), sampling.grid(pipeline)
    first = Prompt(texts[0]) if isinstance(texts[0], str) else texts[0]
    check_rewards(pipeline, rewards, first, grid, sampling.guidance)
    if budget is not None and budget.seconds is not None and budget.prices is None:
        prices = measure_prices(pipeline, rewards, [first] * batch_size, grid, sampling.guidance)
        budget = replace(budget, prices=prices)
    parts = []
    for place, text in enumerate(texts):
        prompt, ledger = Prompt(text) if isinstance(text, str) else text, Ledger()
        metered = Metered(pipeline, ledger), metered_rewards(rewards, ledger)
        run = SearchRun(metered[0], [prompt], metered[1], grid, sampling.guidance, batch_size, f"{seed}/{place}")
        parts.append(_search_one(run, strategy, PromptBudget(budget)))
    return _merge(parts)


def _search_one(run: SearchRun, strategy: Strategy, allowance: PromptBudget) -> SearchResult:
    """Search for the only prompt of a run."""
    start = time.perf_counter()
    finished = strategy(run, allowance)
    winner = finished.rows(finished.best())
    if bool(winner.scores.isnan().any()):
        logger.warning("the best sample of %r could not be scored by every reward", run.prompts[0].text)
    return SearchResult(
        samples=winner.samples,
        scores=winner.scores,
        lineage=run.lineage.as_list(),
        winners=winner.candidates.ids,
        ledger=run.spent,
        budget=allowance.budget,
        seconds=time.perf_counter() - start,
        peak_memory=peak_memory(),
    )


def _merge(parts: Sequence[SearchResult]) -> SearchResult:
    """Merge the results of single prompts, with candidates numbered consecutively and prompts from 0."""
    lineage: list[dict[str, Any]] = []
    winners: list[int] = []
    calls: Counter[str] = Counter()
    for place, part in enumerate(parts):
        first = len(lineage)
        winners += [first + number for number in part.winners]
        for node in part.lineage:
            parent = None if node["parent"] is None else first + node["parent"]
            lineage.append({**node, "prompt": place, "parent": parent})
        calls.update(part.ledger.counts)
    return replace(
        parts[0],
        samples=torch.cat([part.samples for part in parts]),
        scores=torch.cat([part.scores for part in parts]),
        lineage=lineage,
        winners=tuple(winners),
        ledger=Ledger(calls),
        seconds=sum(part.seconds for part in parts),
        peak_memory=max(part.peak_memory for part in parts),
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
