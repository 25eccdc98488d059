"""Loss scaling for networks that compute in float16, whose gradients underflow otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

_GROWTH_INTERVAL = 2000  # updates without an overflow after which the scale is doubled


@dataclass
class LossScale:
    """A factor of the loss that is halved when gradients overflow, by the rule of ``torch.amp.GradScaler``.

    The gradient of a mean over many samples and latent values is about 1e-8 at the network's output; float16 ends at
    6e-8. The scale is a power of two, so dividing the gradients by it is exact.

    Attributes:
        value: The scale; 1 scales nothing.
        updates: The number of updates since it last changed.
    """

    value: float = 1.0
    updates: int = 0

    @classmethod
    def for_dtype(cls, dtype: torch.dtype, initial: float) -> LossScale:
        """Start at ``initial`` for a network that computes in float16, at 1 for any other.

        Raises ValueError for float16 without a scale.
        """
        if dtype != torch.float16:
            return cls()
        if initial < 2:
            raise ValueError(
                f"training.loss_scale is {initial:g}: float16 loses the gradients of an unscaled loss, so take a power"
                " of two such as 65536, or model.dtype bfloat16"
            )
        return cls(initial)

    def unscale(self, parameters: Sequence[nn.Parameter]) -> None:
        """Divide the gradients by the scale, in place."""
        if self.value != 1:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.div_(self.value)

    def step(self, overflow: bool) -> bool:
        """Count an update; return whether the scale caused its ``overflow``, and halve it in that case."""
        if overflow and self.value > 1:
            self.value, self.updates = self.value / 2, 0
            return True
        self.updates += 1
        if self.value > 1 and self.updates == _GROWTH_INTERVAL:
            self.value, self.updates = self.value * 2, 0
        return False
