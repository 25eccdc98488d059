"""What is read off the runs of the methods' comparisons."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from scripts.benchmarks import method_comparisons
from scripts.benchmarks.method_comparisons import (
    Evaluations,
    arrival,
    arrivals,
    at_equal_cost,
    ended_below_start,
    from_start,
    split_rate,
)
from tests.packages import ROOT


def _run(*scores: float) -> Evaluations:
    """Evaluations at the start and after each minute, with intervals of +-0.05."""
    return [[100 * i, 60.0 * i, score, score - 0.05, score + 0.05] for i, score in enumerate(scores)]


def test_a_run_arrives_between_two_evaluations() -> None:
    assert arrival(_run(0.2, 0.4, 0.6), 0.5) == pytest.approx(90)
    assert arrival(_run(0.2, 0.1, 0.1), 0.5) == float("inf")
    assert arrival(_run(0.6, 0.1), 0.5) == 0


def test_auto_is_timed_by_the_best_fixed_rate() -> None:
    """The target is 90 % of 0.5, the best end of all; the fixed rates need 60 x 0.25 / 0.3 and 120 s x 0.25 / 0.3."""
    auto = {"1": _run(0.2, 0.3, 0.4, 0.5), "2": _run(0.2, 0.5, 0.5, 0.5), "3": _run(0.2, 0.2, 0.2, 0.2)}
    fixed = {"fixed-1e-3": {"100": _run(0.2, 0.5)}, "fixed-1e-2": {"100": _run(0.2, 0.35, 0.5)}}
    table = arrivals({"nft": {"from-1e-3": auto, **fixed}, "prdp": {"from-1e-3": {"1": _run(0.2, 0.3)}, **fixed}})
    nft = table["nft"]
    assert (nft["target"], nft["best_rate"]) == (pytest.approx(0.45), "fixed-1e-3")
    assert nft["fixed"] == pytest.approx(50) and nft["auto"] == pytest.approx(150) and nft["ratio"] == pytest.approx(3)
    assert table["prdp"]["auto"] is None and table["prdp"]["ratio"] is None  # not reached


def test_a_fall_is_told_from_noise() -> None:
    assert ended_below_start(_run(0.3, 0.4, 0.24)) and not ended_below_start(_run(0.3, 0.1, 0.26))


def test_standings_are_read_again_from_the_published_evaluations() -> None:
    equal = at_equal_cost({"a": {"1": _run(0.2, 0.4)}, "b": {"1": _run(0.2, 0.3)}})
    assert [one["name"] for one in equal["seconds"]["recipes"]] == ["a", "b"]
    assert json.loads(json.dumps(equal)) == equal


@pytest.mark.parametrize(
    "name", ["shapes_learning_rates", "shapes_learning_rates_flow_grpo", "shapes_fixed_rates", "shapes_prompt_counts"]
)
def test_the_start_is_evaluated_on_the_samples_of_the_later_evaluations(name: str) -> None:
    folder = ROOT / "scripts" / "configs" / "compare"
    comparison = yaml.safe_load((folder / f"{name}.yaml").read_text())
    held_out = yaml.safe_load((folder / comparison["base"]).read_text())["held_out"]
    for variant in comparison["variants"].values():
        own = variant["before_after"]
        assert own == {part: held_out[part] for part in ("prompts", "samples_per_task", "seeds")}


def test_rates_are_read_from_the_names_of_runs() -> None:
    assert split_rate("dense_grpo-from-1e-3") == ("dense_grpo", "from-1e-3")
    assert split_rate("nft-fixed-3e-2") == ("nft", "fixed-3e-2")


def test_another_start_is_refused(tmp_path: Path) -> None:
    size = {"samples_per_task": 48, "seeds": 1}
    (tmp_path / "config.json").write_text(json.dumps({"before_after": size, "held_out": size}))
    suites = {"before_after": {"suite_hash": "comp"}, "held_out": {"suite_hash": "val"}}
    (tmp_path / "prompts.json").write_text(json.dumps(suites))
    with pytest.raises(ValueError, match="before_after has other samples than held_out"):
        from_start(tmp_path)


def test_runs_are_published_with_their_evaluations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The learning rates of two methods: one run falls, and is counted."""
    runs = {"nft-from-1e-3": _run(0.2, 0.5), "prdp-from-1e-3": _run(0.3, 0.1)}
    fixed = {"nft-fixed-1e-3": _run(0.2, 0.4), "prdp-fixed-1e-3": _run(0.3, 0.4)}
    of_file = {"shapes_learning_rates": runs, "shapes_learning_rates_flow_grpo": {}, "shapes_fixed_rates": fixed}
    monkeypatch.setattr(method_comparisons, "compared", lambda _, file: {n: {1: r} for n, r in of_file[file].items()})
    monkeypatch.setattr(method_comparisons, "from_start", lambda run: run)
    monkeypatch.setattr(method_comparisons, "RESULTS", tmp_path)
    method_comparisons.learning_rates(tmp_path)
    result = json.loads((tmp_path / "learning_rates_shapes.json").read_text())
    assert {row["name"]: row["mean"] for row in result["rows"]} == {"nft.fell": 0.0, "prdp.fell": 1.0}
    assert result["arrivals"] == arrivals(result["evaluations"]) and result["arrivals"]["nft"]["ratio"] is not None
