"""Comparisons of sets at equal size."""

from __future__ import annotations

import pytest
import torch

from genalign.metrics.set_tests import compare_parts


def test_disjoint_parts_of_the_same_prompts_are_each_compared_once() -> None:
    before, scored = torch.arange(11.0)[:, None], list[float]()

    def reward(features: torch.Tensor) -> float:
        scored.extend(features[:, 0].tolist())
        return float(features.sum())

    pairs = compare_parts(reward, before, before + 100, 3)
    assert [after - before for before, after in pairs] == [300.0] * 3
    old, new = ([value for value in scored if (value >= 100) == late] for late in (False, True))
    assert len(set(old)) == 9 and new == [value + 100 for value in old]
    for other, size in ((before[:10], 3), (before, 1), (before, 12)):
        with pytest.raises(ValueError, match=f"no common parts of {size}"):
            compare_parts(reward, before, other, size)
