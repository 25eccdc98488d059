"""What the proofs of learned rewards in use train, collect and compare, from runs that are made up."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from genalign.cli.collect import Collect
from genalign.cli.parsing import parse
from genalign.cli.reward_collect import RewardCollect
from genalign.evaluation.records import PromptRecord
from genalign.search.pruning import Prune
from scripts.benchmarks import put_to_use
from scripts.benchmarks.learned_rewards import SEEDS, SHAPES, BenchWorld, Proxy, Setting
from scripts.benchmarks.put_to_use import (
    FALLING,
    NOISY,
    TRAINING,
    TURNS,
    at_equal_distance,
    half_records,
    judged_turn,
    minutes_of,
    overrated_differences,
)

GAINS = {"verifier": 0.3, "single": 0.2, "ensemble": 0.25, "falling.single": -0.1, "falling.ensemble": 0.05}


def record(name: str, seed: int, before: float, after: float, prompt: str = "a") -> PromptRecord:
    return PromptRecord(name, "strict", seed, "colors", prompt, before, after, 4)


def gains_of(name: str, metric: str, score: str, runs: Mapping[int, Path]) -> list[PromptRecord]:
    """Two prompts of each run, of which one gains a little more."""
    gain = GAINS.get(name, 0.0)
    return [record(name, seed, 0.25, 0.25 + gain + more, str(more)) for seed in runs for more in (0.0, 0.01)]


def differences_of(
    name: str, metric: str, score: str, first: Mapping[int, Path], second: Mapping[int, Path]
) -> list[PromptRecord]:
    sides = [next(iter(runs.values())).parent.name.removeprefix("equal_nfe_") for runs in (first, second)]
    before, after = (GAINS.get(side, 0.0) for side in sides)
    return [record(name, seed, before, after) for seed in first]


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of results; finished runs gain what ``GAINS`` says."""
    monkeypatch.setattr(put_to_use, "arm_gains", gains_of)
    monkeypatch.setattr(put_to_use, "differences", differences_of)
    monkeypatch.setattr(put_to_use, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


def rows(path: Path) -> dict[str, float]:
    content = json.loads(path.read_text())
    means = {row["name"]: row["mean"] for row in content["rows"]}
    assert len(means) == len(content["rows"])
    return means


@pytest.mark.parametrize("world", ["shapes", "tones"])
def test_a_learned_reward_is_compared_with_half_of_the_verifier_and_a_falling_one_with_its_ensemble(
    world: str, results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: dict[str, tuple[str, str | None]] = {}

    def learned(work: Path, of: BenchWorld, proxy: Proxy, training: Path) -> dict[int, Setting]:
        assert training == TRAINING and (proxy.size, proxy.flips) in [(one.size, one.flips) for one in (NOISY, FALLING)]
        return {seed: {"class_path": "learned", "init_args": {"path": proxy.name}} for seed in SEEDS}

    def at_equal_nfe(work: Path, of: BenchWorld, name: str, own: dict[int, Setting], schedule: str) -> dict[int, Path]:
        assert of.name == world
        trained[name.removeprefix("equal_nfe_")] = (schedule, own[91]["init_args"].get("pool"))
        return {seed: work / name / f"seed-{seed}" for seed in own}

    monkeypatch.setattr(put_to_use, "learned", learned)
    monkeypatch.setattr(put_to_use, "at_equal_nfe", at_equal_nfe)
    monkeypatch.setattr(put_to_use, "minutes_of", lambda run, reward: {"training": 5.0})
    {"shapes": put_to_use.learned_rewards, "tones": put_to_use.learned_rewards_tones}[world](tmp_path)
    assert trained == {
        "verifier": ("linear", None),
        "single": ("linear", None),
        "ensemble": ("linear", "min"),
        "falling.single": ("constant", None),
        "falling.ensemble": ("constant", "min"),
    }
    means = rows(results / f"learned_rewards_{world}.json")
    assert means["half"] == pytest.approx(0.205 - 0.305 / 2)  # the prompts gain 0.005 more in the mean
    assert means["falling.single"] == pytest.approx(-0.095)
    assert means["falling.ensemble.difference"] == pytest.approx(0.15)
    assert means["ensemble.difference"] == pytest.approx(0.05)
    minutes = json.loads((results / f"learned_rewards_{world}.json").read_text())["minutes"]
    assert minutes == {name: {str(seed): {"training": 5.0} for seed in SEEDS} for name in GAINS}


def test_half_of_the_gain_is_taken_by_seed_and_prompt() -> None:
    verifier = [record("v", 1, 0.2, 0.6, "a"), record("v", 1, 0.5, 0.5, "b"), record("v", 2, 0.2, 0.4, "a")]
    single = [record("s", 2, 0.2, 0.5, "a"), record("s", 1, 0.5, 0.4, "b"), record("s", 1, 0.2, 0.5, "a")]
    half = {(one.seed, one.prompt): (one.before, one.after) for one in half_records(verifier, single)}
    assert half[1, "a"] == pytest.approx((0.2, 0.3)) and half[1, "b"] == pytest.approx((0.0, -0.1))
    assert half[2, "a"] == pytest.approx((0.1, 0.3)) and len(half) == 3


def test_minutes_are_of_training_evaluations_and_a_learned_reward(tmp_path: Path) -> None:
    run, reward = tmp_path / "run", tmp_path / "reward"
    (run / "before").mkdir(parents=True)
    reward.mkdir()
    (run / "before" / "cost.json").write_text('{"seconds": 15.0}')
    (run / "metrics.jsonl").write_text("".join(f'{{"machine": {{"seconds": {s}}}}}\n' for s in (30.0, 300.0)))
    (reward / "seconds.json").write_text('{"seconds": 90.0}')
    whole = {"training": 5.0, "evaluations": 0.5}
    assert minutes_of(run, SHAPES.score("partial")) == whole
    assert minutes_of(run, {"init_args": {"path": str(reward)}}) == {**whole, "reward": 1.5}


def test_found_samples_and_their_control_are_of_the_same_prompts(
    commands: list[tuple[str, ...]], tmp_path: Path
) -> None:
    reward = {"class_path": "rewards.learned.LearnedReward", "init_args": {"path": str(tmp_path / "reward")}}
    files = judged_turn(tmp_path, reward, turn=1, seed=91)
    sampled = [parse(Collect, command[1:], "collect")[0] for command in commands if command[0] == "collect"]
    assert [Path(one.output).name for one in sampled] == ["found", "plain", "other"]
    assert [type(one.strategy) for one in sampled] == [Prune, type(None), type(None)]
    assert len({one.prompts for one in sampled}) == 1 and len({one.seed for one in sampled}) == 3
    assert all(one.references and one.samples_per_prompt == 1 for one in sampled)
    assert sampled[0].budget.nfe == 160 and sampled[0].rewards["learned"].function.path == str(tmp_path / "reward")
    pairs = [parse(RewardCollect, command[2:], "reward collect")[0] for command in commands if "collect" in command[1:]]
    found, plain, other = (one.output for one in sampled)
    assert {Path(one.output).name: one.samples for one in pairs} == {
        "searched": [found, plain],
        "random": [plain, other],
    }
    assert files == {Path(one.output).name: Path(one.output) / "preferences.jsonl" for one in pairs}
    assert len({one.prompts for one in sampled}) == 1 and sum(command[1] == "label" for command in commands) == 2


def test_turns_of_the_loop_are_compared_with_the_start_and_with_as_many_random_pairs() -> None:
    truths = {"searched_0": 0.3, "searched_1": 0.4, "searched_2": 0.45, "searched_3": 0.6, "random_3": 0.35}
    best = {name: [record(name, seed, 0.2, truth) for seed in SEEDS] for name, truth in truths.items()}
    gains = {one.name: one.after - one.before for one in overrated_differences(best)}
    assert gains == {
        **{f"searched.turn_{turn}": pytest.approx(truths[f"searched_{turn}"] - 0.3) for turn in range(1, TURNS + 1)},
        "searched.over_random": pytest.approx(0.25),
    }


def test_runs_are_compared_at_the_largest_distance_that_both_reach() -> None:
    """The first reaches 4 and the second 3, where the first has passed its best; the order of rounds may go back."""
    first = {1: [[0.0, 0, 0.3, 0, 1], [2.0, 0, 0.5, 0, 1], [4.0, 0, 0.3, 0, 1]]}
    second = {1: [[0.0, 0, 0.3, 0, 1], [3.0, 0, 0.8, 0, 1], [1.0, 0, 0.4, 0, 1]]}
    (one,) = at_equal_distance("equal", first, second)
    assert one.seed == 1 and (one.before, one.after) == pytest.approx((0.4, 0.8))


def test_references_are_pruned_plain_or_none(commands: list[tuple[str, ...]], results: Path, tmp_path: Path) -> None:
    put_to_use.references(tmp_path)
    collected = [json.loads(Path(command[-1]).read_text()) for command in commands if command[0] == "collect"]
    assert ["strategy" in one for one in collected] == [False, True]
    assert len({one["prompts"] for one in collected}) == 1
    runs: dict[str, Any] = {}
    for command in commands:
        if command[0] == "train":
            settings = json.loads(Path(command[-1]).read_text())
            runs.setdefault(Path(settings["output"]).parent.name, []).append(settings)
    assert {name: len(own) for name, own in runs.items()} == {
        f"adv_grpo_{name}": 3 for name in ("verifier", "plain_references", "pruned_references")
    }
    folders = [
        own[0]["rewards"].get("real", {"function": None})["function"] for own in (runs[name] for name in sorted(runs))
    ]
    read = [one and one["init_args"]["references"]["init_args"]["folder"] for one in folders]
    assert read == [collected[0]["output"], collected[1]["output"], None]
    assert rows(results / "references_shapes.json").keys() >= {
        *("verifier", "plain_references", "pruned_references"),
        *("pruned_references.difference", "plain_references.difference", "pruning.difference"),
    }
