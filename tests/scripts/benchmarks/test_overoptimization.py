"""Tests of what is read off the runs on learned rewards, and of the references of a guard."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from genalign.cli.parsing import parse
from genalign.cli.reward_references import RewardReferences
from genalign.cli.run_prompts import RunPrompts
from genalign.cli.train_settings import Train
from scripts.benchmarks.learned_rewards import SEEDS, SHAPES
from scripts.benchmarks.overoptimization import (
    GUARDS,
    UNGUARDED,
    Curve,
    best_of_n_records,
    curve,
    guarded,
    predictors,
    stopped_early,
    turns,
)


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


def test_a_curve_has_the_mean_distance_of_the_rounds_before_each_evaluation(tmp_path: Path) -> None:
    held_out = {"learned": {"mean": 2.0}, "strict": {"mean": 0.4, "low": 0.3, "high": 0.5}}
    kls = [0.0, 4.0, None, 14.0, 1.0]  # of five rounds, of which the first, the fourth and the last are evaluated
    rows = [{"kl": kl, "held_out": held_out if number in (0, 3, 4) else None} for number, kl in enumerate(kls)]
    rows.append({"kl": None, "held_out": held_out})  # what was not measured since leaves the distance as it was
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert curve(tmp_path) == [[distance, 2.0, 0.4, 0.3, 0.5] for distance in (0.0, 3.0, 1.0, 1.0)]


def curves_of(truths: dict[int, dict[float, float]]) -> dict[int, Curve]:
    """The curves of seeds with these truths at these distances."""
    return {
        seed: [[distance, 0.0, truth, 0.0, 1.0] for distance, truth in points.items()]
        for seed, points in truths.items()
    }


TRUTHS: dict[int, dict[float, float]] = {  # highest at 1, 2 and 4
    1: {0: 0.3, 1: 0.5, 2: 0.4, 3.5: 0.2},
    2: {0: 0.3, 1: 0.4, 2: 0.6, 3: 0.5},
    3: {2: 0.3, 4: 0.7},
}


def test_a_run_stops_before_the_distance_at_which_the_others_are_at_their_best() -> None:
    """The others of the first run are at their best at 2 and 4, of the second at 1 and 4, of the third at 1 and 2."""
    curves = curves_of(TRUTHS)
    stopped = stopped_early(curves)
    assert stopped == {1: curves[1][:3], 2: curves[2][:3], 3: curves[3][:1]}  # at most 3, 2.5, and 1.5


def test_turns_and_losses_are_not_read_off_the_noise_of_a_run_itself() -> None:
    later = {seed: {2 * distance: truth for distance, truth in points.items()} for seed, points in TRUTHS.items()}
    arms = {UNGUARDED.name: TRUTHS, "dragon": TRUTHS, **dict.fromkeys(GUARDS, later)}
    records = turns({name: curves_of(truths) for name, truths in arms.items()})
    gains = {(one.name, one.seed): one.after - one.before for one in records}
    assert len(gains) == len(records) == 3 * (2 * len(arms) + len(GUARDS) + 1)
    lost = [gains[f"{UNGUARDED.name}.lost", seed] for seed in (1, 2, 3)]
    assert lost == pytest.approx([0.4 - 0.2, 0.6 - 0.5, 0.3 - 0.7])  # a run that rises on loses less than nothing
    assert [gains["early_stop.difference", seed] for seed in (1, 2, 3)] == pytest.approx(lost)
    assert [gains["par.turn", seed] for seed in (1, 2, 3)] == [2, 4, 8]
    assert [gains["par.turn_difference", seed] for seed in (1, 2, 3)] == [1, 2, 4]
    metrics = {one.name: one.metric for one in records}
    assert metrics["dragon.turn"] != metrics["par.turn"] and len(set(metrics)) == len(gains) / 3


def test_the_best_of_n_is_of_the_pool_by_prompt(tmp_path: Path) -> None:
    """The best of four is right; of three, two score alike at the top, of which one is right."""
    colors, counting = (SHAPES.prompts("comp").by_task()[task][0] for task in ("colors", "counting"))
    samples = {colors: [(1, 0), (2, 1), (3, 0), (4, 1)], counting: [(1, 1), (3, 1), (3, 0)]}
    lines: list[list[str | float]] = [["reward", "", "a prompt of val", "d", 9.0]]
    for prompt, scored in samples.items():
        for number, (score, truth) in enumerate(scored):
            lines.append(["reward", "", prompt, str(number), score])
            lines.append(["reward", "noise", prompt, str(number), -score])
            lines.append(["truth", "", prompt, str(number), truth])
    (tmp_path / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    records = best_of_n_records("one", {91: tmp_path})
    assert [(one.seed, one.task, one.prompt, one.n) for one in records] == [
        (91, "colors", colors, 4),
        (91, "counting", counting, 3),
    ]
    assert [one.before for one in records] == pytest.approx([1 / 2, 2 / 3])
    assert [one.after for one in records] == pytest.approx([1.0, 1 / 2])


def test_references_of_a_guard_are_of_all_prompts_of_its_runs_and_its_weights_are_chosen_by_the_reward_within(
    commands: list[tuple[str, ...]], tmp_path: Path
) -> None:
    reward = {"class_path": "rewards.learned.LearnedReward", "init_args": {"path": str(tmp_path / "reward")}}
    guarded(tmp_path, "par", {UNGUARDED.name: dict.fromkeys(SEEDS, reward)})
    assert [command[:2] for command in commands] == [("reward", "references")] * 3 + [("train", "--resume")] * 3
    references = parse(RewardReferences, commands[0][2:], "reward references")[0]
    run = parse(Train, commands[3][2:], "train")[0]
    assert RunPrompts.read(references).texts() == RunPrompts.read(run).texts()
    assert run.rewards["learned"].function.references == references.output
    assert run.held_out.scorers["learned"] == run.rewards["learned"].function.reward
    assert references.rewards["learned"].function == run.held_out.scorers["learned"]
