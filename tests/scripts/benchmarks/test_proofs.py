"""Parts of the proofs, from finished runs to result files: runs that are made up in place of trained ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from genalign.cli import parsing
from genalign.cli.demo import DEMOS
from genalign.cli.run_prompts import RunPrompts
from genalign.cli.train_settings import Train
from genalign.evaluation.records import PromptRecord
from genalign.metrics.intervals import Estimate
from genalign.training.reward_hacking import HackingReport, Signal, Status
from scripts.benchmarks import method_comparisons, proofs
from scripts.benchmarks.set_measures import LOOKS
from tests.packages import ROOT, folder_of

SEEDS = (1, 2)


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of results; an evaluation has one prompt, which gains 0.25."""

    def gains(name: str, metric: str, score: str, seed: int, run: Path) -> list[PromptRecord]:
        return [PromptRecord(name, metric, seed, "counting", "two circles", 0.25, 0.5, 4)]

    monkeypatch.setattr(proofs, "gains", gains)
    monkeypatch.setattr(proofs, "arm_gains", lambda *named: [r for s in SEEDS for r in gains(*named[:3], s, Path())])
    monkeypatch.setattr(proofs, "RESULTS", tmp_path)
    return tmp_path


def _trained(monkeypatch: pytest.MonkeyPatch, *names: str) -> list[bool]:
    """Give every comparison these finished runs; returns whether gradients were on when each was asked for."""
    grads: list[bool] = []

    def compared(folder: Path, name: str) -> dict[str, dict[int, Path]]:
        grads.append(torch.is_grad_enabled())
        return {own: {seed: folder / own / f"seed-{seed}" for seed in SEEDS} for own in names}

    monkeypatch.setattr(proofs, "compared", compared)
    return grads


def _reported(monkeypatch: pytest.MonkeyPatch, name: str, by_round: Sequence[Status]) -> None:
    """Give every run reports of one signal."""
    reports = [
        (number, HackingReport((Signal(name, 0.0, 0.0, Estimate(0.0, 0.0, 0.0, 2), status),)))
        for number, status in enumerate(by_round)
    ]
    monkeypatch.setattr(proofs, "hacking_reports", lambda run: reports)


def _rows(path: Path) -> dict[str, Any]:
    return {row["name"]: row["mean"] for row in json.loads(path.read_text())["rows"]}


def test_dragon_trains_with_gradients_and_measures_without(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grads = _trained(monkeypatch, *LOOKS)

    def set_records(name: str, metric: str, seed: int, run: Path, measure: str) -> list[PromptRecord]:
        assert not torch.is_grad_enabled() and measure == metric
        return [PromptRecord(name, metric, seed, "all", "the whole set", 1.0, 1.5, 4)]

    every = {metric: metric for looks in LOOKS.values() for metric in looks.values()}
    monkeypatch.setattr(proofs, "image_measures", lambda: every)
    monkeypatch.setattr(proofs, "set_records", set_records)
    monkeypatch.setattr(proofs, "wins_row", lambda name, target, runs, measures: {"name": name, "target": target})
    proofs.dragon(results)
    assert grads == [True, True]
    rows = _rows(results / "dragon_shapes.json")
    assert {"dragon_words", "dragon_words.distance", "dragon_rating.taste", "dragon_vendi.strict"} <= rows.keys()
    assert rows["dragon_vae_frechet.clip"] == 0.5 and rows["dragon_frechet.strict"] == 0.25
    targets = {
        row["name"]: row["target"] for row in json.loads((results / "dragon_shapes.json").read_text())["win_rates"]
    }
    assert targets["dragon_words"] == "less distance to words" and targets["dragon_vendi"] == "Vendi score"


def test_runs_without_an_alarm_are_published(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 14 rounds: one run with an alarm at 3 and no fall, and one with a fall at 5 and no alarm."""
    _trained(monkeypatch, "planted", "honest")
    _reported(monkeypatch, "saturation", ["green", "amber"])
    moments = {"seed-1": (3.0, 14.0), "seed-2": (14.0, 5.0)}
    monkeypatch.setattr(proofs, "alarm_and_fall", lambda run, score: moments[run.name])
    monkeypatch.setattr(proofs, "metrics", lambda run: [{}] * 14)
    proofs.hacking(results)
    rows = _rows(results / "hacking_shapes.json")
    assert rows["alarm_lead"] == (11 - 9) / 2
    assert (rows["planted_alarms"], rows["planted_falls"], rows["honest_alarms"]) == (0.5, 0.5, 1.0)


def test_only_a_red_drift_counts_beside_a_noise_hypernetwork(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _trained(monkeypatch, "static", "state", "prompt", "noise")
    monkeypatch.setattr(proofs, "gate_spread", lambda run: 0.25 if run.parent.name == "state" else 0.125)
    _reported(monkeypatch, "drift of features", ["green", "amber", "red", "red"])
    proofs.hypernetworks(results)
    rows = _rows(results / "hypernetworks_shapes.json")
    assert (rows["noise_red_drift"], rows["state.gates"], rows["prompt.gates"]) == (2.0, 0.25, 0.125)
    assert {"static", "noise.strict"} <= rows.keys() and "static.gates" not in rows
    _reported(monkeypatch, "saturation", ["red"])
    proofs.hypernetworks(results)
    assert _rows(results / "hypernetworks_shapes.json")["noise_red_drift"] == 0


def _demo_run(run: Path, world: str, seed: int) -> None:
    """What the rows of a demo are read from: two rounds of 20 s, the second 25 s later, in a run of six minutes."""
    run.mkdir(parents=True)
    arguments = ["--output", str(run), "--training.seed", str(seed)]
    shipped = str(folder_of("genalign") / "assets" / DEMOS[world])
    settings, plain = parsing.parse(Train, ["--config", shipped, *arguments], "train")
    rounds = {"rounds": 4}  # fitted to the time budget
    (run / "config.json").write_text(json.dumps({**plain, "training": plain["training"] | rounds}))
    (run / "prompts.json").write_text(json.dumps(RunPrompts.read(settings).as_dict()))
    times = {"started": {"date": "2026-12-01T10:00:00+00:00"}, "finished": "2026-12-01T10:06:00+00:00"}
    (run / "environment.json").write_text(json.dumps({"processes": 1, "run_format": 2, **times}))
    rows = [
        {"nfe": 100 * n, "machine": {"seconds": 20.0 * n, "time": f"2026-12-01T10:01:{25 * n:02}+00:00"}}
        for n in (1, 2)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "gain.json").write_text('{"newly_correct": {"pairs": 4, "share": 0.75}}')


def test_the_demo_is_published_by_seed_with_its_minutes_and_its_speed(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proofs, "require_base", lambda folder, model: None)
    trained: list[Path] = []

    def train(command: str, world: str, output: str, run: str, option: str, seed: str, *_: str) -> None:
        trained.append(Path(run))
        _demo_run(Path(run), world, int(seed))

    monkeypatch.setattr(proofs, "run_genalign", train)
    proofs.demo(results)
    assert trained == [results / "demo" / f"seed-{seed}" for seed in proofs.SEEDS]
    rows = _rows(results / "demo_shapes.json")
    assert {"demo", "demo.partial", "demo.counting"} <= rows.keys()
    assert [rows[f"demo.seed-{seed}"] for seed in proofs.SEEDS] == [0.25] * 3
    assert (rows["demo.content"], rows["demo.minutes"]) == (0.75, 6.0)
    assert rows["demo.training_minutes"] == pytest.approx((20 + 25) / 60)
    speed = json.loads((results / "demo_shapes.json").read_text())["speed"]["demo"]
    assert speed == {str(seed): {"nfe_per_second": 5.0, "median_round_seconds": 20.0} for seed in proofs.SEEDS}

    # Finished runs are not repeated, and those of other settings are refused
    proofs.demo(results)
    assert len(trained) == 3
    config = trained[1] / "config.json"
    config.write_text(config.read_text().replace('"rank": 16', '"rank": 8'))
    with pytest.raises(
        SystemExit, match=r"seed-12 was trained with other settings: lora.rank was 8 and is 16\. Delete"
    ):
        proofs.demo(results)


def test_finalists_are_refused_before_any_part_is_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []
    monkeypatch.setattr(proofs, "PARTS", {name: lambda work, name=name: ran.append(name) for name in proofs.PARTS})
    monkeypatch.setattr(method_comparisons, "COMPARISONS", ROOT / "scripts" / "configs" / "compare")
    monkeypatch.setattr("sys.argv", ["proofs.py"])
    with pytest.raises(SystemExit):
        proofs.main()
    assert ran == [] and "shapes_finalists.yaml is a template: run the part methods first" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["proofs.py", "methods", "demo"])
    proofs.main()
    assert ran == ["methods", "demo"]
