"""``search``: run a strategy on prompts within a budget."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from genalign.diffusion.sampling import Sampling
from genalign.runtime.progress import Phase, Progress
from genalign.scoring.budget import NFE, Budget, Ledger, Metered, backward_call, measure_prices
from genalign.scoring.score import NamedReward, RewardError, named, probe
from genalign.search.engine import TOP, SearchRun
from genalign.search.pruning import BestOfN
from genalign.search.results import PlainSample, PromptResult, SearchResult
from genalign.search.strategy import Strategy, count_calls
from genalign.types import Grid, Pipeline, Prompt, PromptSet, RewardFunction

logger = logging.getLogger(__name__)


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
    """Search for a good sample of every prompt, one prompt after the other, and show how far it is.

    Args:
        pipeline: The model.
        prompts: One prompt or several.
        reward: One reward, or several by name. Several count by the sum of their ranks among a prompt's candidates, or
            where one number is needed (FK steering, gradients) by their weighted sum.
        strategy: The search.
        budget: The limit for each prompt; None if the strategy's settings say how much it does.
        sampling: The sampling steps, the guidance and the kernel.
        batch_size: Largest number of candidates in a call.
        seed: Seed of all random numbers.

    Raises:
        ValueError: No prompt, an impossible strategy, or a budget too small for one sample.
        RewardError: A reward raises, does not return one score per sample in their order, or scores no sample of a
            prompt.
    """
    setup = SearchSetup(pipeline, named(reward), strategy, budget, sampling, batch_size)
    return setup.search(PromptSet.of(prompts).prompts, seed, Progress())


@dataclass(frozen=True)
class SearchSetup:
    """All that a search needs besides prompts and seeds.

    Args:
        pipeline: The model.
        rewards: The rewards, by the sum of their ranks or their weighted sum.
        strategy: The search.
        budget: The limit for each prompt; None if the strategy's settings say how much it does.
        sampling: The sampling steps, the guidance and the kernel.
        batch_size: Largest number of candidates in a call.
    """

    pipeline: Pipeline
    rewards: Sequence[NamedReward]
    strategy: Strategy
    budget: Budget | None
    sampling: Sampling
    batch_size: int

    def search(self, prompts: Sequence[Prompt], seed: int | str, progress: Progress) -> SearchResult:
        """Search for ``prompts`` in turn, and count the NFE of all of them in one phase of ``progress``."""
        if not prompts:
            raise ValueError("there is no prompt to search for")
        grid, guidance = self.sampling.grid(self.pipeline), self.sampling.guidance_scale(self.pipeline)
        kernel = self.sampling.kernel_on(grid)
        check_rewards(self.pipeline, self.rewards, prompts[0], grid, guidance)
        budget = self._priced(prompts[0], grid, guidance)
        name = "searching"
        if len(prompts) == 1:  # the start of its prompt, in one line
            text = " ".join(prompts[0].text.split())
            name = text if len(text) <= 40 else f"{text[:37]}..."

        def run_of(place: int) -> SearchRun:
            batch_size, run_seed = self.batch_size, f"{seed}/{place}"
            arguments = (self.rewards, grid, guidance, batch_size, run_seed, kernel)
            return SearchRun(self.pipeline, [prompts[place]], *arguments)

        try:
            total = count_calls(run_of(0), self.strategy, budget).nfe * len(prompts)
        except Exception:  # of a strategy that needs values: the number of NFE is then shown without a total
            total = None
        results: list[PromptResult] = []
        lineage: list[dict[str, Any]] = []
        winners: list[int] = []
        with progress.phase(name, total, "NFE") as phase:
            for place in range(len(prompts)):
                run = run_of(place)
                run.pipeline = Metered(run.pipeline, _Advancing(phase))
                result, winner = search_prompt(run, self.strategy, budget)
                results.append(result)
                winners.append(len(lineage) + winner)
                lineage += run.lineage.as_list(len(lineage), place)
        rate = getattr(self.pipeline, "sample_rate", None)
        return SearchResult(tuple(results), lineage, tuple(winners), budget, rate)

    def _priced(self, prompt: Prompt, grid: Grid, guidance: float) -> Budget | None:
        """Return the budget, with prices measured on ``prompt`` if it is in seconds and has none."""
        if self.budget is None or self.budget.seconds is None or self.budget.prices is not None:
            return self.budget
        batch = [prompt] * self.batch_size
        prices = measure_prices(self.pipeline, self.rewards, batch, grid, guidance)
        run = SearchRun(self.pipeline, [prompt], self.rewards, grid, guidance, self.batch_size, "prices")
        unpriced = dict.fromkeys(map(backward_call, prices), 0.0)
        try:
            calls = count_calls(run, self.strategy, replace(self.budget, prices=prices | unpriced)).counts
        except Exception:  # of a strategy that needs values, or of a budget too small: the search says so
            calls = Counter()
        if calls.keys() & unpriced.keys():  # gradients take memory, so they are measured where they are needed only
            prices = measure_prices(self.pipeline, self.rewards, batch, grid, guidance, gradients=True)
        return replace(self.budget, prices=prices)


class _Advancing(Ledger):
    """A ledger that reports every NFE to a phase."""

    def __init__(self, phase: Phase) -> None:
        super().__init__()
        self._phase = phase

    def record(self, call: str, samples: int) -> None:
        super().record(call, samples)
        if call == NFE:
            self._phase(samples)


def search_prompt(run: SearchRun, strategy: Strategy, budget: Budget | None) -> tuple[PromptResult, int]:
    """Search for the one prompt of ``run``, and return its result and the number of the winner in the lineage.

    Raises RewardError if a reward scored none of the finished candidates.
    """
    (prompt,), started = run.prompts, time.perf_counter()
    finished = strategy(run, budget)
    seconds = time.perf_counter() - started
    best = finished.rows(finished.best())
    run.failures.require_scores(
        run.rewards, torch.cat([*run.finished_scores, finished.scores]), f"the samples of {prompt.text!r}"
    )
    top = best
    if run.top is not None:
        ranked = run.top.rows(run.top.best(TOP))
        top = best.extend(ranked.rows((ranked.candidates.ids != best.candidates.ids).nonzero()[: TOP - 1, 0]))
    if bool(best.scores.isnan().any()):
        logger.warning("the best sample of %r could not be scored by every reward", prompt.text)
    names = tuple(reward.name for reward in run.rewards)
    plain = _plain_sample(run)
    result = PromptResult(prompt, names, top.samples, top.scores, plain, run.ledger, seconds)
    return result, int(best.candidates.ids)


def _plain_sample(run: SearchRun) -> PlainSample:
    """Return the plain sample of a run's only prompt, generated and counted separately if no candidate is it."""
    if 0 in run.plain:
        sample = run.plain[0]
        return PlainSample(sample.samples[0], sample.scores[0], count_calls(run, BestOfN(1)), extra=False)
    alone = run.afresh()
    sample = BestOfN(1)(alone, None)
    return PlainSample(sample.samples[0], sample.scores[0], alone.ledger, extra=True)


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
