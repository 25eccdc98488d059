"""The audio proof's searches, from scorers to records, on random weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from genalign import assets
from genalign.sampling import Sampling
from genalign.search.aware import NoiseAware, Quality
from genalign.worlds.tones.models import TextToVelocity, assemble, build_vae
from pipelines import StableAudio
from rewards.noise_aware import ClapScorer, save_scorer
from scripts import audio_search
from tests.rewards.tiny_clap import write_clap

STEPS = Sampling(3)


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """scripts/audio_search.py with random models, small budgets and two schedules."""
    torch.manual_seed(0)
    folders = {"tones-clap": write_clap(tmp_path / "clap"), "tones-audio": tmp_path / "audio"}
    assemble(TextToVelocity(layers=1), build_vae(), folders["tones-audio"])
    monkeypatch.setattr(assets, "resolve", lambda name: str(folders.get(name, name)))
    level = float(StableAudio.load(str(folders["tones-audio"])).grid(3).noise_share[1])
    for name in ("selection", "aware"):
        student = ClapScorer(str(folders["tones-clap"]), 8000, hidden=8)
        scorer = NoiseAware(student, (Quality(level, 0.5, 0.5, 0.0),))
        (tmp_path / "work" / name).mkdir(parents=True)
        save_scorer(tmp_path / "work" / name / "scorer.safetensors", scorer)
    small = {"SAMPLING": STEPS, "BATCH": 4, "BUDGETS": (2, 3), "PROMPTS": 3, "TUNING_PROMPTS": 1, "SEEDS": (1, 2)}
    for key, value in {**small, "SCHEDULES": (((1,), (0.5,)), ((1,), (0.25,)))}.items():
        monkeypatch.setattr(audio_search, key, value)
    return tmp_path / "work"


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_searches_become_records_and_are_kept(work: Path) -> None:
    records = audio_search.pruning_records(work)
    named = [(record.name, record.seed) for record in records]
    assert len(records) == 12 and set(named) == {
        (name, seed) for name in ("noise_aware_pruning", "noise_aware_pruning.strict") for seed in (1, 2)
    }
    assert len({record.prompt for record in records}) == 3 and {record.n for record in records} == {2}
    made = {path.name for path in (work / "found").iterdir()}
    assert {f"best_of_n-at-{budget}-seed-{seed}.json" for budget in (2, 3) for seed in (1, 2)} <= made
    assert {f"tuning-{place}-at-2-seed-100.json" for place in (0, 1)} <= made
    rows = [json.loads((work / "found" / f"best_of_n-at-{b}-seed-1.json").read_text()) for b in (2, 3)]
    first = next(record for record in records if record.seed == 1)
    assert first.before == pytest.approx((rows[0][0][0] + rows[1][0][0]) / 2)
    prices = json.loads((work / "prices.json").read_text())
    assert set(prices) == {"forward", "decode", "reward/selection", "reward/noise-aware"}
    again = audio_search.pruning_records(work)
    assert again == records
