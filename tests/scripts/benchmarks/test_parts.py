"""The parts of the proofs read only scores that the runs of their comparison have, and name their rows apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml

from genalign.evaluation.records import PromptRecord
from scripts.benchmarks import few_steps, method_comparisons, offline_learning, reward_gradients
from tests.packages import ROOT

COMPARISONS = ROOT / "scripts" / "configs" / "compare"
VERIFIER = {"strict", "partial", "relaxed"}
PARTS = [
    (reward_gradients, "pathwise"),
    (reward_gradients, "audio_pathwise"),
    (offline_learning, "offline"),
    (method_comparisons, "matching_losses"),
    (few_steps, "few_steps"),
    (few_steps, "few_step_rewards"),
]


@pytest.mark.parametrize(("module", "part"), PARTS, ids=lambda value: value if isinstance(value, str) else "")
def test_a_part_reads_scores_that_its_runs_have(
    module: ModuleType, part: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An evaluation of a world's prompts has the verifier's scores and the rewards that the run names."""
    scored: dict[str, set[str]] = {}
    written = list[PromptRecord]()

    def compared(folder: Path, name: str, allow_failed: bool) -> dict[str, dict[int, Path]]:
        comparison = yaml.safe_load((COMPARISONS / f"{name}.yaml").read_text())
        base = yaml.safe_load((COMPARISONS / comparison["base"]).read_text())
        for arm, own in comparison["runs"].items():
            scored[arm] = VERIFIER | set(own.get("rewards", base["rewards"]))
        return {arm: {1: tmp_path / arm} for arm in scored}

    def read(name: str, metric: str, score: str, *arms: Mapping[int, Path]) -> list[PromptRecord]:
        for run in (run for runs in arms for run in runs.values()):
            assert score in scored[run.name], f"{run.name} has no {score}"
        return [PromptRecord(name, metric, 1, "t", "p", 0.5, 1.0, 1)]

    def write_results(folder: Path, stem: str, head: Mapping[str, Any], records: Sequence[PromptRecord]) -> None:
        written.extend(records)

    stand_ins: dict[str, Any] = {
        "compared": compared,
        "arm_gains": read,
        "differences": read,
        "write_results": write_results,
        "set_records": lambda name, metric, *_: read(name, metric, "strict"),
        "panel_records": lambda name, seed, run: read(f"{name}.alarms", "runs", "strict"),
        "evaluation_images": lambda folder: (None, []),
        "renders": lambda prompts: SimpleNamespace(),
        "nearness": lambda references: lambda images: 0.0,
        "about": lambda runs: {},
        "head": lambda claim, command: {"claim": claim},
        **dict.fromkeys(("write_proxies", "write_pool", "collect_pool"), lambda *_: None),
    }
    for name in stand_ins.keys() & vars(module).keys():
        monkeypatch.setattr(module, name, stand_ins[name])
    getattr(module, part)(tmp_path)
    assert {name.rsplit(".")[0].split(" - ")[0] for name in (row.name for row in written)} == set(scored)
    assert len({row.name for row in written}) == len({(row.name, row.metric) for row in written})
