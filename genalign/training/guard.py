"""Looking after a run: a panel at intervals, an alarm where a light turns amber, and what follows from a red one."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

from genalign.runtime.state import State
from genalign.training.reward_hacking import Limits, Looks, Panel, panel

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Actions:
    """What a red light does beside the line in the log.

    ``stop`` ends the run. ``raise_kl`` doubles the weight of the distance from the reference policy, to that value or
    more. ``keep_best`` writes the weights of the best look without a red light, by the mean shift of the held-out
    rewards, to the folder ``best``.
    """

    stop: bool = False
    raise_kl: float | None = None
    keep_best: bool = False

    def __post_init__(self) -> None:
        if self.raise_kl is not None and not self.raise_kl > 0:
            raise ValueError(f"raise_kl must be a positive weight, not {self.raise_kl}")


def due(rounds_done: int, every: int, last: bool) -> bool:
    """Whether a look every ``every`` rounds is due: after the first, and the last, too."""
    return rounds_done == 1 or rounds_done % every == 0 or last


class Guard:
    """``look`` reads the model as it is, first by ``begin`` before training. ``rewards`` names the held-out ones.
    ``stopped`` tells whether a red light has ended the run.

    Raises:
        ValueError: ``keep_best`` without a held-out reward.
    """

    def __init__(
        self, look: Callable[[], Looks], rewards: tuple[str, ...], limits: Limits, actions: Actions, every: int
    ) -> None:
        if actions.keep_best and not rewards:
            raise ValueError("hacking.on_red.keep_best needs a reward to go by: name one in hacking.rewards")
        self.actions, self.every = actions, every
        self._look, self._rewards, self._limits = look, rewards, limits
        self._before: Looks | None = None
        self._best = -math.inf
        self.stopped = False

    def begin(self) -> None:
        """Look at the untrained model."""
        self._before = self._look()

    def panel(self, rounds_done: int, last: bool, kl: float) -> Panel | None:
        """What is seen after a round; None where none is due."""
        if not due(rounds_done, self.every, last):
            return None
        if self._before is None:
            raise ValueError("there is nothing to compare with: call begin() before training")
        seen = panel(self._before, self._look(), kl, self._limits)
        if seen.alarm:
            logger.warning("round %d: the reward may be exploited: %s", rounds_done, seen.alarm)
        return seen

    def is_best(self, seen: Panel) -> bool:
        """Whether ``keep_best`` asks for these weights to be kept."""
        if not self.actions.keep_best or seen.light == "red":
            return False
        shifts = [signal.shift.mean for signal in seen.signals if signal.name in self._rewards]
        score = sum(shifts) / len(shifts) if shifts else -math.inf
        better, self._best = score > self._best, max(score, self._best)
        return better

    def state(self) -> State:
        """The look at the untrained model, the best score so far, and whether the run is over."""
        tensors = self._before.tensors() if self._before else {}
        return State(tensors, {"best": self._best if math.isfinite(self._best) else None, "stopped": self.stopped})

    def restore(self, state: State) -> None:
        """Put back what ``state()`` gave."""
        self._before = Looks.from_tensors(state.tensors)
        self._best = -math.inf if state.numbers["best"] is None else state.numbers["best"]
        self.stopped = state.numbers["stopped"]
