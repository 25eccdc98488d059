"""The audio proof's measures and its result file, on rendered clips in place of a trained model's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from genalign import assets
from genalign.evaluation.evaluate import Evaluation, EvaluationProtocol, SampleRecord, noise_seed
from genalign.runtime.media import writer
from genalign.types import Prompt
from genalign.worlds.registry import WORLDS
from rewards.backbones.audio_features import LogMelFeatures
from rewards.tones import revoiced
from scripts.benchmarks import audio_measures, planted_ratings, proofs
from scripts.benchmarks.published_results import read_records, result_rows
from scripts.benchmarks.results_tables import fill
from tests.rewards.tiny_clap import write_clap

PROTOCOL = EvaluationProtocol("comp", "0" * 16, 1.0, (30.0, 0.0), "ODE()", "float32", 16, (12000,), 1, 4, "tones-1")
NAMES = ("ddpo", "dragon_instance", "dragon_fad", "dragon_fad_clip", "dragon_text", "vendi")


def _evaluated(folder: Path, prompts: list[Prompt], clips: Tensor, strict: float) -> None:
    names = writer(8000)(clips, folder, 0)
    scores = {"strict": strict, "partial": strict / 2, "relaxed": strict}
    records = [
        SampleRecord(prompt.text, prompt.task, 0, noise_seed(prompt.text, 0), name, scores)
        for prompt, name in zip(prompts, names, strict=True)
    ]
    Evaluation(PROTOCOL, tuple(records)).save(folder)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose clips are right before, and all quiet organ tones after."""
    tasks = WORLDS["tones"].prompts("comp").by_task().values()
    prompts = [prompt for task in tasks for prompt in task[:3]]
    shown = WORLDS["tones"].render([prompt.metadata or {} for prompt in prompts], np.random.default_rng(0))
    moved = revoiced(["organ"], (-32.0, -26.0), len(prompts), seed=2).load(range(len(prompts)))
    _evaluated(tmp_path / "run" / "before", prompts, shown, 1.0)
    _evaluated(tmp_path / "run" / "after", prompts, moved, 0.0)
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny random CLAP, and trials of 4 clips."""
    folder, resolve = write_clap(tmp_path / "clap"), assets.resolve
    monkeypatch.setattr(assets, "resolve", lambda name: str(folder) if name == "tones-clap" else resolve(name))
    monkeypatch.setattr(audio_measures, "PART", 4)


def test_what_moved_is_seen_and_published(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proofs, "compared", lambda folder, name: {one: {71: run, 72: run} for one in NAMES})
    monkeypatch.setattr(proofs, "RESULTS", tmp_path)
    monkeypatch.setattr(proofs, "pruning_records", lambda work: [])  # test_audio_search.py
    monkeypatch.setattr(proofs, "budget_shares", lambda work: {4: 0.97})
    proofs.audio(tmp_path)
    made = json.loads((tmp_path / "audio_tones.json").read_text())
    rows = {row["name"]: row for row in made["rows"]}
    assert set(rows) == {*NAMES, *(f"{name}.strict" for name in NAMES[2:]), "ddpo.partial", "dragon_instance.partial"}
    assert rows["ddpo"]["mean"] == -1 and rows["ddpo.partial"]["mean"] == -0.5
    assert rows["dragon_fad"]["mean"] > 0 and rows["dragon_fad_clip"]["mean"] > 0
    assert [vars(row) for row in result_rows(read_records(tmp_path / "raw" / "audio_tones.jsonl"))] == made["rows"]

    lines = {line["name"]: line for line in made["win_rates"]}
    lost, won, by_set = (lines[name]["wins"] for name in ("ddpo", "dragon_fad_clip", "dragon_fad"))
    prompts = rows["ddpo"]["n"]
    assert lost["losses"] == won["wins"] + won["losses"] == 2 * prompts and lost["p_value"] == 1
    assert won["rate"] > 0.8 and won["p_value"] < 1e-4
    assert by_set["wins"] + by_set["losses"] == 2 * (prompts // 4) and by_set["rate"] == 1
    distances = lines["vendi"]["rewards"]["less FAD"]
    assert distances["before"] < distances["after"] < 0

    table = fill("<!-- wins:audio_tones -->\n<!-- /wins -->\n", tmp_path)
    assert f"| ddpo | strict | 0.0% | 0.0% | 1.0e+00 | {2 * prompts} | 1 / 0 | 0.5 / 0 |" in table


def test_the_runs_of_dragon_are_measured_by_other_clips_and_raters(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("vae_fad_clip", "rating")
    monkeypatch.setattr(audio_measures, "VaeFeatures", lambda model, rate: LogMelFeatures(rate))  # quicker
    monkeypatch.setattr(proofs, "compared", lambda folder, name: {one: {74: run, 75: run} for one in names})
    monkeypatch.setattr(proofs, "RESULTS", tmp_path)
    monkeypatch.setattr(audio_measures, "revoiced", lambda count, seed: revoiced(count=8, seed=seed))
    monkeypatch.setattr(audio_measures, "rated_clips", lambda seed: planted_ratings.rated_clips(24, seed))
    proofs.audio_dragon(tmp_path)
    made = json.loads((tmp_path / "dragon_tones.json").read_text())
    rows = {row["name"]: row for row in made["rows"]}
    assert set(rows) == {*names, *(f"{name}.strict" for name in names), "rating.taste"}
    assert rows["vae_fad_clip"]["mean"] != 0 and rows["rating"]["mean"] != 0
    lines = {line["name"]: line for line in made["win_rates"]}
    assert lines["vae_fad_clip"]["target"] == "less FAD by clip, by the VAE"
    taste = lines["rating"]["rewards"]["true rating"]
    assert 1 <= taste["before"] <= 5 and taste["before"] != taste["after"]
    assert rows["rating.taste"]["mean"] == pytest.approx(taste["after"] - taste["before"])


def test_a_run_of_other_prompts_after_than_before_is_refused(run: Path) -> None:
    lines = (run / "after" / "records.jsonl").read_text().splitlines()
    (run / "after" / "records.jsonl").write_text("\n".join(lines[1:]) + "\n")
    with pytest.raises(ValueError, match="was evaluated on other prompts or noises after training than before"):
        audio_measures.TrainedRun.of(run, 71)
