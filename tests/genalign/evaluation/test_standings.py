"""Standings at equal cost: reading between evaluations, intervals over seeds, and what cannot be compared."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from genalign.evaluation.standings import (
    Difference,
    Look,
    common_score,
    mean_curve,
    read_looks,
    shared_looks,
    standings,
)
from genalign.metrics.intervals import Estimate

COSTS = [(100, 10.0), (200, 30.0), (300, 60.0)]


def _run(folder: Path, scores: list[float], costs: list[tuple[int, float]] = COSTS, size: int = 32) -> Path:
    """Write what a run leaves of its evaluations, with a round without one after each."""
    folder.mkdir(parents=True)
    rows = []
    for score, (nfe, seconds) in zip(scores, costs, strict=True):
        rows.append({"nfe": nfe, "machine": {"seconds": seconds}, "held_out": {"strict": {"mean": score}}})
        rows.append({"nfe": nfe + 1, "machine": {"seconds": seconds + 1}, "held_out": None})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))
    config = {"held_out": {"samples_per_task": size, "seeds": 1}, "evaluation": None, "sampling": {"num_steps": 10}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "prompts.json").write_text('{"held_out": {"suite_hash": "abc"}}')
    return folder


def test_both_standings_are_read_from_the_same_runs(tmp_path: Path) -> None:
    """The second recipe spends half the NFE in the same seconds: it is behind in time, and ahead in NFE."""
    fast = {seed: _run(tmp_path / f"fast-{seed}", [0.2, 0.3, 0.5 + seed / 100]) for seed in (1, 2)}
    dear = [(50, 10.0), (100, 30.0), (150, 60.0)]
    slow = {seed: _run(tmp_path / f"slow-{seed}", [0.2, 0.3, 0.4 + seed / 100], dear) for seed in (1, 2)}
    looks = shared_looks({"fast": fast, "slow": slow})
    assert common_score(looks, "partial") == "strict"
    by_nfe, by_time = (standings(looks, cost, "strict") for cost in ("nfe", "seconds"))
    assert (by_nfe.budget, by_time.budget) == (150, 60)
    assert [(one.name, round(one.score.mean, 6)) for one in by_time.recipes] == [("fast", 0.515), ("slow", 0.415)]
    assert [(one.name, round(one.score.mean, 6)) for one in by_nfe.recipes] == [("slow", 0.415), ("fast", 0.25)]
    behind = by_nfe.behind("fast")
    assert behind is not None and behind.estimate.mean == pytest.approx(0.165) and by_nfe.behind("slow") is None
    assert by_time.recipes[0].score.low < 0.515 < by_time.recipes[0].score.high
    rise = by_time.recipes[0].rise.mean  # from 45 seconds, half of the way from 0.3 to the end
    assert rise == pytest.approx((0.515 - 0.3) / 2)
    curve = mean_curve(by_time.curves["fast"].values())
    assert (curve.costs[0], curve.costs[-1]) == (10, 60) and curve.at(20) == pytest.approx(0.25, abs=1e-3)
    assert json.loads(json.dumps(by_time.as_dict()))["recipes"][0]["name"] == "fast"


@pytest.mark.parametrize(
    ("estimate", "words"),
    [
        (Estimate(0.05, 0.01, 0.09, 3), "+0.050 (+0.010 to +0.090)"),
        (Estimate(0.01, -0.02, 0.04, 3), "not told apart within \N{PLUS-MINUS SIGN}0.040"),
        (Estimate(0.05, -math.inf, math.inf, 1), "+0.050 (no interval: it needs two seeds of each)"),
    ],
)
def test_a_difference_says_which_interval_it_has(estimate: Estimate, words: str) -> None:
    assert Difference("a", "b", estimate).words == words


def test_one_seed_stands_without_an_interval() -> None:
    looks = {
        name: {1: [Look(10, 1.0, {"strict": 0.1}), Look(20, 2.0, {"strict": end})]}
        for name, end in (("a", 0.3), ("b", 0.2))
    }
    result = standings(looks, "nfe", "strict")
    assert [one.name for one in result.recipes] == ["a", "b"] and not result.recipes[0].score.has_interval
    assert "no interval" in result.differences[0].words and result.as_dict()["recipes"][0]["score"]["low"] is None


def test_runs_that_were_evaluated_differently_do_not_stand_together(tmp_path: Path) -> None:
    one = _run(tmp_path / "one", [0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match=r"two was evaluated on other held-out samples than .*one: set held_out alike"):
        shared_looks({"one": {1: one}, "two": {1: _run(tmp_path / "two", [0.1, 0.2, 0.3], size=8)}})
    none = _run(tmp_path / "none", [0.1, 0.2, 0.3])
    (none / "metrics.jsonl").write_text('{"nfe": 1, "held_out": null}\n')
    with pytest.raises(ValueError, match=r"none has no evaluations on held-out prompts: set held_out.every_seconds"):
        shared_looks({"one": {1: one}, "none": {1: none}})
    looks = {"a": {1: [Look(1, 1, {"strict": 0.1})]}, "b": {1: [Look(1, 1, {"clip": 0.1})]}}
    with pytest.raises(ValueError, match="no held-out score in common"):
        common_score(looks, "strict")
    assert len(read_looks(one)) == 3
