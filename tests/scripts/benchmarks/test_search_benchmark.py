"""The comparison of searches, from students to records, on random weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from genalign import assets
from genalign.reward_learning.noise_aware import LevelQuality, RewardIdentity
from genalign.search.noise_aware import NoiseAware, ScorerLevel
from rewards.noise_aware import LatentImageDistilled, SelfDistilled, save_scorer
from rewards.regressor import Regressor
from scripts.benchmarks import search_benchmark, search_pool
from scripts.benchmarks.pruning_trials import best_of
from scripts.benchmarks.results_tables import fill
from scripts.benchmarks.search_pool import PoolSource

LEVELS = (1, 2)


@pytest.fixture
def work(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """scripts/benchmarks/search_benchmark.py with a random model, untrained students, small pools and budgets."""
    resolve = assets.resolve
    monkeypatch.setattr(assets, "resolve", lambda name: str(tiny_folder) if name == "shapes-sd3" else resolve(name))
    constants: dict[str, Any] = {"STEPS": 4, "SEEDS": 6, "LEVELS": LEVELS, "BUDGETS": (2, 4), "SUBSETS": 2, "TRIALS": 2}
    constants |= {
        "POOLS": {"tuning": PoolSource("val", 2), "base": PoolSource("comp", 2)},
        "LIVE": PoolSource("comp", 2),
    }
    constants |= {"LIVE_BUDGETS": (4,), "LIVE_SEEDS": (11,), "CHUNK": 2, "RENO_RATES": (1.0, 5.0), "RENO_TUNING": 1}
    constants |= {"OTHERS": {"half": (2, search_pool.ODE()), "stochastic": (4, search_pool.FlowSDE(0.7))}}
    constants |= {"RESULTS": tmp_path / "results"}
    for name, value in constants.items():
        for module in (search_pool, search_benchmark):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    search_pool.pipeline.cache_clear()
    folder = tmp_path / "work"
    torch.manual_seed(0)
    (folder / "selection").mkdir(parents=True)
    Regressor("shapes-clip", hidden=8).save(folder / "selection" / "reward.safetensors")
    reward = search_pool.selection(folder).function
    grid = search_pool.Sampling(4).grid(search_pool.pipeline())
    for name in search_pool.STUDENTS:
        latent = {"channels": 4, "scale": 4, "width": 4, "depth": 1}
        student = SelfDistilled(reward, 2) if "decoded" in name else LatentImageDistilled(reward, **latent, lora_rank=2)
        weights = {key: weight.detach() for key, weight in student.named_parameters() if weight.requires_grad}
        levels = [ScorerLevel(LevelQuality(float(grid.noise_share[i]), 0.5, 0.5, 0.0), weights) for i in LEVELS]
        scorer = NoiseAware(SelfDistilled, student.input_kind, tuple(levels), RewardIdentity.of(reward))
        save_scorer(folder / name / "scorer.safetensors", scorer, student)
    prices = {"nfe": 1.0, "decode": 0.5, "reward/selection": 0.25, "reward/decoded": 0.25, "reward/latent": 0.1}
    prices |= {f"{name} backward": 2 * price for name, price in prices.items()}
    (folder / "prices.json").write_text(json.dumps(prices))
    yield folder
    search_pool.pipeline.cache_clear()


@pytest.mark.slow
def test_pools_and_live_searches_become_records(work: Path) -> None:
    search_pool.record(work)
    search_benchmark.tune(work)
    search_benchmark.live(work)
    search_benchmark.publish(work)
    results = work.parent / "results"
    result = json.loads((results / "search_shapes.json").read_text())
    rows = {row["name"]: row for row in result["rows"]}

    # an untrained student is the reward itself, and costs as much: its curves are those of raw pruning
    for key in ("curves", "curves.nfe"):
        curves = result[key]
        assert curves["noise_aware_pruning"] == {b: pytest.approx(own) for b, own in curves["raw_pruning"].items()}
    assert rows["noise_aware_over_raw_pruning"]["mean"] == 0 == rows["noise_aware_over_raw_pruning.nfe"]["mean"]
    assert {"raw_pruning.omega", "best_of_n_stopped_early.omega.nfe", "live_reno.at_4", "raw_pruning.at_2"} <= set(rows)
    assert rows["oracle_pruning.omega"]["mean"] > max(rows["random_pruning.omega"]["mean"], -1)
    assert result["alignment"]["raw"] == result["alignment"]["decoded-12"]

    # what is spent stands beside what was found
    assert result["shares"]["best_of_n"] == {"2": 1.0, "4": 1.0} and result["shares.nfe"]["one_sample"]["4"] == 0.25
    assert all(0.5 < share <= 1 + 1e-6 for share in result["shares"]["raw_pruning"].values())
    assert [row["search"] for row in result["live"][:4]] == ["best_of_n", "raw_pruning", "noise_aware_pruning", "reno"]
    for row in result["live"]:
        assert row["share"] <= 1 + 1e-6 and row["seconds"] > 0 and row["nfe"] > 0
    assert result["schedules"]["reno-nfe"].keys() == {"4"} and result["schedules"]["reno-nfe"]["4"] in (1.0, 5.0)
    markers = (f"<!-- {kind}:search_shapes -->\n<!-- /{kind} -->\n" for kind in ("curves", "live"))
    text = fill("".join(markers), results)
    assert "| search, at equal NFE | 2 | 4 | cost of best-of-32 |" in text and "| nfe | 4 | reno | " in text
    one = next(line for line in text.splitlines() if line.startswith("| one_sample |"))
    assert one.count("\\*") == 2

    # two samples of four steps pay for four that are stopped after two, and the best preview is the sample
    recorded = search_pool.RecordedPool.load(work, "base")
    previews = torch.stack([recorded.look("raw")[:, :, 0], recorded.look("strict")[:, :, 0]], dim=2)
    ends = search_benchmark.stopped(recorded, search_pool.costs(work, "nfe"), 1, 2)
    assert torch.equal(ends, best_of(previews, 4))

    # what is there is kept, and what is missing is made anew from the same noises
    pool = work / "pool" / "base"
    kept = {path.name: path.read_bytes() for path in pool.iterdir()}
    (pool / "001.safetensors").unlink()
    search_pool.record(work)
    assert {path.name: path.read_bytes() for path in pool.iterdir()} == kept
    shutil.rmtree(pool)
    with pytest.raises(SystemExit, match="lacks 2 of 2 prompts: run record first"):
        search_benchmark.publish(work)


def test_students_share_their_trajectories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def train(command: list[str]) -> int:
        output = Path(command[command.index("--output") + 1])
        commands.append([*command, *sorted(path.name for path in output.iterdir())])
        (output / "train-0.safetensors").touch()
        (output / "scorer.safetensors").touch()
        return 0

    (tmp_path / "selection").mkdir()
    (tmp_path / "selection" / "reward.safetensors").touch()
    monkeypatch.setattr("scripts.benchmarks.trained_runs.genalign", train)
    search_benchmark.prepare(tmp_path)
    search_benchmark.prepare(tmp_path)
    assert [command[-1] == "train-0.safetensors" for command in commands] == [False, True, True, True]
    assert [command[command.index("--seed") + 1] for command in commands] == ["11", "12", "13", "11"]
    assert "scripts/configs/noise_aware/shapes_latent.yaml" in commands[-1]


def test_prices_are_measured_once(work: Path) -> None:
    (work / "prices.json").unlink()
    search_pool.measure(work)
    prices = search_pool.prices(work)
    assert {"nfe", "decode", "reward/selection", "reward/decoded", "reward/latent"} <= prices.keys()
    assert "reward/selection backward" in prices and "reward/latent backward" not in prices
    assert min(prices.values()) > 0
    search_pool.measure(work)
    assert search_pool.prices(work) == prices


def _curve(*rewards: float) -> dict[int, torch.Tensor]:
    return {budget: torch.tensor([[r, 0.0], [r, 0.0]]) for budget, r in zip((1, 2, 4), rewards, strict=True)}


def test_budget_use_by_hand() -> None:
    reference = _curve(1.0, 2.0, 3.0)  # over log2 of the budgets, 0 to 2, the mean above 1 is 1
    before, after = search_benchmark.budget_use(_curve(2.0, 3.0, 4.0), reference, "ab")
    assert before.tolist() == [1.0, 1.0] and after.tolist() == pytest.approx([2.0, 2.0])
    assert search_benchmark.budget_use(_curve(1.0, 1.0, 1.0), reference, "ab")[1].tolist() == pytest.approx([0.0, 0.0])
    late = search_benchmark.budget_use(_curve(1.0, 1.0, 3.0), reference, "ab")[1]
    assert late.tolist() == pytest.approx([0.5, 0.5])  # (0 + 0) / 2 and (0 + 2) / 2, of a width of 2


def test_tasks_count_alike_in_the_use_of_the_budget() -> None:
    """The start is 2, and the mean gains are 0, 0 and 2, of which tasks have a mean of 1."""
    reference = {1: torch.tensor([[1.0, 0.0], [1.0, 0.0], [3.0, 0.0]]), 4: torch.tensor([[3.0, 0], [3.0, 0], [5.0, 0]])}
    before, after = search_benchmark.budget_use(reference, reference, "aab")
    assert before.tolist() == after.tolist() == pytest.approx([0.0, 0.0, 2.0])


def test_samples_are_stopped_where_enough_of_them_were_recorded(work: Path) -> None:
    """Stopped after two of four steps, a budget of four pays for eight, of which six are recorded."""
    previews = torch.zeros(2, 6, len(LEVELS), len(search_pool.ways()))
    previews[:, :, 0] = 1.0  # the earlier level would be the better one
    ends = torch.zeros(2, 6, 2)
    recorded = search_pool.RecordedPool(previews, ends, ends, ends, ("a", "b"), ("a", "b"))
    costs = search_pool.costs(work, "nfe")
    assert [search_benchmark.best_level(recorded, costs, budget) for budget in (2, 4)] == [1, 2]


def test_an_unfinished_or_foreign_tuned_model_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = search_pool.TUNED_RUNS / "seed-12"
    for folder in (run, run / "lora"):  # the weights of a run that goes on
        folder.mkdir(parents=True)
        with pytest.raises(SystemExit, match="seed-12 is missing or unfinished: train it first, by scripts/"):
            search_pool.pipeline(12)
    (run / "gain.json").touch()
    with pytest.raises(SystemExit, match="methods was made with other weights of shapes-sd3"):
        search_pool.pipeline(12)


def test_a_folder_of_another_base_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pool" / "base").mkdir(parents=True)
    with pytest.raises(SystemExit, match="was made with other weights of shapes-sd3"):
        search_benchmark.run_parts(["publish"], tmp_path)
