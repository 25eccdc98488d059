"""Pairs, rewards and runs of the proofs of learned rewards, by the commands that they ask for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from genalign import assets
from genalign.algorithms.matching_losses import NFTLoss
from genalign.cli.context import named_rewards
from genalign.cli.main import command_context, main
from genalign.cli.parsing import parse
from genalign.cli.resume import train_request
from genalign.cli.reward_train import RewardTrain
from genalign.cli.train_settings import Train
from genalign.reward_learning.label_noise import Smoothing
from genalign.reward_learning.regularizers import Centering
from genalign.runtime.prompt_files import load_prompts
from genalign.training.best_weights import BestRound, deciding_weights
from scripts.benchmarks import learned_rewards
from scripts.benchmarks.learned_rewards import (
    MAX_NFE,
    PLAIN,
    SHAPES,
    SMOOTHED,
    TONES,
    VAL_PAIRS,
    BenchWorld,
    annotator,
    at_equal_nfe,
    drawn_pairs,
    judged_pairs,
    optimized,
    pooled,
    trained_reward,
)
from scripts.benchmarks.overoptimization import curve
from tests.rewards.tiny_clap import write_clap

Commands = list[tuple[str, ...]]


def parsed(command: Sequence[str]) -> Train:
    """The settings of a command that trains or resumes a run."""
    arguments, resume = train_request(command[1:])
    assert command[0] == "train" and resume
    settings: Train = parse(Train, arguments, "train")[0]
    return settings


def reward_at(folder: Path) -> dict[str, object]:
    return {"class_path": "rewards.learned.LearnedReward", "init_args": {"path": str(folder)}}


@pytest.mark.parametrize("world", [SHAPES, TONES], ids=lambda world: world.name)
def test_the_reward_that_is_optimized_is_measured_and_chooses_the_weights(
    world: BenchWorld, commands: Commands, tmp_path: Path
) -> None:
    optimized(tmp_path, world, "one", {91: reward_at(tmp_path / "reward")})
    settings = parsed(commands[0])
    assert settings.held_out.is_on and settings.held_out.prompts == f"{world.name}:val"
    scorers = command_context(0.0).scorers_for(settings.held_out.prompts, settings.held_out.scorers)
    assert {"strict", "learned"} <= scorers.keys() and scorers["learned"] == settings.rewards["learned"].function
    assert deciding_weights(list(scorers), named_rewards(settings.rewards)) == {"learned": 1.0}
    training = settings.training
    assert (training.max_nfe, settings.max_seconds, training.seed) == (MAX_NFE, None, 91)
    assert training.learning_rate == "auto" and training.learning_rate_schedule == "constant"
    assert isinstance(getattr(settings.recipe.objective, "loss", None), NFTLoss) == (world is TONES)


def test_another_reward_may_be_scored_in_place_of_the_optimized_one(commands: Commands, tmp_path: Path) -> None:
    raw = reward_at(tmp_path / "raw")
    shaped = {"class_path": "rewards.shaped.Ceiling", "init_args": {"reward": raw, "limit": 1.0}}
    optimized(tmp_path, SHAPES, "one", {91: shaped}, scorers={91: raw})
    settings = parsed(commands[0])
    assert settings.held_out.scorers["learned"] == vars(settings.rewards["learned"].function)["reward"]


def test_runs_at_equal_nfe_take_the_newest_weights_and_finished_ones_are_not_trained_again(
    commands: Commands, tmp_path: Path
) -> None:
    rewards = {seed: SHAPES.score("partial") for seed in (91, 92)}
    runs = at_equal_nfe(tmp_path, SHAPES, "one", rewards, "constant")
    settings = parsed(commands[1])
    assert not settings.held_out.is_on and settings.output == str(runs[92])
    assert settings.training.max_nfe == 100_000 and settings.training.learning_rate_schedule == "constant"
    for run in runs.values():
        run.mkdir(parents=True)
        (run / "gain.json").write_text("{}")
    assert at_equal_nfe(tmp_path, SHAPES, "one", rewards, "constant") == runs and len(commands) == 2


def test_an_optimized_run_has_a_curve_and_resumes(
    tmp_path: Path, tiny_folder: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One round of a tiny model, asked for twice: the second time nothing is left to train."""
    tiny = {
        "model": {"path": str(tiny_folder)},
        "training": {"rounds": 1, "prompts_per_round": 2, "group_size": 4, "batch_size": 8},
        "lora": {"rank": 2, "alpha": 2},
        "held_out": {"samples_per_task": 2},
        "before_after": None,
    }
    (tmp_path / "tiny.json").write_text(json.dumps(tiny))
    ends: list[int] = []

    def run(*arguments: str) -> None:
        ends.append(main([*arguments, "--config", str(tmp_path / "tiny.json")]))

    monkeypatch.setattr(learned_rewards, "run_genalign", run)
    for _ in range(2):
        runs = optimized(tmp_path, SHAPES, "one", {91: SHAPES.score("partial")})
    assert ends == [0, 0]
    best = BestRound.read(runs[91] / "lora")
    ((distance, reward, *truth),) = curve(runs[91])
    assert best is not None and best.score == "learned" and best.estimate.mean == reward
    assert distance == 0 and len(truth) == 3  # the first round is measured before its updates


@pytest.mark.parametrize(("world", "suite"), [(SHAPES, "train"), (SHAPES, "val"), (TONES, "train")])
def test_all_tasks_have_as_many_pairs(world: BenchWorld, suite: str, commands: Commands, tmp_path: Path) -> None:
    folder, tasks = judged_pairs(tmp_path, world, suite), world.prompts(suite).by_task()
    assert judged_pairs(tmp_path, world, suite) == folder and len(commands) == 2 * len(tasks)  # collected once
    share, flips = (world.pairs if suite == "train" else VAL_PAIRS) / len(tasks), set[str]()
    for task, prompts in tasks.items():
        collect, label = (json.loads((folder / f"{task}-{kind}.json").read_text()) for kind in ("collect", "label"))
        listed = load_prompts(collect["prompts"]).prompts
        assert {prompt.task for prompt in listed} == {task} and set(listed) <= set(prompts)
        assert len(listed) == (len(prompts) if suite == "train" else min(len(prompts), 10))
        comparisons, pairs = collect["comparisons_per_prompt"], 6 * len(listed)  # pairs of one comparison of each
        assert comparisons * pairs >= share and (comparisons == 1 or (comparisons - 1) * pairs < share)
        flips |= set(label["by"]["init_args"]["annotators"])
    assert flips == {annotator(share) for share in (world.flips if suite == "train" else (0.0,))}
    if world is TONES:
        assert json.loads((folder / "attribution-collect.json").read_text())["comparisons_per_prompt"] == 1


def test_pairs_come_from_the_tasks_in_turn_and_fewer_are_the_first_of_more(tmp_path: Path) -> None:
    for task, count in {"colors": 20, "counting": 3}.items():
        judgments = [{"prompt": f"{task} {number}", "annotator": annotator(0.1)} for number in range(count)]
        judgments.append({"prompt": "another", "annotator": annotator(0.0)})
        sampled = [{**one, "samples": [{"file": "images/0.png"}], "metadata": {"tag": task}} for one in judgments]
        (tmp_path / task).mkdir()
        (tmp_path / task / "preferences.jsonl").write_text("".join(json.dumps(one) + "\n" for one in sampled))
    few, many = (drawn_pairs(tmp_path, size, 0.1, seed=3) for size in (5, 12))
    assert many[:5] == few and drawn_pairs(tmp_path, 5, 0.1, seed=4) != few
    read = [json.loads(line) for line in many]
    tasks = [one["metadata"]["subset"] for one in read]
    assert tasks == ["colors", "counting"] * 3 + ["colors"] * 6 and len({one["prompt"] for one in read}) == 12
    assert all(one["samples"] == [{"file": f"{task}/images/0.png"}] for one, task in zip(read, tasks, strict=True))
    with pytest.raises(ValueError, match="has 23 pairs, not 24"):
        drawn_pairs(tmp_path, 24, 0.1, seed=3)


def test_single_rewards_are_centered_as_ensembles_are(
    commands: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clap, resolve = write_clap(tmp_path / "clap"), assets.resolve
    monkeypatch.setattr(assets, "resolve", lambda name: str(clap) if name == "tones-clap" else resolve(name))
    pairs = [tmp_path / "pairs.jsonl"]
    single = trained_reward(tmp_path, SHAPES, "one", 91, pairs)
    trained_reward(tmp_path, TONES, "one", 92, pairs, members=4, training=SMOOTHED)
    plain, smoothed = (parse(RewardTrain, command[2:], "reward train")[0] for command in commands)
    assert plain.objective.regularizers == smoothed.objective.regularizers == (Centering(0.01),)
    assert (plain.fit.members, plain.fit.seed, plain.label_noise) == (1, 91, None)
    assert (smoothed.fit.members, smoothed.fit.seed, smoothed.label_noise) == (4, 92, Smoothing(0.1))
    assert single == reward_at(Path(plain.output)) and Path(plain.output).parts[-3:] == (PLAIN.stem, "one", "seed-91")
    assert smoothed.preferences == [str(pairs[0])]
    assert pooled({91: single}, "min")[91]["init_args"] == {"path": plain.output, "pool": "min"}
    trained_reward(tmp_path, SHAPES, "one", 91, pairs)
    assert len(commands) == 2 and json.loads((Path(plain.output) / "seconds.json").read_text())["seconds"] >= 0
