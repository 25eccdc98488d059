"""Pilots of learned rewards train on another seed and are evaluated on val prompts, and what they print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scripts.benchmarks import reward_pilots
from scripts.benchmarks.learned_rewards import PLAIN, BenchWorld, Proxy, Setting
from scripts.benchmarks.reward_pilots import PILOTS, described


@pytest.mark.parametrize(
    ("pilot", "learned_by", "schedule"),
    [
        ("turn", ["overoptimized", "overoptimized"], "constant"),
        ("smoothing", ["overoptimized", "shapes_clip"], "linear"),
        ("falling", ["shapes_clip", "shapes_clip"], "constant"),
        ("tones", [], "linear"),
    ],
)
def test_a_pilot_sees_neither_published_seeds_nor_prompts(
    pilot: str,
    learned_by: list[str],
    schedule: str,
    commands: list[tuple[str, ...]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rewards: list[str] = []

    def learned(
        work: Path, world: BenchWorld, proxy: Proxy, seeds: tuple[int, ...], training: Path = PLAIN
    ) -> dict[int, Setting]:
        rewards.append(training.stem)
        return {seed: {"class_path": "rewards.learned.LearnedReward", "init_args": {"path": "x"}} for seed in seeds}

    monkeypatch.setattr(reward_pilots, "learned", learned)
    runs = PILOTS[pilot](tmp_path)
    assert rewards == learned_by and all(list(by_seed) == [100] for by_seed in runs.values())
    settings = [json.loads(Path(command[-1]).read_text()) for command in commands]
    assert len(settings) == len(runs) == len({one["output"] for one in settings}) == max(1, len(learned_by))
    world = "tones" if pilot == "tones" else "shapes"
    for one in settings:
        assert one["training"]["seed"] == 100 and one["training"]["learning_rate_schedule"] == schedule
        assert one["before_after"]["prompts"] == f"{world}:val" and one["before_after"]["seeds"] > 1


def test_a_run_is_described_with_its_evaluations(tmp_path: Path) -> None:
    gain = {"mean": 0.125, "low": None, "high": 0.25}
    (tmp_path / "gain.json").write_text(json.dumps({"gain": {"strict": gain}}))
    held_out = {"learned": {"mean": 2.0}, "strict": {"mean": 0.4, "low": 0.3, "high": 0.5}}
    rows: list[dict[str, Any]] = [{"kl": 4.0, "held_out": None}, {"kl": 14.0, "held_out": held_out}]
    lines = [json.dumps({**row, "machine": {"seconds": 60.0 * n}}) for n, row in enumerate(rows, start=1)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert described("one", tmp_path).splitlines() == [
        "one: strict +0.125 (none to +0.250), 2.0 minutes of training",
        "  distance 3.0000: reward +2.000, strict 0.400 (0.300 to 0.500)",
    ]
