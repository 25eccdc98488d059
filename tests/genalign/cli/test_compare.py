"""Recipes side by side, from the command line on the tiny pipeline."""

from __future__ import annotations

import json
import math
import re
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from genalign.cli.compare import SOME_FAILED, Compare, OwnSettings, _standings, own_settings, run_settings
from genalign.cli.context import CommandContext
from genalign.cli.main import main
from genalign.cli.parsing import parse
from genalign.cli.train_settings import Train
from genalign.evaluation.compare_runs import summarize_recipes
from genalign.evaluation.evaluate import Evaluation, EvaluationProtocol, SampleRecord
from tests.genalign.training.toy_runs import write_config

COMPARE = """
output: {folder}/compared
base: base.json
seeds: [3, 4]
first_seed_only: [dense]
runs:
  flow: {{training: {{learning_rate: 1.0e-3}}}}
  dense:
    recipe: {{class_path: genalign.dense_grpo, init_args: {{window: 1}}}}
    rewards: {{own: {{function: {{class_path: rewards.shapes.ShapesReward, init_args: {{score: partial}}}}}}}}
"""


@pytest.fixture
def source(tiny_folder: Path, tmp_path: Path) -> Path:
    reward = {"class_path": "rewards.shapes.ShapesReward", "init_args": {"score": "partial"}}
    training = {"rounds": 50, "max_nfe": 60, "batch_size": 4, "updates_per_round": 1}
    held_out = {"prompts": "shapes:val", "every": 1, "samples_per_task": 1}
    sections = {"sampling": {"num_steps": 3, "sigmas": [1.0, 0.6, 0.3]}, "held_out": held_out}
    sections["before_after"] = {"prompts": "shapes:len", "samples_per_task": 2, "seeds": 1, "batch_size": 6}
    sections["rewards"] = {"partial": {"function": reward}}
    write_config(tmp_path / "base.json", tiny_folder, "", training, **sections)
    path = tmp_path / "compare.yaml"
    path.write_text(COMPARE.format(folder=tmp_path))
    return path


def test_a_comparison_is_written_and_resumed(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(source)]) == 0
    folder = tmp_path / "compared"
    output = capsys.readouterr().out
    assert f"run 3/3: flow, seed 4, {folder / 'flow' / 'seed-4'}" in output
    assert re.search(r"dense .*[+-]0\.\d+ \(", output) and "no verdict" in output and "2 prompts evaluated" in output
    assert re.search(r"The runs took \d+ to \d+ NFE \((not equal|equal within 5 %)\), and .* of training", output)
    recipes = {recipe["name"]: recipe for recipe in json.loads((folder / "comparison.json").read_text())}
    assert recipes["flow"]["seeds"] == 2 and recipes["dense"]["seeds"] == 1
    for recipe in recipes.values():
        assert recipe["low"] <= recipe["gain"] <= recipe["high"] and 60 <= recipe["nfe"] < 120
        assert set(recipe["scores"]) == {"strict", "partial", "relaxed"}  # the scores that both recipes have
        assert set(recipe["diversity"]) == {"color", "cell"}
    standings = json.loads((folder / "standings.json").read_text())
    for cost, words in (("nfe", "held-out strict at equal NFE ("), ("seconds", "at equal seconds of training (")):
        assert words in output
        assert [one["name"] for one in standings[cost]["recipes"]] == ["flow", "dense"]  # both score nothing
        assert standings[cost]["differences"][0]["words"].endswith("(no interval: it needs two seeds of each)")
    page = (folder / "comparison.html").read_text()
    assert "Held-out strict score at equal NFE" in page and "rise in the last quarter" in page
    assert "mean over seeds against minutes of training" in page
    assert "Samples from the same noise" in page and "Training reward against NFE" in page
    files = re.findall(r'href="([^"]*\.png)"', page)
    assert files and all((folder / file).is_file() for file in files)
    assert page.count("<figcaption>before</figcaption>") == page.count("<figcaption>dense</figcaption>") >= 1
    assert main(["report", str(folder)]) == 2
    refused = capsys.readouterr().err
    assert "holds a comparison of runs, not a run" in refused and str(folder / "comparison.html") in refused
    assert "flow" in page and "dense" in page and "http:" not in page and "https:" not in page
    written = (folder / "flow" / "seed-3" / "gain.json").stat().st_mtime_ns
    (folder / "flow" / "seed-4" / "gain.json").unlink()
    assert main(["compare", str(source)]) == 0
    assert (folder / "flow" / "seed-3" / "gain.json").stat().st_mtime_ns == written
    assert (folder / "flow" / "seed-4" / "gain.json").is_file()

    # A finished run of other settings is not taken for the requested one
    capsys.readouterr()
    source.write_text(source.read_text().replace("1.0e-3", "2.0e-3"))
    base = tmp_path / "base.json"
    base.write_text(base.read_text().replace('"max_nfe": 60', '"max_nfe": 80'))
    assert main(["compare", str(source)]) == 2
    flow, dense, other = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    changed = (
        "was trained with other settings: training.learning_rate was 0.001 and is 0.002; training.max_nfe was 60 and"
    )
    delete = "is 80. Delete this folder to train it again, or choose another --output"
    assert flow == f"error: {folder / 'flow' / 'seed-3'} {changed} {delete}"
    assert dense.endswith(f"seed-3 was trained with other settings: training.max_nfe was 60 and {delete}")
    assert other == f"error: {folder / 'flow' / 'seed-4'} {changed} {delete}"
    assert (folder / "flow" / "seed-3" / "gain.json").stat().st_mtime_ns == written


def test_a_run_that_stops_in_training_is_left_out_and_the_others_go_on(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewards = "rewards: {partial: {function: tests.genalign.training.toy_runs.constant}}"
    own = f"{{training: {{max_rounds_without_credit: 1}}, {rewards}}}"
    source.write_text(source.read_text().replace("{training: {learning_rate: 1.0e-3}}", own))
    assert main(["compare", str(source)]) == SOME_FAILED
    folder = tmp_path / "compared"
    failed = folder / "flow" / "seed-3"
    error = json.loads((failed / "error.json").read_text())
    assert error["error"] == "RewardError" and "for 1 rounds no sample had credit" in error["message"]
    assert [recipe["name"] for recipe in json.loads((folder / "comparison.json").read_text())] == ["dense"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith(f"failed, and not compared: {failed}: Training stopped at round 1: ")
    assert lines[-2].endswith("To train it from its start, delete this folder")
    assert lines[-1].startswith(f"failed, and not compared: {folder / 'flow' / 'seed-4'}: ")

    # It is not tried again before its folder is deleted, and counts as any run once it has been resumed to its end
    written = (failed / "environment.json").stat().st_mtime_ns
    assert main(["compare", str(source)]) == SOME_FAILED
    assert (failed / "environment.json").stat().st_mtime_ns == written
    assert main(["train", "--resume", str(failed), "--training.max_rounds_without_credit", "null"]) == 0
    shutil.rmtree(folder / "flow" / "seed-4")
    assert main(["compare", str(source)]) == SOME_FAILED
    recipes = {recipe["name"]: recipe for recipe in json.loads((folder / "comparison.json").read_text())}
    assert recipes["flow"]["seeds"] == 1 and (folder / "flow" / "seed-4" / "error.json").is_file()


def test_runs_without_held_out_scores_have_no_standings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"nfe": 9, "held_out": null}\n')
    assert _standings({"flow": {3: tmp_path}}, "strict") == []
    printed = capsys.readouterr().out
    assert printed.startswith("No standings at equal cost: ") and "set held_out.every_seconds (or every)" in printed


def test_recipes_without_a_common_score_are_refused(tmp_path: Path) -> None:
    protocol = EvaluationProtocol("p", "0", 1.0, (1.0,), "ODE()", "float32", 1, (64, 64), 1, 1, "none")
    for name in ("red", "blue"):
        for when in ("before", "after"):
            record = SampleRecord("a prompt", "all", 0, 0, "0.png", {name: 0.5})
            Evaluation(protocol, (record,)).save(tmp_path / name / when)
    with pytest.raises(ValueError, match="no score in common: give each a reward of the same name"):
        summarize_recipes({name: {0: tmp_path / name} for name in ("red", "blue")}, lambda _: {})


def test_samples_whose_score_failed_are_left_out(tmp_path: Path) -> None:
    protocol = EvaluationProtocol("p", "0", 1.0, (1.0,), "ODE()", "float32", 3, (64, 64), 1, 1, "none")
    red = {"before": (0.25, 0.5, 0.5), "after": (0.5, math.nan, 0.75)}
    for when, judged in {"before": (1.0, math.nan, math.nan), "after": (math.nan, 1.0, 1.0)}.items():
        rows = [
            SampleRecord(f"prompt {n}", "all", n, n, f"{n}.png", {"judged": first, "red": second})
            for n, (first, second) in enumerate(zip(judged, red[when], strict=True))
        ]
        Evaluation(protocol, tuple(rows)).save(tmp_path / when)
    (tmp_path / "metrics.jsonl").write_text('{"kl": 0.0, "nfe": 9, "machine": {"seconds": 60}}\n')
    (summary,) = summarize_recipes({"one": {0: tmp_path}}, lambda _: {})
    assert summary.scores == {"red": 0.25} and summary.prompts == 2  # no sample was judged twice


@pytest.mark.parametrize(
    ("setting", "values"),
    [
        ("training.max_nfe", "{training: {max_nfe: 80}}"),
        ("training.rounds", "{training: {rounds: 9}}"),
        ("max_seconds", "{max_seconds: 60}"),
        ("time_budget", "{time_budget: {training_minutes: 5}}"),
    ],
)
def test_unequal_budgets_are_refused_by_name(
    source: Path, tmp_path: Path, error: Callable[..., str], setting: str, values: str
) -> None:
    source.write_text(source.read_text().replace("{training: {learning_rate: 1.0e-3}}", values) + "  also: {}\n")
    message = error("compare", str(source))
    assert f"the runs have unequal budgets: of {setting}, flow has " in message and "dense, also have" in message
    assert "or set budgets: own" in message and not (tmp_path / "compared").exists()


def test_the_time_of_each_run_counts_from_its_own_start(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A budget of the whole command is one of each run, not of the comparison."""
    began: list[tuple[float, float]] = []

    def train(context: CommandContext, arguments: Sequence[str]) -> int:
        began.append((context.started, time.monotonic()))
        return len(began) == 2

    monkeypatch.setattr("genalign.cli.compare.train_command", train)
    with pytest.raises(SystemExit):
        main(["compare", str(source)])
    (_, first), (second, _) = began
    assert second >= first


def test_every_run_is_checked_before_the_first_is_trained(
    source: Path, tmp_path: Path, error: Callable[..., str]
) -> None:
    source.write_text(source.read_text().replace("learning_rate: 1.0e-3", "learning_rat: 1.0e-3"))
    message = error("compare", str(source))
    assert "run flow: " in message and "learning_rat" in message and not (tmp_path / "compared").exists()


def _parsed(*arguments: str) -> tuple[Compare, dict[str, Train]]:
    settings, plain = parse(Compare, arguments, "compare")
    runs = own_settings(plain).items()
    return settings, {name: run_settings(settings.base.absolute, name, own)[0] for name, own in runs}


def test_runs_of_their_own_budgets_have_no_standings(source: Path) -> None:
    text = source.read_text().replace("{training: {learning_rate: 1.0e-3}}", "{training: {max_nfe: 80}}")
    source.write_text(f"{text}budgets: own\n")
    settings, runs = _parsed("--config", str(source))
    settings.require_equal_budgets(runs)
    assert {name: run.training.max_nfe for name, run in runs.items()} == {"flow": 80, "dense": 60}


def test_import_paths_within_classes_stay_as_they_are_written(tmp_path: Path, source: Path) -> None:
    credit = {"class_path": "rewards.combine.EnsembleCredit", "init_args": {"pool": "rewards.combine.median"}}
    inner = {"recipe": {"class_path": "genalign.flow_grpo", "init_args": {"window": 1}}, "credit": credit}
    runs = {"median": {"recipe": {"class_path": "genalign.with_credit", "init_args": inner}}}
    (tmp_path / "runs.json").write_text(json.dumps({"runs": runs, "first_seed_only": []}))
    arguments = ["--config", str(source), "--config", str(tmp_path / "runs.json")]
    _, plain = parse(Compare, arguments, "compare")
    assert own_settings(plain) == runs
    _, wrong = parse(Compare, [*arguments, "--runs", '{"flow": 3}'], "compare")
    with pytest.raises(
        ValueError, match=r"runs\.flow must be a mapping of settings, as in \{training: \{rounds: 9\}\}"
    ):
        own_settings(wrong)


def test_every_run_is_trained_with_every_variant(source: Path, tmp_path: Path) -> None:
    (tmp_path / "tuning.yaml").write_text(
        """
output: tuned
seeds: [100]
variants:
  low: {max_seconds: 9, training: {learning_rate: 1.0e-4}}
  high: {training: {learning_rate: 1.0e-2}, recipe: {class_path: genalign.nft}}
"""
    )
    settings, runs = _parsed("--config", str(source), "--config", str(tmp_path / "tuning.yaml"))
    assert settings.jobs() == [(f"{run}-{name}", 100) for run in ("flow", "dense") for name in ("low", "high")]
    assert settings.output == "tuned"
    assert {name: run.training.learning_rate for name, run in runs.items()} == {
        **dict.fromkeys(("flow-low", "dense-low"), 1e-4),
        **dict.fromkeys(("flow-high", "dense-high"), 1e-2),
    }
    assert runs["dense-low"].recipe.completion and not runs["dense-high"].recipe.completion
    with pytest.raises(
        ValueError, match=r"of max_seconds, flow-low, dense-low have 9.*flow-high, dense-high have None"
    ):
        settings.require_equal_budgets(runs)


def test_only_the_named_runs_are_trained(source: Path) -> None:
    settings, runs = _parsed("--config", str(source), "--only", '["dense"]')
    assert {name for name, _ in settings.jobs()} == runs.keys() == {"dense"}


OUTSIDE = [({name: {}}, "cannot name a run's folder") for name in ("../x", "/x", "..", "a/b", "")]


@pytest.mark.parametrize(
    ("runs", "named", "message"),
    [
        *((runs, {}, message) for runs, message in OUTSIDE),
        ({}, {}, "at least one entry in runs and one in seeds"),
        ({"flow_grpo 2.0": {}}, {"first_seed_only": ["b"]}, "first_seed_only names b, which is not among the runs"),
        ({"flow_grpo": {}}, {"only": ["b", "flow_grpo"]}, "only names b, which is not among the runs"),
    ],
)
def test_impossible_comparisons(runs: dict[str, Any], named: dict[str, list[str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Compare("out", "base.yaml", {name: OwnSettings(own) for name, own in runs.items()}, [1], **named)
