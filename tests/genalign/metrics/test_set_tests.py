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

    comparison = compare_parts(reward, before, before + 1, 3)
    assert len(comparison.before) == 3 and comparison.win_rate == 1
    assert len(set(scored[:9])) == 9 and sorted(scored[9:]) == sorted(value + 1 for value in scored[:9])
    assert compare_parts(reward, before, before, 3).win_rate == 0.5
    for other, size in ((before[:10], 3), (before, 1), (before, 12)):
        with pytest.raises(ValueError, match=f"no common parts of {size}"):
            compare_parts(reward, before, other, size)
