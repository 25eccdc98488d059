"""A copy of the weights that trails behind them, for losses and anchors that compare with it."""

from __future__ import annotations

from genalign.algorithms.recipe import Lag
from genalign.diffusion.policy import Policy
from genalign.runtime.state import State


class TrailingWeights:
    """The ``weights`` of a recipe's memory: they begin as the policy's and move towards them after every round.

    Args:
        lag: How much of them is kept.
        policy: The policy, with the weights that training begins with.
    """

    def __init__(self, lag: Lag, policy: Policy) -> None:
        self.lag, self.weights = lag, policy.snapshot()

    def after_round(self, index: int) -> None:
        """Move towards the policy's weights after round ``index``."""
        self.weights.update(self.lag.decay(index))

    def state(self) -> State:
        """Return the weights, gathered if they are sharded."""
        return State(self.weights.state_dict(), {})

    def restore(self, state: State) -> None:
        """Restore what ``state()`` returned."""
        self.weights.load_state_dict(state.tensors)
