"""The table of searches at equal cost, on the tiny pipeline."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from genalign.evaluation.records import PromptRecord, mean
from genalign.types import Prompt
from pipelines import SD3
from scripts.benchmarks import steering_table
from scripts.benchmarks.published_results import read_records, result_rows
from scripts.benchmarks.results_tables import fill
from scripts.benchmarks.steering_table import ARMS, GRADIENTS, TOLERANCE, Bench, batches, sizes_of_prompts
from tests.genalign.search.tiny_searches import redness

SECONDS = {"nfe": 0.02, "decode": 0.03, "reward/clip": 0.014, "reward/partial": 0.01}
SECONDS |= {f"{call} backward": 1.5 * SECONDS[call] for call in ("nfe", "decode", "reward/clip")}


def black(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """A reward that takes no gradient, as a verifier does."""
    return torch.from_numpy(-samples.flatten(1).mean(1).cpu().numpy())


@pytest.fixture
def bench(small: SD3, tmp_path: Path) -> Bench:
    """Three prompts to report and two to choose on, at prices that were measured."""
    work = tmp_path / "work"
    work.mkdir()
    (work / "prices.json").write_text(json.dumps({"seconds": SECONDS, "spreads": {"clip": 0.01, "partial": 0.02}}))
    rewards = {
        "clip": redness,
        "partial": black,
        "strict": lambda samples, prompts: (redness(samples, prompts) > 0).float(),
    }
    names = ["a", "b", "c", "d", "e"]
    prompts = [Prompt(f"{name} circle", {"tag": f"task-{place % 2}"}) for place, name in enumerate(names)]
    return Bench(work, small, rewards, prompts[:2], prompts[2:])


@pytest.mark.parametrize("arm", ARMS)
def test_all_arms_cost_the_same_within_the_tolerance(bench: Bench, arm: str) -> None:
    within, settings = [], list(ARMS[arm].settings)
    for setting in settings[:1] if arm in GRADIENTS else settings:  # their settings cost the same
        cost = functools.partial(bench.cost, "clip", arm, setting)
        for budget in steering_table.BUDGETS:
            limit = budget * bench.prices.sample("clip")
            if cost(1) <= limit:
                sizes = sizes_of_prompts(cost, limit, steering_table.PROMPTS)
                assert limit * (1 - TOLERANCE) <= mean(map(cost, sizes)) <= limit * (1 + 1e-6), (setting, budget)
                within.append(budget)
    assert set(within) == set(steering_table.BUDGETS)


def test_every_method_is_tuned_by_three_settings() -> None:
    assert {name: len(arm.settings) for name, arm in ARMS.items() if len(arm.settings) != 3} == {"best_of_n": 1}


@pytest.mark.parametrize(("reward", "arm"), [*(("clip", arm) for arm in ARMS), ("partial", "doob")])
def test_every_arm_runs_and_costs_what_was_counted(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, reward: str, arm: str
) -> None:
    monkeypatch.setattr(steering_table, "STEPS", 5)
    setting = next(iter(ARMS[arm].settings))
    rows = bench.unit(arm, reward, setting, 8, 11)
    assert [row["prompt"] for row in rows] == ["c circle", "d circle", "e circle"]
    for row in rows:
        assert row["nfe"] == pytest.approx(bench.cost(reward, arm, setting, row["size"]))
    assert mean(row["nfe"] for row in rows) <= 8 * bench.prices.sample(reward) * (1 + 1e-6)


def test_sizes_spend_the_budget_on_average() -> None:
    assert sizes_of_prompts(lambda size: 3.0 * size - 2.0, 8.0, 6) == [4, 4, 3, 3, 3, 3]  # 10 + 10 + 4 * 7 = 6 * 8
    assert sizes_of_prompts(float, 8.0, 3) == [8, 8, 8]
    assert sizes_of_prompts(lambda size: 7.0 * size, 8.0, 3) == [1, 1, 1]
    with pytest.raises(ValueError, match="a size of 1 costs 9 NFE for each prompt, but the budget is 8"):
        sizes_of_prompts(lambda size: 9.0 * size, 8.0, 3)


def test_batches_have_one_size_and_common_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steering_table, "BATCH", 4)
    assert list(batches([2] * 10)) == [(0, 4), (4, 8), (8, 10)]
    assert list(batches([2] * 6 + [1] * 4)) == [(0, 4), (4, 6), (6, 8), (8, 10)]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Three arms, few steps, two seeds and small budgets."""
    arms = ("best_of_n", "zero_order", "reno")
    searched = {"clip": arms, "partial": arms[:2]}
    for key, value in {"SEARCHED": searched, "STEPS": 2, "BUDGETS": (2, 4), "SEEDS": (1, 2), "BATCH": 2}.items():
        monkeypatch.setattr(steering_table, key, value)
    yield


@pytest.mark.usefixtures("few")
def test_the_table_is_made_resumed_and_recomputed(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for part in (steering_table.prices, steering_table.tune, steering_table.measure):
        part(bench)
    printed = capsys.readouterr().out
    assert "tune and measure take about 0.0 hours" in printed
    assert "clip: zero_order, budget 2: no settings are within the budget" in printed
    # everything is on disk: an interrupted part goes on, and a finished one searches nothing
    unit = next((bench.work / "measure").rglob("ode-budget-4-seed-2.json"))
    rows = json.loads(unit.read_text())
    unit.unlink()
    steering_table.measure(bench)
    again = json.loads(unit.read_text())
    assert [row["scores"] for row in again] == [row["scores"] for row in rows]
    monkeypatch.setattr(Bench, "_rows", None)
    steering_table.publish(bench, tmp_path / "results")

    published = json.loads((tmp_path / "results" / "steering_shapes.json").read_text())
    records = read_records(tmp_path / "results" / "raw" / "steering_shapes.jsonl")
    recomputed = {row.name: row.mean for row in result_rows(records)}
    assert {row["name"]: row["mean"] for row in published["rows"]} == pytest.approx(recomputed)
    assert {"clip.reno.at_4", "clip.reno.at_4.strict", "partial.zero_order.at_4.clip"} <= recomputed.keys()
    for row in published["steering"]:
        assert row["scores"] == pytest.approx(steering_table.level_of(records, row)["scores"])
        assert row["share"] <= 1 + 1e-6 and row["priced_seconds"] > 0
    best = {
        row["budget"]: row["scores"]["clip"]
        for row in published["steering"]
        if "best" in row["arm"] and row["reward"] == "clip"
    }
    assert best[4] >= best[2]
    text = fill("<!-- steering:steering_shapes -->\n<!-- /steering -->\n", tmp_path / "results")
    assert f"| clip | best_of_n | 4 | {best[4]:.3f} |" in text


@pytest.mark.usefixtures("few")
def test_prices_of_gradients_and_the_spread_are_measured_once(bench: Bench) -> None:
    (bench.work / "prices.json").unlink()
    prices = bench.prices
    assert {"nfe backward", "decode backward", "reward/clip backward"} <= prices.seconds.keys()
    assert "reward/partial backward" not in prices.seconds  # it has none
    assert prices.nfe["nfe"] == 1.0 and prices.nfe["nfe backward"] == steering_table.BACKWARD
    assert min(prices.spreads.values()) > 0
    assert Bench(bench.work, bench.pipeline, bench.rewards, bench.tuning, bench.prompts).prices == prices


def test_tasks_count_alike_in_the_levels() -> None:
    scores = {"p": ("counting", 1.0), "q": ("counting", 3.0), "r": ("position", 8.0)}
    records = [
        PromptRecord(f"clip.reno.at_8{end}", "clip", seed, task, prompt, 0.0, value * factor, 1)
        for prompt, (task, value) in scores.items()
        for end, factor in (("", 1.0), (".strict", 0.1))
        for seed in (1, 2)
    ]
    levels = steering_table.level_of(records, {"reward": "clip", "arm": "reno", "budget": 8})
    assert levels["scores"] == pytest.approx({"clip": 5.0, "strict": 0.5})
