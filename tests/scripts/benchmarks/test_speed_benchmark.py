"""The benchmark of time to a score: when it looks, when it ends, and where it reads the time."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from scripts.benchmarks import speed_benchmark
from scripts.benchmarks.published_results import Measurement
from scripts.benchmarks.speed_benchmark import (
    CONTENDERS,
    LOOK,
    RATE_LIMIT,
    RATES,
    TARGET,
    TUNING_SEED,
    WAYS,
    Way,
    Workspace,
    race,
    reached,
)


class _Scripted:
    """A contender whose rounds take ``seconds``, and whose looks are told beforehand; the last one stays."""

    def __init__(self, seconds: float, looks: list[float]) -> None:
        self.each, self.looks = seconds, looks
        self.seconds, self.rounds = 0.0, 0

    def __call__(self) -> None:
        self.seconds += self.each
        self.rounds += 1

    def strict(self) -> float:
        return self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]


def test_looks_are_as_far_apart_as_asked_and_end_at_the_target() -> None:
    quick, slow = _Scripted(LOOK / 3, [0.3, TARGET - 0.05, TARGET + 0.05, 0.9]), _Scripted(2 * LOOK, [0.35, TARGET])
    curves = race({"quick": quick, "slow": slow})  # stand-ins
    assert curves["quick"] == [
        (0.0, 0.3),
        (pytest.approx(LOOK), TARGET - 0.05),
        (pytest.approx(2 * LOOK), TARGET + 0.05),
    ]
    assert curves["slow"] == [(0.0, 0.3), (2 * LOOK, 0.35), (4 * LOOK, TARGET)]
    assert reached(curves["quick"]) == pytest.approx(1.5 * LOOK) and reached(curves["slow"]) == 4 * LOOK


@pytest.mark.parametrize("patience", [1, 3])
def test_the_pace_ends_the_race_and_the_limit_a_run(patience: int) -> None:
    quick, slow = _Scripted(LOOK, [0.3, 0.3, TARGET]), _Scripted(LOOK / 2, [0.3])
    first = _Scripted(LOOK, [TARGET])
    raced = {"quick": quick, "slow": slow, "first": first}
    curves = race(raced, pace=["quick"], patience=patience)  # stand-ins
    assert (first.rounds, quick.rounds, slow.rounds) == (1, 2, 4 * patience) and reached(curves["slow"]) == math.inf
    never = _Scripted(100, [0.3])
    race({"never": never}, limit=400)  # a stand-in
    assert never.rounds == 4


def test_the_best_rate_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed, raced = dict(zip(RATES, (4.0, 2.0, 1.0, 3.0), strict=True)), []

    def contender(way: Way, rate: float, seed: int, batch: int = 96) -> _Scripted:
        assert (way, seed) == (WAYS["ours"], TUNING_SEED)
        raced.append(rate)
        return _Scripted(needed[rate] * LOOK, [0.3, TARGET] if len(raced) == 1 else [TARGET])

    monkeypatch.setattr(speed_benchmark, "SpeedContender", contender)
    monkeypatch.setattr(speed_benchmark, "round_seconds", lambda kind: {"24": 3.0, "48": 1.0, "96": 2.0})
    work = Workspace(tmp_path)
    assert work.batch("ours") == 48
    assert [work.rate("ours_every_step"), work.rate("ours")] == [RATES[2]] * 2
    assert raced == list(RATES)


def test_where_none_arrives_the_nearest_rate_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    levels = iter([0.38, 0.42, 0.40, 0.30])
    made = [_Scripted(RATE_LIMIT / 4, [next(levels)]) for _ in RATES]
    monkeypatch.setattr(speed_benchmark, "SpeedContender", lambda *_: made.pop(0))
    monkeypatch.setattr(speed_benchmark, "round_seconds", lambda kind: dict.fromkeys(("24", "48", "96"), 1.0))
    assert Workspace(tmp_path).rate("plain") == RATES[1]


def _published(curves: dict[str, list[list[float]]], folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Values by name and metric, of three equal seeds."""
    monkeypatch.setattr(Workspace, "batch", lambda *_: 96)
    monkeypatch.setattr(Workspace, "by_rate", lambda *_: {f"{rate:g}": [[0.0, 0.3], [60.0, 0.4]] for rate in RATES})
    monkeypatch.setattr(Workspace, "curves", lambda *_: curves)
    monkeypatch.setattr(Workspace, "rounds", lambda *_: {name: [12.0 + place] for place, name in enumerate(WAYS)})
    written: list[Measurement] = []
    monkeypatch.setattr(speed_benchmark, "write_results", lambda folder, stem, head, measured: written.extend(measured))
    speed_benchmark.publish(Workspace(folder))
    return {f"{row.name}: {row.metric}": row.value for row in written}


ARRIVED, NOT = [[0.0, 0.3], [200.0, TARGET]], [[0.0, 0.3], [300.0, 0.4]]


def test_a_way_that_does_not_arrive_is_published_as_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    curves = {**dict.fromkeys(CONTENDERS, ARRIVED), "plain": NOT, "ours": [[0.0, 0.3], [50.0, TARGET], [100.0, 0.5]]}
    rows = _published(curves, tmp_path, monkeypatch)
    assert rows[f"plain: seconds to {TARGET}, at least"] == 300 and rows[f"ours: seconds to {TARGET}"] == 50
    assert rows["speedup.plain: its seconds over ours, at least"] == 6
    assert rows["speedup.plain_window: its seconds over ours"] == 4
    assert rows["round.plain: seconds of a round over ours"] == 12 / (12 + list(WAYS).index("ours"))


def test_where_ours_does_not_arrive_there_is_no_speedup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = _published({**dict.fromkeys(CONTENDERS, ARRIVED), "ours": NOT}, tmp_path, monkeypatch)
    assert rows[f"ours: seconds to {TARGET}, at least"] == 300
    assert rows["speedup.plain: its seconds over ours, at least"] == 0
