"""What a strategy is, and what it may spend."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from genalign.scoring.budget import DECODE, FORWARD, Budget, Ledger, reward_call
from genalign.search.engine import Particles, ScoredParticles, SearchRun


class Strategy(Protocol):
    """How candidates of every prompt of a run become finished ones; the best of them are returned.

    It spends no more than ``allowance`` for each prompt. Raises ValueError where that does not even make one sample.
    """

    def __call__(self, run: SearchRun, allowance: PromptBudget) -> ScoredParticles: ...


@dataclass(frozen=True)
class PromptBudget:
    """What each prompt of a run may cost; without a ``budget`` there is no limit, and every strategy must say itself
    how much it does.
    """

    budget: Budget | None = None

    def affords(self, calls: Counter[str]) -> bool:
        """Whether these calls, of one prompt, fit in the budget."""
        return self.budget is None or self.budget.spent(Ledger(calls)) <= self.budget.limit * (1 + 1e-9)

    def part(self, share: float) -> PromptBudget:
        """This share of it."""
        return self if self.budget is None else PromptBudget(self.budget.of(self.budget.limit * share))

    def after(self, run: SearchRun) -> PromptBudget:
        """What the run has left for each prompt. Raises ValueError where that is nothing."""
        if self.budget is None:
            return self
        left = self.budget.limit - self.budget.spent(run.spent) / len(run.prompts)
        if left <= 0:
            raise ValueError(f"nothing is left of a budget of {self.budget.limit:.4g} for each prompt: raise it")
        return PromptBudget(self.budget.of(left))

    def largest(self, wanted: int | None, bill: Callable[[int], Counter[str]], what: str) -> int:
        """``wanted``, checked, or the largest count whose ``bill`` the budget affords; bills must not fall.

        Raises ValueError for neither a count nor a budget, or where the count, or a single one, costs too much.
        """
        if wanted is None and self.budget is None:
            raise ValueError(f"say how many {what}, or give a budget")
        if not self.affords(bill(wanted or 1)):
            raise ValueError(self._too_little(wanted or 1, bill(wanted or 1), what))
        if wanted is not None:
            return wanted
        return _last(lambda count: self.affords(bill(count)))

    def _too_little(self, count: int, calls: Counter[str], what: str) -> str:
        assert self.budget is not None, "without a budget everything is affordable"
        needed = self.budget.spent(Ledger(calls))
        return (
            f"{count} {what} cost {needed:.4g} for each prompt, and the budget is {self.budget.limit:.4g}: raise it, or"
            " take fewer or fewer steps"
        )


def _last(affordable: Callable[[int], bool]) -> int:
    """The last of the counts 1, 2, ... that are affordable; the first one is."""
    low = 1
    while affordable(2 * low):
        low *= 2
    high = 2 * low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if affordable(middle) else (low, middle)
    return low


class PreviewScorer(Protocol):
    """Scores of candidates on their way; those of one step are comparable among themselves alone."""

    def __call__(self, run: SearchRun, candidates: Particles) -> Tensor:
        """(N, K), NaN where one failed."""

    def bill(self, run: SearchRun, candidates: int) -> Counter[str]:
        """What scoring so many costs."""


@dataclass(frozen=True)
class DecodedRewards:
    """The run's own rewards of decoded previews."""

    def __call__(self, run: SearchRun, candidates: Particles) -> Tensor:
        return run.decoded_scores(candidates)

    def bill(self, run: SearchRun, candidates: int) -> Counter[str]:
        """A decode and a call of every reward for each."""
        return score_bill(run, candidates)


def scorer_or_default(scorer: PreviewScorer | None) -> PreviewScorer:
    """``scorer``, or for None the run's own rewards: a configuration cannot replace a default that is a dataclass."""
    return scorer or DecodedRewards()


def walk_bill(run: SearchRun, candidates: int, steps: int) -> Counter[str]:
    """What moving candidates by ``steps`` costs."""
    return Counter({FORWARD: candidates * steps * (2 if run.guidance > 1 else 1)})


def score_bill(run: SearchRun, candidates: int) -> Counter[str]:
    """What decoding and scoring candidates costs."""
    return Counter({DECODE: candidates} | {reward_call(reward.name): candidates for reward in run.rewards})
