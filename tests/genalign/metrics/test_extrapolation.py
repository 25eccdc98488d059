"""Distances at infinite size, and comparisons at equal size."""

from __future__ import annotations

import pytest
import torch

from genalign.metrics.frechet import Gaussian, frechet_distance, gaussian_distance, vendi
from genalign.metrics.set_tests import at_infinite_size, compare_parts, compare_sets


def drawn(count: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def test_the_bias_of_a_frechet_distance_is_gone() -> None:
    """Of a set from the reference's own distribution, at 0, and of one that is shifted, at its squared distance."""
    reference = Gaussian.of(drawn(20_000, 24, seed=0))

    def distance(features: torch.Tensor) -> float:
        return gaussian_distance(Gaussian.of(features), reference)

    for shift, true in ((0.0, 0.0), (0.5, 6.0)):
        features = drawn(1500, 24, seed=1) + shift
        found = at_infinite_size(distance, features, smallest=200, points=15)
        assert abs(found.value - true) < 0.2 * (distance(features) - true) + 0.02 * true
        assert found.slope > 0 and len(found.sizes) == len(found.distances) == 15
        assert found.sizes[0] == 200 and found.distances[-1] == pytest.approx(distance(features))


def test_a_distance_that_is_linear_in_1_over_n_is_found_exactly() -> None:
    found = at_infinite_size(lambda part: 2.0 + 30.0 / len(part), drawn(900, 2, seed=0), smallest=100, points=5)
    assert found.value == pytest.approx(2) and found.slope == pytest.approx(30) and found.r_squared == pytest.approx(1)


def test_extrapolation_needs_room() -> None:
    with pytest.raises(ValueError, match="between smallest and 100 features, not 25 from 500: lower smallest"):
        at_infinite_size(lambda part: 0.0, drawn(100, 2, seed=0))
    with pytest.raises(ValueError, match="not 1 from 5"):
        at_infinite_size(lambda part: 0.0, drawn(100, 2, seed=0), smallest=5, points=1)


def test_sets_are_compared_at_one_size() -> None:
    sizes = set[int]()

    def reward(features: torch.Tensor) -> float:
        sizes.add(len(features))
        return -frechet_distance(features, drawn(500, 4, seed=2))

    before, after = drawn(300, 4, seed=3) + 0.5, drawn(200, 4, seed=4)
    found = compare_sets(reward, before, after, draws=20)
    assert sizes == {100} and found.size == 100 and found.win_rate == 1.0
    assert compare_sets(reward, before, before, draws=5).win_rate == 0.5
    assert compare_sets(vendi, before, after, size=50, draws=7) == compare_sets(vendi, before, after, size=50, draws=7)


def test_parts_hold_the_same_prompts_and_none_twice() -> None:
    before = torch.arange(10.0)[:, None]
    found = compare_sets(lambda part: float(part.sum()), before, before + 100, size=10, draws=3)
    assert found.before == (45.0,) * 3 and found.after == (1045.0,) * 3
    paired = compare_sets(lambda part: float(part.sum()), before, before + 100, size=4, draws=30)
    assert all(b - a == 400 for a, b in zip(paired.before, paired.after, strict=True))


@pytest.mark.parametrize("size", [1, 11])
def test_parts_that_cannot_be_taken_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"parts of {size} members"):
        compare_sets(vendi, drawn(10, 2, seed=0), drawn(10, 2, seed=1), size=size)


def test_disjoint_parts_are_each_compared_once() -> None:
    before, seen = torch.arange(11.0)[:, None], list[float]()

    def reward(features: torch.Tensor) -> float:
        seen.extend(features[:, 0].tolist())
        return float(features.sum())

    found = compare_parts(reward, before, before + 1, 3)
    assert len(found.before) == 3 and found.win_rate == 1 and found.size == 3
    assert len(set(seen[:9])) == 9 and sorted(seen[9:]) == sorted(value + 1 for value in seen[:9])
    for other, size in ((before[:10], 3), (before, 1), (before, 12)):
        with pytest.raises(ValueError, match=f"no common parts of {size}"):
            compare_parts(reward, before, other, size)
