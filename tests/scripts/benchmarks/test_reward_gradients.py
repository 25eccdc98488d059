"""The measurements of the pathwise family, on made-up runs and a few samples."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from genalign.algorithms.tails import Chain, RenoisedCopies
from scripts.benchmarks import reward_gradients


def _run(monkeypatch: pytest.MonkeyPatch, curve: list[tuple[float, float]]) -> None:
    """Stand in for a run whose evaluations are (clip, partial), the first before training."""
    means = [{"clip": {"mean": clip}, "partial": {"mean": partial}} for clip, partial in curve]
    start = SimpleNamespace(overall={name: SimpleNamespace(**one) for name, one in means[0].items()})
    rows: list[dict[str, Any]] = [{"held_out": one} for one in means[1:]]
    monkeypatch.setattr(reward_gradients, "load_evaluation", lambda folder: start)
    monkeypatch.setattr(reward_gradients, "metrics", lambda run: [{"held_out": {}}, *rows])


def test_partial_credit_is_read_where_the_reward_has_risen(monkeypatch: pytest.MonkeyPatch) -> None:
    _run(monkeypatch, [(0.50, 0.6), (0.54, 0.58), (0.58, 0.50), (0.60, 0.2)])
    start, there = reward_gradients.at_rise(reward_gradients.looks(Path("run")))
    assert start == 0.6 and there == pytest.approx(0.56)  # a quarter of the way from 0.58 to 0.50


def test_a_run_that_never_rises_so_far_counts_by_its_last_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    _run(monkeypatch, [(0.50, 0.6), (0.54, 0.58), (0.51, 0.57)])
    assert reward_gradients.at_rise(reward_gradients.looks(Path("run"))) == (0.6, 0.57)


def test_an_adapter_at_half_weight_lies_between_the_base_model_and_itself(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    scores = {"before": (0.50, 0.6), "evaluation": (0.54, 0.58), "after": (0.58, 0.5)}

    def load(folder: Path) -> SimpleNamespace:
        named = zip(("clip", "partial"), scores[folder.name], strict=True)
        return SimpleNamespace(overall={name: SimpleNamespace(mean=mean) for name, mean in named})

    commands = list[tuple[str, ...]]()
    monkeypatch.setattr(reward_gradients, "load_evaluation", load)
    monkeypatch.setattr(reward_gradients, "run_genalign", lambda *arguments: commands.append(arguments))
    size = {"prompts": "shapes:val", "samples_per_task": 64, "seeds": 2, "batch_size": None}
    rewards = {"clip": {"function": "rewards.clip.ClipReward"}, "partial": {"weight": 0.0}}
    run = {"model": {"path": "m"}, "evaluation": {"num_steps": 10}, "rewards": rewards, "before_after": size}
    (tmp_path / "config.json").write_text(json.dumps(run))
    curve = reward_gradients.looks_by_weight(tmp_path, tmp_path / "half")
    assert curve == list(scores.values()) and reward_gradients.at_rise(curve)[1] == pytest.approx(0.56)
    mixed, evaluated = commands
    assert mixed[:5] == ("soup", "--adapters", json.dumps([str(tmp_path)]), "--weights", "[0.5]")
    assert evaluated[-2:] == ("--lora", mixed[-1])
    config = json.loads((tmp_path / "half" / "evaluation.json").read_text())
    assert config["rewards"].keys() == {"clip"} and config["seeds"] == 2 and config["samples_per_task"] == 64


@pytest.mark.slow
def test_the_gradient_grows_with_the_moves_that_it_runs_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward_gradients, "GROWTH_SAMPLES", 3)
    one, narrow = reward_gradients.gradients(Chain(), 1)
    assert reward_gradients.gradients(Chain(), 4)[0] > one > 0 < narrow
    assert reward_gradients.gradients(RenoisedCopies(2), 1)[1] > 0


@pytest.mark.slow
def test_memory_grows_with_the_moves_where_their_graphs_are_kept() -> None:
    few, many = map(reward_gradients.learning_memory, (2, 8))
    assert few < many < 1.5 * few < reward_gradients.memory_of_kept_graphs(8)
