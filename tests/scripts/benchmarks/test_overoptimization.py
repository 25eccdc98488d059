"""Tests of what is read off the runs on learned rewards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts.benchmarks.learned_rewards import annotator, drawn_pairs
from scripts.benchmarks.overoptimization import curve, predictors, stopped_early


def test_a_measure_that_orders_the_gains_has_a_tau_of_1() -> None:
    rows = [
        {"reward": name, "seed": seed, "gain": gain + 0.001 * seed, "measures": measures}
        for name, gain, measures in (
            ("a", 0.1, {"right": 1.0, "wrong": 3.0, "constant": 1.0, "missing": None}),
            ("b", 0.2, {"right": 2.0, "wrong": 2.0, "constant": 1.0, "missing": 1.0}),
            ("c", 0.3, {"right": 3.0, "wrong": 1.0, "constant": 1.0, "missing": 2.0}),
        )
        for seed in (1, 2)
    ]
    table = predictors(rows)
    assert table.keys() == {"right", "wrong"}  # what is constant or was not measured everywhere orders nothing
    assert table["right"]["mean"] == pytest.approx(-table["wrong"]["mean"]) and table["right"]["mean"] > 0.8


def test_a_curve_has_the_distance_at_each_evaluation(tmp_path: Path) -> None:
    held_out = {"learned": {"mean": 2.0}, "strict": {"mean": 0.4, "low": 0.3, "high": 0.5}}
    rows = [
        {"kl": None, "held_out": {}},
        {"kl": 4.0, "held_out": {}},
        {"kl": 9.0, "held_out": held_out},
        {"kl": None, "held_out": held_out},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert curve(tmp_path) == [[3.0, 2.0, 0.4, 0.3, 0.5]] * 2


def test_fewer_pairs_are_the_first_of_more(tmp_path: Path) -> None:
    lines = [json.dumps({"number": number, "annotator": annotator(0.1)}) for number in range(20)]
    (tmp_path / "preferences.jsonl").write_text("\n".join([*lines, json.dumps({"annotator": annotator(0.0)})]) + "\n")
    few, many = (drawn_pairs(tmp_path, size, 0.1, seed=3) for size in (5, 12))
    assert many[:5] == few and set(many) < set(lines) and drawn_pairs(tmp_path, 5, 0.1, seed=4) != few
    with pytest.raises(ValueError, match="has 20 pairs, not 21"):
        drawn_pairs(tmp_path, 21, 0.1, seed=3)


def test_a_run_stops_before_the_distance_at_which_the_others_are_at_their_best() -> None:
    """The others of the first run are at their best at 2 and 4, of the second at 1 and 4, of the third at 1 and 2."""
    truths: dict[int, dict[float, float]] = {
        1: {0: 0.3, 1: 0.5, 2: 0.4, 3.5: 0.2},
        2: {0: 0.3, 1: 0.4, 2: 0.6, 3: 0.5},
        3: {2: 0.3, 4: 0.7},
    }
    curves = {
        seed: [[distance, 0.0, truth, 0.0, 1.0] for distance, truth in points.items()]
        for seed, points in truths.items()
    }
    stopped = stopped_early(curves)
    assert stopped == {1: curves[1][:3], 2: curves[2][:3], 3: curves[3][:1]}  # at most 3, 2.5, and 1.5
