"""What is read off the runs of the methods' comparisons."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from genalign.evaluation.records import PromptRecord
from genalign.runtime.prompt_files import load_prompts
from scripts.benchmarks import method_comparisons
from scripts.benchmarks.method_comparisons import (
    CLAIMS,
    NOISE,
    Evaluations,
    arrival,
    arrivals,
    at_equal_cost,
    claim_differences,
    fell,
    from_start,
    held_evaluations,
    race,
    require_finalists,
    speed,
    split_rate,
)
from tests.packages import ROOT

COMPARE = ROOT / "scripts" / "configs" / "compare"


def _run(*scores: float) -> Evaluations:
    """Evaluations at the start and after each minute, with intervals of +-0.05."""
    return [[100 * i, 60.0 * i, score, score - 0.05, score + 0.05] for i, score in enumerate(scores)]


def _folder(run: Path, *scores: float, failed: bool = False) -> Path:
    """The folder of a run with a round and an evaluation each minute; the reward of a round is its score."""
    run.mkdir(parents=True)
    rows = [
        {
            "nfe": 100 * number,
            "machine": {"seconds": 60.0 * number},
            "reward": score,
            "held_out": {"strict": {"mean": score, "low": score - 0.05, "high": score + 0.05}},
        }
        for number, score in enumerate(scores, start=1)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if failed:
        (run / "error.json").write_text('{"error": "RewardError", "message": "stopped"}')
    return run


def test_a_run_arrives_between_two_evaluations() -> None:
    assert arrival(_run(0.2, 0.4, 0.6), 0.5) == pytest.approx(90)
    assert arrival(_run(0.2, 0.1, 0.1), 0.5) == float("inf")
    assert arrival(_run(0.6, 0.1), 0.5) == 0


def test_auto_is_timed_by_the_best_fixed_rate() -> None:
    """The target is 90 % of the gain from 0.2 to 0.5, the best end of all; a fixed rate needs 60 x 0.27 / 0.3 s."""
    auto = {"1": _run(0.2, 0.3, 0.4, 0.5), "2": _run(0.2, 0.5, 0.5, 0.5), "3": _run(0.2, 0.2, 0.2, 0.2)}
    fixed = {"fixed-1e-3": {"100": _run(0.2, 0.5)}, "fixed-1e-2": {"100": _run(0.2, 0.35, 0.5)}}
    table = arrivals({"nft": {"from-1e-3": auto, **fixed}, "prdp": {"from-1e-3": {"1": _run(0.2, 0.3)}, **fixed}})
    nft = table["nft"]
    assert (nft["start"], nft["best"], nft["best_rate"]) == (pytest.approx(0.2), 0.5, "fixed-1e-3")
    assert nft["target"] == pytest.approx(0.47)
    assert nft["fixed"] == pytest.approx(54) and nft["auto"] == pytest.approx(162) and nft["ratio"] == pytest.approx(3)
    assert table["prdp"]["auto"] is None and table["prdp"]["ratio"] is None  # not reached
    literal = nft["literal"]
    assert literal["target"] == pytest.approx(0.45) and literal["fixed"] == pytest.approx(50)
    assert literal["auto"] == pytest.approx(150)


def test_a_target_below_the_start_or_without_a_gain_has_defined_times() -> None:
    """With the best end at 0.53 of a start at 0.5, 90 % of it is reached at 0 s by all; the race is to 0.527."""
    rates = {"from-1e-3": {"1": _run(0.5, 0.53)}, "fixed-1e-3": {"100": _run(0.5, 0.52)}}
    one = arrivals({"dragon": rates})["dragon"]
    assert one["target"] == pytest.approx(0.527) and one["auto"] == pytest.approx(54)
    assert (one["fixed"], one["ratio"]) == (None, 0.0)  # no fixed rate arrives
    assert (one["literal"]["auto"], one["literal"]["fixed"], one["literal"]["ratio"]) == (0.0, 0.0, 1.0)
    nobody = arrivals({"prdp": {"from-1e-3": {"1": _run(0.5, 0.4)}, "fixed-1e-3": {"100": _run(0.5, 0.45)}}})["prdp"]
    assert {nobody[key] for key in ("target", "auto", "best_rate", "fixed", "ratio")} == {None}
    late = {"from-1e-3": {"1": _run(0.2, 0.6)}, "fixed-1e-3": {"100": _run(0.5, 0.5)}}
    assert race(late, 0.5)["ratio"] == float("inf")


def test_a_fall_is_told_from_the_noise_of_an_evaluation() -> None:
    assert NOISE == 0.03
    assert fell(_run(0.3, 0.4, 0.26)) and not fell(_run(0.3, 0.1, 0.28))


def test_standings_are_read_again_from_the_published_evaluations() -> None:
    equal = at_equal_cost({"a": {"1": _run(0.2, 0.4)}, "b": {"1": _run(0.2, 0.3)}})
    assert [one["name"] for one in equal["seconds"]["recipes"]] == ["a", "b"]
    assert json.loads(json.dumps(equal)) == equal


def test_a_failed_run_keeps_its_last_score_and_shortens_no_curve(tmp_path: Path) -> None:
    runs = {
        "a": {1: _folder(tmp_path / "a", 0.3, 0.4, 0.5, 0.6)},
        "b": {1: _folder(tmp_path / "b", 0.3, 0.1, failed=True)},
    }
    evaluations = held_evaluations(runs)
    assert evaluations["b"]["1"][-1][:3] == [400, 240.0, 0.1] and len(evaluations["a"]["1"]) == 4
    equal = at_equal_cost(evaluations)
    assert equal["seconds"]["budget"] == 240
    assert [one["score"]["mean"] for one in equal["nfe"]["recipes"]] == [0.6, 0.1]
    _folder(tmp_path / "c", failed=True)
    with pytest.raises(ValueError, match="c has no evaluation on held-out prompts: delete this folder"):
        held_evaluations({**runs, "c": {1: tmp_path / "c"}})


def test_the_speed_of_a_run_is_read_from_its_rounds(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    rows = [{"nfe": nfe, "machine": {"seconds": seconds}} for nfe, seconds in ((10, 2.0), (20, 8.0), (30, 12.0))]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert speed(run) == {"nfe_per_second": 2.5, "median_round_seconds": 4.0}


def test_claims_are_decided_by_pairs_on_held_out_compositions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the matching methods the one that stands highest on validation prompts is compared with Flow-GRPO."""

    def differences(name: str, metric: str, score: str, first: Mapping[int, Path], second: Mapping[int, Path]) -> Any:
        return [PromptRecord(name, metric, seed, "all", score, 0.0, 0.0, 1) for seed in first.keys() & second.keys()]

    monkeypatch.setattr(method_comparisons, "differences", differences)
    arms = ("flow_grpo", "dense_grpo", "dense_grpo_one_step", "prdp", "prdp_4", "nft", "awm", "dragon")
    runs: dict[str, dict[int, Path]] = {name: {1: Path(name)} for name in arms}
    runs["dense_grpo_one_step"] = {}  # all failed
    records = claim_differences(runs, ["guard_grpo", "awm", "nft", "flow_grpo", "dragon"])
    assert {record.name for record in records} == {
        "dense_grpo - flow_grpo",
        "prdp_4 - prdp",
        "awm - flow_grpo",
    }


def test_every_arm_of_a_claim_is_in_a_comparison() -> None:
    files = ("shapes_methods", "shapes_finalists", "shapes_finalists_20_steps")
    arms = {name for file in files for name in yaml.safe_load((COMPARE / f"{file}.yaml").read_text())["runs"]}
    assert {name for pair in (*CLAIMS, method_comparisons.MATCHING) for name in pair} <= arms


def test_finalists_wait_for_the_winners_of_stage_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = "matching_to_be_chosen and winner_to_be_chosen"
    monkeypatch.setattr(method_comparisons, "COMPARISONS", COMPARE)
    with pytest.raises(ValueError, match=rf"shapes_finalists\.yaml is a template: .* in place of {names}"):
        require_finalists()
    chosen = (COMPARE / "shapes_finalists.yaml").read_text().replace("matching_to_be_chosen", "awm")
    (tmp_path / "shapes_finalists.yaml").write_text(chosen.replace("winner_to_be_chosen", "guard_grpo"))
    monkeypatch.setattr(method_comparisons, "COMPARISONS", tmp_path)
    require_finalists()


@pytest.mark.parametrize(
    "name", ["shapes_learning_rates", "shapes_learning_rates_flow_grpo", "shapes_fixed_rates", "shapes_prompt_counts"]
)
def test_the_start_is_evaluated_on_the_samples_of_the_later_evaluations(name: str) -> None:
    comparison = yaml.safe_load((COMPARE / f"{name}.yaml").read_text())
    held_out = yaml.safe_load((COMPARE / comparison["base"]).read_text())["held_out"]
    for variant in comparison["variants"].values():
        own = variant["before_after"]
        assert own == {part: held_out[part] for part in ("prompts", "samples_per_task", "seeds")}


def test_prompt_counts_have_one_fixed_rate_that_no_schedule_lowers() -> None:
    comparison = yaml.safe_load((COMPARE / "shapes_prompt_counts.yaml").read_text())
    base = yaml.safe_load((COMPARE / comparison["base"]).read_text())["training"]
    assert [run["training"]["learning_rate"] for run in comparison["runs"].values()] == [3e-3, 3e-3]
    assert base.get("learning_rate_schedule", "constant") == "constant"
    assert all("learning_rate" not in variant.get("training", {}) for variant in comparison["variants"].values())


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


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of results; every run starts at 0.3, and after training its one prompt scores its last evaluation."""

    def started(run: Path) -> Evaluations:
        return [[0, 0.0, 0.3, 0.25, 0.35], *method_comparisons.held_out(run)]

    def after(run: Path) -> float:
        return method_comparisons.held_out(run)[-1][2]

    def arm_gains(name: str, metric: str, score: str, runs: Mapping[int, Path]) -> list[PromptRecord]:
        return [PromptRecord(name, metric, seed, "all", "a circle", 0.3, after(run), 1) for seed, run in runs.items()]

    monkeypatch.setattr(method_comparisons, "from_start", started)
    monkeypatch.setattr(method_comparisons, "arm_gains", arm_gains)
    monkeypatch.setattr(method_comparisons, "differences", lambda *named: [])
    monkeypatch.setattr(method_comparisons, "RESULTS", tmp_path)
    return tmp_path


def _trained(monkeypatch: pytest.MonkeyPatch, by_file: Mapping[str, Mapping[str, Mapping[int, Path]]]) -> None:
    def compared(folder: Path, name: str, allow_failed: bool = False) -> Mapping[str, Mapping[int, Path]]:
        assert allow_failed
        return by_file[name]

    monkeypatch.setattr(method_comparisons, "compared", compared)


def test_learning_rates_are_published_with_falls_and_speeds(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two methods one run falls and one fails above its start, which counts as a fall, too."""
    auto = {
        "nft-from-1e-3": {11: _folder(results / "a", 0.4, 0.5), 12: _folder(results / "b", 0.5, failed=True)},
        "prdp-from-1e-3": {11: _folder(results / "c", 0.4, 0.1), 12: _folder(results / "d", 0.2, 0.28)},
    }
    fixed = {
        "nft-fixed-1e-3": {100: _folder(results / "e", 0.4)},
        "prdp-fixed-1e-3": {100: _folder(results / "f", 0.4)},
    }
    files = {"shapes_learning_rates": auto, "shapes_learning_rates_flow_grpo": {}, "shapes_fixed_rates": fixed}
    _trained(monkeypatch, files)
    method_comparisons.learning_rates(results)
    result = json.loads((results / "learning_rates_shapes.json").read_text())
    assert {row["name"]: row["mean"] for row in result["rows"]} == pytest.approx(
        {"nft": 0.2, "nft.fell": 0.5, "prdp": -0.11, "prdp.fell": 0.5}
    )
    raw = [json.loads(line) for line in (results / "raw" / "learning_rates_shapes.jsonl").read_text().splitlines()]
    first = next(record for record in raw if record["name"] == "prdp" and record["seed"] == 11)
    assert (first["before"], first["after"], first["prompt"]) == (0.3, 0.1, "from-1e-3")
    assert result["arrivals"] == arrivals(result["evaluations"]) and result["arrivals"]["nft"]["ratio"] is not None
    assert result["failed"] == ["nft-from-1e-3/seed-12"]
    assert result["speed"]["prdp-fixed-1e-3"] == {"100": {"nfe_per_second": 100 / 60, "median_round_seconds": 60.0}}
    assert result["speed"].keys() == auto.keys() | fixed.keys()


def test_prompt_counts_are_published_by_their_last_evaluation(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best evaluation, 0.7, is not what a run is judged by; the reward is a mean of the last rounds."""
    runs = {"ddpo-1-prompt": {11: _folder(results / "a", 0.7, 0.1, 0.1, 0.1, 0.1, 0.2)}}
    _trained(monkeypatch, {"shapes_prompt_counts": runs})
    method_comparisons.prompt_counts(results)
    result = json.loads((results / "prompt_counts_shapes.json").read_text())
    assert {row["name"]: row["mean"] for row in result["rows"]} == pytest.approx(
        {"ddpo-1-prompt": -0.1, "ddpo-1-prompt.fell": 1.0, "ddpo-1-prompt.reward": 0.12 - 0.7}
    )
    assert result["speed"]["ddpo-1-prompt"]["11"]["median_round_seconds"] == 60

    # The prompts are drawn by tasks in turn, those of two objects and two colors first
    one, hundred = (load_prompts(results / "prompt_counts" / f"prompts-{count}.jsonl") for count in (1, 100))
    assert len(one) == 1 and one.prompts[0].task == "color_attr" and one.prompts[0] == hundred.prompts[0]
    sizes = {task: len(own) for task, own in hundred.by_task().items()}
    assert sum(sizes.values()) == len({prompt.text for prompt in hundred.prompts}) == 100
    assert len(sizes) == 6 and sizes["color_attr"] < 30


def test_methods_are_published_with_failed_runs_and_speeds(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = {
        "flow_grpo": {11: _folder(results / "a", 0.3, 0.5), 12: _folder(results / "b", 0.3, 0.4)},
        "ddpo": {11: _folder(results / "c", 0.3, 0.45), 12: _folder(results / "d", 0.1, failed=True)},
    }
    _trained(monkeypatch, {"shapes_methods": runs})
    (results / "methods").mkdir()
    (results / "methods" / "comparison.json").write_text("[]")
    method_comparisons.methods(results)
    result = json.loads((results / "methods_shapes.json").read_text())
    assert {row["name"]: row["mean"] for row in result["rows"]} == pytest.approx({"flow_grpo": 0.15, "ddpo": 0.15})
    assert result["failed"] == ["ddpo/seed-12"] and result["speed"]["ddpo"].keys() == {"11", "12"}
    assert result["equal"] == at_equal_cost(result["evaluations"])
    assert [one["score"]["mean"] for one in result["equal"]["seconds"]["recipes"]] == pytest.approx([0.45, 0.275])
