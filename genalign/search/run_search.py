"""``search``: a strategy over prompts, within a budget."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
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

    ``samples`` (P, ...) as the pipeline decodes them, ``scores`` (P, K) by the rewards, ``lineage`` of every candidate
    (see ``lineage.Node``) with the best one's number for each prompt in ``chosen``, the ``ledger`` of what was spent,
    with ``seconds`` of wall-clock and ``peak_memory`` in bytes (see ``budget.peak_memory``), and the ``budget``, with
    the prices it was planned by.
    """

    samples: Tensor
    scores: Tensor
    lineage: list[dict[str, Any]]
    chosen: tuple[int, ...]
    ledger: Ledger
    budget: Budget | None
    seconds: float
    peak_memory: int

    @property
    def unused(self) -> float:
        """How much of the budget no prompt could use, in its unit, on average. Raises ValueError without a budget."""
        if self.budget is None:
            raise ValueError("there was no budget")
        return self.budget.limit - self.budget.spent(self.ledger) / len(self.chosen)


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
    """Search for a good sample of every prompt.

    Several rewards, by name, count by the sum of their ranks among a prompt's candidates; where one figure is needed
    (FK steering, gradients) by their weighted sum. ``budget`` is for each prompt. Prompts are worked on one after the
    other, in batches of at most ``batch_size`` candidates.

    Raises:
        ValueError: no prompt, an impossible strategy, or a budget too small for one sample.
        RewardError: a reward raises, or does not return one score per sample in their order.
    """
    asked = [Prompt(prompt) if isinstance(prompt, str) else prompt for prompt in _listed(prompts)]
    rewards, grid = named(reward), sampling.grid(pipeline)
    check_rewards(pipeline, rewards, asked[0], grid, sampling.guidance)
    if budget is not None and budget.seconds is not None and budget.prices is None:
        prices = measure_prices(pipeline, rewards, [asked[0]] * batch_size, grid, sampling.guidance)
        budget = replace(budget, prices=prices)
    parts: list[SearchResult] = []
    for place, prompt in enumerate(asked):
        ledger, name = Ledger(), f"{seed}/{place}"
        metered = metered_rewards(rewards, ledger)
        run = SearchRun(Metered(pipeline, ledger), [prompt], metered, grid, sampling.guidance, batch_size, name)
        parts.append(_searched(run, strategy, PromptBudget(budget)))
    return _together(parts)


def _together(parts: Sequence[SearchResult]) -> SearchResult:
    """The results of single prompts as one: candidates are numbered on, and prompts count from 0."""
    lineage: list[dict[str, Any]] = []
    chosen: list[int] = []
    calls: Counter[str] = Counter()
    for place, part in enumerate(parts):
        first = len(lineage)
        chosen += [first + name for name in part.chosen]
        for node in part.lineage:
            parent = None if node["parent"] is None else first + node["parent"]
            lineage.append({**node, "prompt": place, "parent": parent})
        calls.update(part.ledger.counts)
    return replace(
        parts[0],
        samples=torch.cat([part.samples for part in parts]),
        scores=torch.cat([part.scores for part in parts]),
        lineage=lineage,
        chosen=tuple(chosen),
        ledger=Ledger(calls),
        seconds=sum(part.seconds for part in parts),
        peak_memory=max(part.peak_memory for part in parts),
    )


def _listed(prompts: str | Sequence[str | Prompt]) -> Sequence[str | Prompt]:
    listed = [prompts] if isinstance(prompts, str) else prompts
    if not listed:
        raise ValueError("there is no prompt to search for")
    return listed


def _searched(run: SearchRun, strategy: Strategy, allowance: PromptBudget) -> SearchResult:
    """One prompt."""
    began = time.perf_counter()
    finished = strategy(run, allowance)
    found = finished.rows(finished.best())
    if bool(found.scores.isnan().any()):
        logger.warning("the best sample of %r could not be scored by every reward", run.prompts[0].text)
    return SearchResult(
        samples=found.samples,
        scores=found.scores,
        lineage=run.lineage.as_list(),
        chosen=found.candidates.names,
        ledger=run.spent,
        budget=allowance.budget,
        seconds=time.perf_counter() - began,
        peak_memory=peak_memory(),
    )


@torch.no_grad()
def check_rewards(
    pipeline: Pipeline, rewards: Sequence[NamedReward], prompt: Prompt, grid: Grid, guidance: float
) -> None:
    """Score two noisy previews in both orders, unbilled, so that a reward that mixes up its samples is found before it
    picks the wrong ones. Raises RewardError.
    """
    x = pipeline.initial_noise([1, 2])
    prediction = pipeline.predict(x, grid[0], pipeline.encode([prompt.text] * 2), guidance)
    samples = pipeline.decode(pipeline.path.x0(x, prediction, grid[0]))
    probe(rewards, samples, [prompt] * 2)
    for reward in rewards:
        _echo(reward.name, reward, samples, prompt)


def _echo(name: str, function: Callable[..., Tensor], samples: Tensor, prompt: Prompt) -> None:
    forth, back = function(samples, [prompt] * 2), function(samples.flip(0), [prompt] * 2).flip(0)
    spread = float((forth[0] - forth[1]).abs())
    if float((forth - back).abs().max()) > 0.5 * spread + 1e-4 * float(forth.abs().max()):
        raise RewardError(
            f"reward {name!r} gave {forth.tolist()} to two samples, and {back.tolist()} when they were asked for in the"
            " other order: return one score per sample, in the order of the samples"
        )
