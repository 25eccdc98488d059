"""What is read from the runs of the proofs: when the alarm came, how far gates move, and of which base they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
import torch
from torch import nn

from genalign import assets
from genalign.cli.compare import SOME_FAILED
from genalign.diffusion.hypernetwork import Hypernetwork, hypernetwork_of
from genalign.diffusion.policy import Lora, Policy
from genalign.metrics.intervals import Estimate
from genalign.training.reward_hacking import HackingReport, Signal, Status
from genalign.types import Prompt
from pipelines import SD3
from scripts.benchmarks import trained_runs
from scripts.benchmarks.trained_runs import alarm_and_fall, compared, finished, spread_of_gates, stopped


def _run(monkeypatch: pytest.MonkeyPatch, strict: Sequence[float], statuses: Sequence[Status]) -> None:
    """A run of as many rounds, which began at a strict accuracy of 0.5."""
    base = SimpleNamespace(overall={"strict": SimpleNamespace(mean=0.5)})
    rows = [
        {
            "round": number,
            "held_out": {"strict": {"mean": score}},
            "reward_hacking": HackingReport((Signal("saturation", 0.0, 0.0, Estimate(0, 0, 0, 2), status),)).as_list(),
        }
        for number, (score, status) in enumerate(zip(strict, statuses, strict=True))
    ]
    monkeypatch.setattr(trained_runs, "load_evaluation", lambda folder: base)
    monkeypatch.setattr(trained_runs, "metrics", lambda run: rows)


def test_the_first_alarm_and_the_first_fall(monkeypatch: pytest.MonkeyPatch) -> None:
    _run(monkeypatch, [0.5, 0.46, 0.45, 0.4], ["green", "amber", "red", "red"])
    assert alarm_and_fall(Path("run"), "strict") == (1, 2)


def test_what_does_not_come_counts_as_one_past_the_last_round(monkeypatch: pytest.MonkeyPatch) -> None:
    _run(monkeypatch, [0.5, 0.4, 0.4], ["green", "green", "green"])
    assert alarm_and_fall(Path("run"), "strict") == (3, 1)
    _run(monkeypatch, [0.5, 0.5, 0.6], ["amber", "green", "green"])
    assert alarm_and_fall(Path("run"), "strict") == (0, 3)


def test_runs_of_another_base_are_refused(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[tuple[str, ...]] = []
    monkeypatch.setattr(trained_runs, "run_genalign", lambda *arguments, **_: commands.append(arguments))
    run = tmp_path / "dragon" / "frechet" / "seed-31"
    assert compared(tmp_path / "dragon", "shapes_dragon")["frechet"][31] == run
    run.mkdir(parents=True)
    compared(tmp_path / "dragon", "shapes_dragon")
    monkeypatch.setattr(assets, "resolve", lambda name: str(tiny_folder))
    with pytest.raises(SystemExit, match="dragon was made with other weights of shapes-sd3"):
        compared(tmp_path / "dragon", "shapes_dragon")
    assert len(commands) == 2


def test_only_the_runs_that_a_comparison_names_are_read_and_failed_ones_where_they_are_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runs of each arm with each variant, and of arms of one seed the first, whatever else is in the folder."""
    (tmp_path / "one.yaml").write_text(
        "output: out\nbase: base.yaml\nseeds: [9, 10]\nruns: {b: {}, a: {}}\nfirst_seed_only: [b]\nvariants: {x: {}}\n"
    )
    (tmp_path / "base.yaml").write_text("model: {path: shapes-sd3}\n")
    folder = tmp_path / "runs"
    (folder / "replaced" / "seed-9").mkdir(parents=True)
    monkeypatch.setattr(trained_runs, "COMPARISONS", tmp_path)
    monkeypatch.setattr(trained_runs, "require_base", lambda folder, model: None)
    monkeypatch.setattr(trained_runs, "genalign", lambda arguments: SOME_FAILED)
    assert compared(folder, "one", allow_failed=True) == {
        "a-x": {9: folder / "a-x" / "seed-9", 10: folder / "a-x" / "seed-10"},
        "b-x": {9: folder / "b-x" / "seed-9"},
    }
    with pytest.raises(SystemExit, match=f"ended with status {SOME_FAILED}"):
        compared(folder, "one")


def test_runs_that_stopped_are_named_and_left_out(tmp_path: Path) -> None:
    runs = {arm: {seed: tmp_path / arm / str(seed) for seed in (1, 2)} for arm in ("a", "b")}
    for folder in (runs["a"][2], *runs["b"].values()):
        folder.mkdir(parents=True)
        (folder / "error.json").write_text("{}")
    assert finished(runs) == {"a": {1: tmp_path / "a" / "1"}, "b": {}}
    assert stopped(runs) == ["a/seed-2", "b/seed-1", "b/seed-2"]


@pytest.mark.parametrize("condition_on", ["state", "prompt"])
def test_gates_of_a_new_adapter_do_not_move(small: SD3, condition_on: Literal["state", "prompt"]) -> None:
    Policy(small.denoiser, Lora(2, 4, hypernetwork=Hypernetwork(condition_on)))
    prompts = [Prompt("a red circle"), Prompt("two blue squares")]
    assert spread_of_gates(small, prompts) == 0
    gates = hypernetwork_of(small.denoiser)
    assert gates is not None
    nn.init.normal_(gates.gates.weight, generator=torch.Generator().manual_seed(0))
    moved = spread_of_gates(small, prompts)
    assert moved > 0.01
    alone = spread_of_gates(small, prompts[:1])
    assert (alone > 0.01) == (condition_on == "state")  # of one prompt only steps differ


def test_a_model_without_gates_is_refused(small: SD3) -> None:
    with pytest.raises(ValueError, match="the model has no gates: load a LoRA with a hypernetwork"):
        spread_of_gates(small, [Prompt("a red circle")])
