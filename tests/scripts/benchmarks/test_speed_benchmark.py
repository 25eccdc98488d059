"""The benchmark of time to a score: when it looks, when a run ends, where it reads the time, and what it resumes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from genalign.cli.generation_settings import RewardChoice
from genalign.scoring.score import NamedReward
from genalign.types import Prompt
from scripts.benchmarks import speed_benchmark
from scripts.benchmarks.published_results import Measurement
from scripts.benchmarks.speed_benchmark import (
    CONTENDERS,
    LOOK,
    PATIENCE,
    RATES,
    SEEDS,
    SHARE,
    TUNING_LIMIT,
    TUNING_SEED,
    WAYS,
    SpeedContender,
    Way,
    Workspace,
    arrival,
    level,
    race,
    scaled_clip,
    shipped,
    total_reward,
)

TARGET = 0.5


class _Scripted:
    """A contender whose rounds take ``seconds``, and whose looks are known beforehand; the last one stays."""

    def __init__(self, seconds: float, looks: list[float]) -> None:
        self.each, self.looks = seconds, list(looks)
        self.seconds, self.rounds = 0.0, 0

    def __call__(self) -> None:
        self.seconds += self.each
        self.rounds += 1

    def strict(self) -> float:
        return self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]


def _maker(contender: _Scripted) -> Callable[[], SpeedContender]:
    return lambda: cast(SpeedContender, contender)


def test_looks_are_as_far_apart_as_set_and_end_a_minute_after_the_target() -> None:
    quick, slow = _Scripted(LOOK / 3, [0.3, 0.45, 0.55, 0.9]), _Scripted(2 * LOOK, [0.35, TARGET])
    curves = race({"quick": _maker(quick), "slow": _maker(slow)}, "1", TARGET)
    looks = [pytest.approx(number * LOOK) for number in range(5)]
    assert curves["quick"] == list(zip(looks, [0.3, 0.45, 0.55, 0.9, 0.9], strict=True))
    assert curves["slow"] == [(0.0, 0.35), (2 * LOOK, TARGET), (4 * LOOK, TARGET)]
    assert arrival(curves["quick"], TARGET) == pytest.approx(1.5 * LOOK)
    assert arrival(curves["slow"], TARGET) == 2 * LOOK


def test_an_arrival_counts_only_where_every_look_of_a_minute_stays() -> None:
    dip = [(0.0, 0.3), (30.0, 0.5), (60.0, 0.49), (90.0, 0.6), (120.0, 0.5), (149.0, 0.5)]
    assert arrival(dip, TARGET) == math.inf
    assert arrival([*dip, (179.0, 0.5)], TARGET) == pytest.approx(60 + 30 * 0.01 / 0.11)
    assert arrival([*dip, (179.0, 0.49)], TARGET) == math.inf


def test_the_pace_ends_the_race_and_the_limit_a_run() -> None:
    quick, slow, never = _Scripted(LOOK, [0.3, TARGET]), _Scripted(LOOK / 2, [0.3]), _Scripted(100, [0.3])
    curves = race({"quick": _maker(quick), "slow": _maker(slow)}, "1", TARGET, pace="quick")
    assert quick.rounds == 3 and slow.rounds == 2 * PATIENCE and arrival(curves["slow"], TARGET) == math.inf
    race({"never": _maker(never)}, "2", TARGET, limit=400)
    assert never.rounds == 4


def test_a_seed_is_saved_whole_and_begins_anew_where_it_was_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first attempt ends in the fifth round of the only contender that is left then."""
    started: list[tuple[str, int]] = []

    class _Fails(_Scripted):
        def __call__(self) -> None:
            super().__call__()
            if self.rounds == 5 and len(started) == len(CONTENDERS):
                raise KeyboardInterrupt

    def contender(_: Workspace, name: str, seed: int) -> SpeedContender:
        started.append((name, seed))
        looks = {"plain": [0.3, TARGET], "plain_window": [0.3], "ours": [0.3, 0.4, TARGET]}[name]
        return cast(SpeedContender, (_Fails if name == "plain_window" else _Scripted)(LOOK, looks))

    monkeypatch.setattr(Workspace, "contender", contender)
    monkeypatch.setattr(Workspace, "target", lambda _: TARGET)
    work = Workspace(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        work.curves(61)
    assert not list(tmp_path.rglob("*.json"))
    curves = work.curves(61)
    assert started == [(name, 61) for name in CONTENDERS] * 2
    assert arrival(curves["ours"], TARGET) == 2 * LOOK and arrival(curves["plain_window"], TARGET) == math.inf
    assert work.curves(61) == curves and len(started) == 2 * len(CONTENDERS)
    assert [file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*.json")] == ["runs/61.json"]


def _tuned(folder: Path, levels: dict[str, list[float]], monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """A workspace whose contenders rise from 0.3 to a level in the first half of the tuning, by rate for the plain."""
    raced: list[tuple[Way, int, float]] = []

    def contender(way: Way, seed: int, rate: float = 0.0, batch: int = 0) -> _Scripted:
        raced.append((way, seed, rate))
        name = next(name for name in WAYS if WAYS[name] == way)
        reached = levels[name][RATES.index(rate) if way.plain else 0]
        return _Scripted(TUNING_LIMIT / 8, [0.3, 0.3, (0.3 + reached) / 2, reached])

    monkeypatch.setattr(speed_benchmark, "SpeedContender", contender)
    monkeypatch.setattr(speed_benchmark, "round_seconds", lambda: {"24": 3.0, "48": 1.0, "96": 2.0})
    return Workspace(folder)


def test_the_target_is_below_the_level_of_every_contender(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    levels = {"plain": [0.3, 0.36, 0.42, 0.2], "plain_window": [0.5] * 4, "ours": [0.7]}
    work = _tuned(tmp_path, levels, monkeypatch)
    assert work.target() == pytest.approx(0.3 + SHARE * 0.12, abs=5e-4)
    assert work.rate("plain") == RATES[2] and work.batch() == 48
    rows = {row.name: row.value for row in speed_benchmark.levels(work)}
    assert rows == pytest.approx({"level.plain": 0.42, "level.plain_window": 0.5, "level.ours": 0.7})
    assert json.loads((tmp_path / "target.json").read_text()) == work.target()
    saved = {file.stem for file in (tmp_path / "tuning" / "plain").iterdir()}
    assert saved == {f"{rate:g}" for rate in RATES} and (tmp_path / "tuning" / "ours" / "shipped.json").exists()


def test_where_the_plain_loop_gains_nothing_there_is_no_race(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    levels = {"plain": [0.3] * 4, "plain_window": [0.5] * 4, "ours": [0.7]}
    with pytest.raises(ValueError, match=f"gains nothing on seed {TUNING_SEED}"):
        _tuned(tmp_path, levels, monkeypatch).target()


def test_the_clip_range_is_scaled_to_the_latents() -> None:
    assert scaled_clip(16 * 64 * 64) == 1e-4 and scaled_clip(4 * 16 * 16) == pytest.approx(8e-4)


def test_the_plain_loop_is_given_the_weighted_sum_of_the_rewards() -> None:
    def first(samples: torch.Tensor, prompts: object) -> torch.Tensor:
        return samples

    reward = total_reward([NamedReward("a", first), NamedReward("b", first, weight=0.5)])
    assert reward(torch.tensor([1.0, 2.0]), [Prompt("a")] * 2).tolist() == [1.5, 3.0]


@pytest.mark.parametrize("name", WAYS)
def test_every_way_trains_and_its_looks_take_no_time(
    name: str, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = shipped()
    training = replace(settings.training, prompts_per_round=4, group_size=2, batch_size=4)
    model = replace(settings.model, path=str(tiny_folder))
    small = replace(settings, training=training, model=model, rewards={"red": RewardChoice(_redness)})
    monkeypatch.setattr(speed_benchmark, "shipped", lambda: small)
    monkeypatch.setattr(speed_benchmark, "plan_samples", partial(_few, speed_benchmark.plan_samples))
    contender = SpeedContender(WAYS[name], TUNING_SEED, batch=4)
    before = [parameter.detach().clone() for parameter in contender.policy.parameters]
    assert 0 <= contender.strict() <= 1 and contender.seconds == 0
    contender()
    assert contender.seconds > 0 and contender.policy.updates > 0
    assert any(not torch.equal(a, b) for a, b in zip(before, contender.policy.parameters, strict=True))


def _redness(samples: torch.Tensor, prompts: object) -> torch.Tensor:
    return samples[:, 0].flatten(1).mean(1) - samples[:, 1:].flatten(1).mean(1)


def _few(plan: Callable[..., Any], prompts: object, samples: int, seeds: int) -> Any:
    return plan(prompts, 1, 1)


def _published(curves: dict[str, list[list[float]]], folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Values by name and metric, of equal seeds."""
    monkeypatch.setattr(Workspace, "batch", lambda _: 96)
    monkeypatch.setattr(Workspace, "target", lambda _: TARGET)
    monkeypatch.setattr(Workspace, "tuning", lambda *_: {f"{rate:g}": [[0.0, 0.3], [60.0, 0.4]] for rate in RATES})
    monkeypatch.setattr(Workspace, "curves", lambda *_: curves)
    monkeypatch.setattr(Workspace, "rounds", lambda _: {name: [12.0 + place] for place, name in enumerate(WAYS)})
    written: list[Measurement] = []
    monkeypatch.setattr(speed_benchmark, "write_results", lambda folder, stem, head, measured: written.extend(measured))
    speed_benchmark.publish(Workspace(folder))
    return {f"{row.name}: {row.metric}": row.value for row in written}


ARRIVED, NOT = [[0.0, 0.3], [200.0, TARGET], [260.0, TARGET]], [[0.0, 0.3], [300.0, 0.4]]


def test_a_way_that_does_not_arrive_is_published_as_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = [[0.0, 0.3], [50.0, TARGET], [110.0, TARGET]]
    rows = _published({**dict.fromkeys(CONTENDERS, ARRIVED), "plain": NOT, "ours": ours}, tmp_path, monkeypatch)
    assert rows[f"plain: seconds to {TARGET}, at least"] == 300 and rows[f"ours: seconds to {TARGET}"] == 50
    assert rows["speedup.plain: its seconds over ours, at least"] == 6
    assert rows["speedup.plain_window: its seconds over ours"] == 4
    assert rows[f"speedup.plain_window.{SEEDS[0]}: its seconds over ours"] == 4
    assert rows[f"speedup.plain.{SEEDS[-1]}: its seconds over ours, at least"] == 6
    lost = f"runs of {len(SEEDS)} that did not arrive"
    assert (rows[f"lost.plain: {lost}"], rows[f"lost.ours: {lost}"]) == (len(SEEDS), 0)
    assert rows["round.plain: seconds of a round over ours"] == 12 / (12 + list(WAYS).index("ours"))


def test_where_ours_does_not_arrive_there_is_no_speedup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = _published({**dict.fromkeys(CONTENDERS, ARRIVED), "ours": NOT}, tmp_path, monkeypatch)
    assert rows[f"ours: seconds to {TARGET}, at least"] == 300
    assert rows["speedup.plain: its seconds over ours, at least"] == 0
    assert rows[f"lost.ours: runs of {len(SEEDS)} that did not arrive"] == len(SEEDS)


def test_a_level_is_a_mean_of_three_looks() -> None:
    assert level([(0.0, 0.2), (30.0, 0.5), (60.0, 0.8), (90.0, 0.2)]) == pytest.approx(0.5)
    assert level([(0.0, 0.2), (30.0, 0.4)]) == pytest.approx(0.3)
