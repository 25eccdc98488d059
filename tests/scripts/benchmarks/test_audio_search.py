"""The audio proof's searches, from scorers to records, on random weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from genalign import assets
from genalign.diffusion.sampling import Sampling
from genalign.reward_learning.noise_aware import LevelQuality, RewardIdentity
from genalign.search.noise_aware import NoiseAware, ScorerLevel
from rewards.noise_aware import LatentClapDistilled, save_scorer
from rewards.regressor import Regressor, RegressorReward
from scripts.benchmarks import audio_pool, audio_search
from scripts.benchmarks.base_weights import require_base
from scripts.benchmarks.pruning_trials import best_of
from scripts.pretrain.tones_models import TonesTextToAudio, assemble, build_vae
from tests.rewards.tiny_clap import write_clap

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")  # diffusers' autoencoder


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """scripts/benchmarks/audio_search.py with random models, small pools and small budgets."""
    torch.manual_seed(0)
    folders = {"tones-clap": write_clap(tmp_path / "clap"), "tones-audio": tmp_path / "audio"}
    assemble(TonesTextToAudio(layers=1), build_vae(), folders["tones-audio"])
    monkeypatch.setattr(assets, "resolve", lambda name: str(folders.get(name, name)))
    clap = str(folders["tones-clap"])
    require_base(tmp_path / "work", "tones-audio")
    (tmp_path / "work" / "selection").mkdir(parents=True)
    Regressor(clap, 8, 8000).save(tmp_path / "work" / "selection" / "reward.safetensors")
    reward = RegressorReward(tmp_path / "work" / "selection" / "reward.safetensors")
    student = LatentClapDistilled(reward, channels=8, sample_rate=8000, width=4, depth=1, lora_rank=2)
    weights = {name: weight.detach() for name, weight in student.named_parameters() if weight.requires_grad}
    shares = Sampling(3).grid(audio_pool.pipeline()).noise_share[:2].tolist()
    levels = tuple(ScorerLevel(LevelQuality(share, 0.5, 0.5, 0), weights) for share in shares)
    scorer = NoiseAware(LatentClapDistilled, "latents", levels, RewardIdentity.of(reward))
    save_scorer(tmp_path / "work" / "aware" / "scorer.safetensors", scorer, student)
    suites = {100: "val", 1: "comp", 2: "iid"}
    for key, value in {"STEPS": 3, "LEVELS": (0, 1), "CANDIDATES": 4, "PROMPTS": 3, "SUITES": suites}.items():
        monkeypatch.setattr(audio_pool, key, value)
    for key, value in {"BUDGETS": (2, 3), "SUBSETS": 2, "TRIALS": 2, "BATCH": 2}.items():
        monkeypatch.setattr(audio_search, key, value)
    prices = {"nfe": 1.0, "decode": 2.0, "reward/selection": 0.5, "reward/noise-aware": 0.25}
    (tmp_path / "work" / "prices.json").write_text(json.dumps(prices))
    return tmp_path / "work"


def test_pools_become_records_and_are_kept(work: Path) -> None:
    records = audio_search.pruning_records(work)
    stems = {"noise_aware_pruning_comp": 1, "noise_aware_pruning": 2}
    names = {(f"{stem}{suffix}", seed) for stem, seed in stems.items() for suffix in ("", ".strict", ".at_2", ".at_3")}
    assert {(record.name, record.seed) for record in records} == names
    assert len(records) == 3 * len(names) and {record.n for record in records} == {2}
    pool = audio_pool.load(work / "pool", 1)
    one = next(record for record in records if record.name.endswith("at_2") and record.seed == 1)
    assert one.before == pytest.approx(float(best_of(pool[0][0]["clean"][None], 2)[0, 0]))
    assert pool[0][0]["previews"].shape[:2] == (4, 2)
    chosen = json.loads((work / "schedules.json").read_text())
    assert set(chosen) == {"2", "3"}
    shares = audio_search.budget_shares(work)
    assert shares.keys() == {2, 3} and all(0.5 < share <= 1 + 1e-6 for share in shares.values())
    (work / "pool" / "seed-2" / "002.safetensors").unlink()
    assert audio_search.pruning_records(work) == records  # what is missing is made anew, from the same noises


def test_calls_are_priced_once(work: Path) -> None:
    (work / "prices.json").unlink()
    prices = audio_search.costs(work)
    assert prices == audio_search.costs(work) and prices.steps == 3
    assert min(prices.forward, prices.decode, prices.reward, prices.looks["noise-aware"]) > 0


def test_pools_of_another_base_are_refused(work: Path) -> None:
    (work / "base.json").unlink()
    with pytest.raises(SystemExit, match="work was made with other weights of tones-audio"):
        audio_search.pruning_records(work)
