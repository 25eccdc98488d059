"""The loss scale of float16: halved by overflows, doubled after many good updates."""

from __future__ import annotations

import pytest
import torch

from genalign.training.loss_scale import LossScale


def test_the_scale_is_halved_by_overflows_and_doubled_after_many_good_updates() -> None:
    scale = LossScale.for_dtype(torch.float16, 4.0)
    assert scale.step(overflow=True) and scale.value == 2.0
    assert not any(scale.step(overflow=False) for _ in range(1999)) and scale.value == 2.0
    assert not scale.step(overflow=False) and scale.value == 4.0
    assert all(scale.step(overflow=True) for _ in range(2)) and scale.value == 1.0
    assert not scale.step(overflow=True)  # nothing is left to halve: the update counts as skipped
    assert LossScale.for_dtype(torch.bfloat16, 65536.0) == LossScale()
    with pytest.raises(ValueError, match="float16 loses the gradients of an unscaled loss"):
        LossScale.for_dtype(torch.float16, 1.0)
