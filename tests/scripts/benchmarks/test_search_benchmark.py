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

LEVELS = (1, 2)


@pytest.fixture
def work(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """scripts/benchmarks/search_benchmark.py with a random model, untrained students, small pools and budgets."""
    resolve = assets.resolve
    monkeypatch.setattr(assets, "resolve", lambda name: str(tiny_folder) if name == "shapes-sd3" else resolve(name))
    constants: dict[str, Any] = {"STEPS": 4, "SEEDS": 6, "PROMPTS": 4, "LEVELS": LEVELS, "TUNED": (), "BUDGETS": (2, 4)}
    constants |= {"TUNE": range(0, 4, 2), "TEST": range(1, 4, 2), "SUBSETS": 2, "TRIALS": 2, "LIVE_BUDGETS": (4,)}
    constants |= {"LIVE_PROMPTS": 2, "LIVE_SEEDS": (11,), "CHUNK": 2, "RENO_RATES": (1.0, 5.0), "RENO_TUNING": 1}
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
    result = json.loads((work.parent / "results" / "search_shapes.json").read_text())
    rows = {row["name"]: row for row in result["rows"]}

    # an untrained student is the reward itself, and costs as much: its curves are those of raw pruning
    for key in ("curves", "curves_by_nfe"):
        curves = result[key]
        assert curves["noise_aware_pruning"] == curves["raw_pruning"]
    assert rows["noise_aware_over_raw_pruning"]["mean"] == 0 == rows["noise_aware_over_raw_pruning.nfe"]["mean"]
    assert {"raw_pruning.omega", "best_of_n_stopped_early.omega.nfe", "live_reno.at_4", "raw_pruning.at_2"} <= set(rows)
    assert rows["oracle_pruning.omega"]["mean"] > max(rows["random_pruning.omega"]["mean"], -1)
    assert result["alignment"]["raw"] == result["alignment"]["decoded-12"]

    # two samples of four steps pay for four that are stopped after two, and the best preview is the sample
    recorded = search_pool.RecordedPool.load(work / "pool" / "base", search_pool.TEST)
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


def test_budget_use_by_hand() -> None:
    def curve(*rewards: float) -> dict[int, torch.Tensor]:
        return {b: torch.tensor([[r, 0.0], [r, 0.0]]) for b, r in zip((1, 2, 3), rewards, strict=True)}

    reference = curve(1.0, 2.0, 3.0)  # the area above 1 over budgets 1 to 3 is 2
    before, after = search_benchmark.budget_use(curve(2.0, 3.0, 4.0), reference)
    assert before.tolist() == [1.0, 1.0] and after.tolist() == pytest.approx([2.0, 2.0])  # the area is 4
    assert search_benchmark.budget_use(curve(1.0, 1.0, 1.0), reference)[1].tolist() == pytest.approx([0.0, 0.0])


def test_a_missing_tuned_model_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"seed-12/lora is missing: train it first, by scripts/benchmarks/proofs\.py"):
        search_pool.pipeline(12)
