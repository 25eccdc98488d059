"""Elastic Reset: resets the weights to their average at intervals, and the average to the initial weights."""

from __future__ import annotations

from genalign.algorithms.recipe import ElasticReset
from genalign.diffusion.policy import Policy, WeightSnapshot
from genalign.runtime.files import with_prefix, without_prefix
from genalign.runtime.state import State


class ResetWeights:
    """The average that a policy is reset to, and its initial weights, which the average is reset to.

    Args:
        settings: When to reset, and the decay of the average.
        policy: The policy, with its initial weights.
    """

    def __init__(self, settings: ElasticReset, policy: Policy) -> None:
        self.settings, self.policy = settings, policy
        self.average, self.first = policy.snapshot(), policy.snapshot()

    def after_update(self) -> None:
        """Update the average after an optimizer step."""
        self.average.update(self.settings.decay)

    def after_round(self, index: int, old: WeightSnapshot | None) -> None:
        """Reset the weights if due after round ``index``, including the saved average and the sampling weights.

        A trust region measures distances within a round, so the next one starts from the reset weights.

        Args:
            index: The round.
            old: The sampling weights of a recipe with a lag.
        """
        if (index + 1) % self.settings.every:
            return
        self.policy.set_weights(self.average)
        for copy in (self.policy.average, old):
            if copy is not None:
                copy.update()  # which waits for a GPU, so the average on the CPU may change next
        for tensor, first in zip(self.average.tensors, self.first.tensors, strict=True):
            tensor.copy_(first)

    def state(self) -> State:
        """Return the average and the initial weights, gathered if they are sharded."""
        average, first = self.average.state_dict(), self.first.state_dict()
        return State(with_prefix("average.", average) | with_prefix("first.", first), {})

    def restore(self, state: State) -> None:
        """Restore the average and the initial weights."""
        self.average.load_state_dict(without_prefix("average.", state.tensors))
        self.first.load_state_dict(without_prefix("first.", state.tensors))
