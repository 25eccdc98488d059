"""What weights in bfloat16 may change in the numbers of a frozen network."""

from __future__ import annotations

import torch
from torch import Tensor


def require_alike(full: Tensor, low: Tensor, tolerance: float) -> None:
    """Require numbers of weights in bfloat16 close to those in float32, in float32 themselves, and in their order.

    bfloat16 has 8 bits of a number, so that each layer rounds by 2^-9 of its values; ``tolerance`` allows for a few
    layers. Numbers that are further apart than twice of it must be in the same order.
    """
    assert full.dtype == low.dtype == torch.float32 and not torch.equal(full, low)
    torch.testing.assert_close(low, full, rtol=0, atol=tolerance)
    first, second = full.flatten(), low.flatten()
    apart = first[:, None] - first > 2 * tolerance
    assert apart.any() and bool((second[:, None] > second)[apart].all())
