"""The benchmark of time to a score: when it looks, when it ends, and where it reads the time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts import speed_benchmark
from scripts.speed_benchmark import LIMIT, LOOK, RATES, TARGET, TUNING_SEED, Work, reached, trained


class _Scripted:
    """A contender whose rounds take as long as LOOK's third, and whose looks are told beforehand."""

    def __init__(self, looks: list[float]) -> None:
        self.looks: Iterator[float] = iter(looks)
        self.seconds, self.rounds = 0.0, 0

    def __call__(self) -> None:
        self.seconds += LOOK / 3
        self.rounds += 1

    def strict(self) -> float:
        return next(self.looks)


def test_looks_are_as_far_apart_as_asked_and_end_at_the_target() -> None:
    contender = _Scripted([0.3, 0.4, TARGET + 0.05, 0.9])
    curve = trained(contender, LIMIT)  # type: ignore[arg-type] # a stand-in
    assert curve == [(0.0, 0.3), (pytest.approx(LOOK), 0.4), (pytest.approx(2 * LOOK), TARGET + 0.05)]
    assert reached(curve) == pytest.approx(1.5 * LOOK)
    assert contender.rounds == 6


def test_a_run_that_is_too_slow_is_given_up() -> None:
    contender = _Scripted([0.3] * 4)
    curve = trained(contender, 2.5 * LOOK)  # type: ignore[arg-type] # a stand-in
    assert contender.seconds == pytest.approx(8 / 3 * LOOK) and reached(curve) == LIMIT


def test_each_rate_is_given_the_time_of_the_best_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed, limits = dict(zip(RATES, (100.0, 40.0, 60.0, 30.0), strict=True)), []

    def curve(of: Work, name: str, rate: float, seed: int, limit: float = LIMIT) -> list[tuple[float, float]]:
        assert (name, seed) == ("ours", TUNING_SEED)
        limits.append(limit)
        return [(0.0, 0.0), (needed[rate], TARGET)]

    monkeypatch.setattr(speed_benchmark.Work, "curve", curve)
    assert Work(tmp_path).rate("ours_every_step") == RATES[3]
    assert limits[:4] == [LIMIT, 100.0, 40.0, 40.0]
