"""A moving average of the weights, for losses and anchors that compare with it."""

from __future__ import annotations

from genalign.algorithms.recipe import Lag
from genalign.diffusion.policy import Policy
from genalign.runtime.state import State


class TrailingWeights:
    """The ``weights`` of a recipe's memory: a moving average of the policy's, updated after every round.

    Args:
        lag: The decay of the average.
        policy: The policy, with its initial weights.
    """

    def __init__(self, lag: Lag, policy: Policy) -> None:
        self.lag, self.weights = lag, policy.snapshot()

    def after_round(self, index: int) -> None:
        """Update the average after round ``index``."""
        self.weights.update(self.lag.decay(index))

    def state(self) -> State:
        """Return the weights, gathered if they are sharded."""
        return State(self.weights.state_dict(), {})

    def restore(self, state: State) -> None:
        """Restore what ``state()`` returned."""
        self.weights.load_state_dict(state.tensors)
