"""A number of rounds that fits a time budget, chosen after the first round.

The learning rate schedule depends on the number of rounds, so it is chosen once, before the second round, and recorded:
a resumed run has the same schedule. The rate of the first round is the same for any number.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from genalign.runtime.progress import format_seconds
from genalign.training.reward_hacking import due

if TYPE_CHECKING:
    from genalign.training.trainer import Trainer

logger = logging.getLogger(__name__)
SHARE = 0.9
"""The share of the remaining time that is planned: rounds vary, and imports, saving and the report take time, too."""


@dataclass(frozen=True)
class TimeBudget:
    """A time budget to which ``training.rounds``, if null, is fitted after the first round.

    The number is written into config.json, from which a resumed run reads it; ``training.rounds`` overrides it. Nothing
    stops a run that becomes slower after its first round.

    Args:
        training_minutes: Minutes of training, including the evaluations between rounds; null for no limit.
        total_minutes: Minutes of the whole command, including loading and the evaluations before and after training;
            null for no limit.
        min_rounds: Smallest number of rounds, even if they take longer than the budget; the log says so then.
    """

    training_minutes: float | None = None
    total_minutes: float | None = None
    min_rounds: int = 2

    def __post_init__(self) -> None:
        for name in ("training_minutes", "total_minutes"):
            value = vars(self)[name]
            if value is not None and not value > 0:
                raise ValueError(f"time_budget.{name} must be positive, not {value}; null sets no limit")
        if self.min_rounds < 2:
            raise ValueError(f"time_budget.min_rounds must be at least 2, not {self.min_rounds}")

    @property
    def is_set(self) -> bool:
        """Whether there is a limit to fit the rounds to."""
        return self.training_minutes is not None or self.total_minutes is not None

    def seconds_left(self, training: float, total: float, afterwards: float) -> float:
        """Return the seconds that training may still take.

        Args:
            training: Seconds since training began.
            total: Seconds since the command began.
            afterwards: Seconds that the command takes after training.
        """
        minutes = {self.training_minutes: training, self.total_minutes: total + afterwards}
        return min(60 * limit - spent for limit, spent in minutes.items() if limit is not None)


def rounds_in(seconds: float, per_round: float, between: float, observed: Callable[[int, bool], bool]) -> int:
    """Return the largest number of rounds, including the first, such that the others take at most ``seconds``.

    Args:
        seconds: The time for all rounds after the first.
        per_round: Seconds of a round.
        between: Seconds of the observations after a round.
        observed: Whether there are observations after a round, given its number and whether it is the last.
    """
    rounds, spent = 1, 0.0
    while per_round > 0:
        following = spent + per_round + between * observed(rounds + 1, False)
        unless_last = between * (observed(rounds + 1, True) - observed(rounds + 1, False))
        if following + unless_last > seconds:
            break
        rounds, spent = rounds + 1, following
    return rounds


@dataclass(frozen=True)
class RoundFitter:
    """Fits the number of rounds of one run to its time budget.

    Args:
        budget: The time budget.
        started: When the command began, in seconds of ``time.monotonic``.
        afterwards: Seconds of the evaluation after training, as measured for the one before it.
        every: Rounds between two observations, for each kind of observation.
        record: Write the number into the configuration of the run.
        every_seconds: Seconds of training between observations that are scheduled by time; None for none.
        training_started: When the training began.
    """

    budget: TimeBudget
    started: float
    afterwards: float
    every: Sequence[int]
    record: Callable[[int], None]
    every_seconds: float | None = None
    training_started: float = field(default_factory=time.monotonic)

    def fit(self, trainer: Trainer) -> int:
        """Set the number of rounds of ``trainer`` after its first round and the observations then, and return it.

        The number is logged. All ranks call this, and take the number of the main rank.
        """
        now, per_round = time.monotonic(), trainer.seconds
        between = max(0.0, now - self.training_started - per_round)
        every = [*self.every, max(1, int(self.every_seconds / per_round))] if self.every_seconds else self.every

        def observed(number: int, last: bool) -> bool:
            return any(due(number, interval, last) for interval in every)

        left = self.budget.seconds_left(now - self.training_started, now - self.started, self.afterwards)
        fitting = rounds_in(SHARE * left, per_round, between, observed)
        least = max(self.budget.min_rounds, trainer.settings.warmup_rounds + 1)
        rounds: int
        rounds, fitting = trainer.processes.all_gather_object((max(fitting, least), fitting))[0]
        trainer.settings = replace(trainer.settings, rounds=rounds)
        if trainer.processes.is_main:
            self.record(rounds)
            observations = sum(observed(number, number == rounds) for number in range(1, rounds + 1))
            training = rounds * per_round + observations * between
            in_all = self.training_started - self.started + training + self.afterwards
            times = (
                f"the first took {per_round:.1f} s, and evaluations after it {between:.1f} s: about"
                f" {format_seconds(training)} of training, and {format_seconds(in_all)} in all"
            )
            _log(rounds, fitting, times)
        return rounds


def _log(rounds: int, fitting: int, times: str) -> None:
    """Log the number of rounds, of which ``fitting`` fit the budget, and their time."""
    if rounds > fitting:
        logger.warning(
            "%d rounds (training.rounds), the minimum, although only %d fit the time budget: this takes longer than"
            " planned; %s",
            *(rounds, fitting, times),
        )
    else:
        logger.info("%d rounds (training.rounds) fit the time budget; %s", rounds, times)
