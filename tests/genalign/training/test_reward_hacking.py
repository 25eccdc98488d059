"""The reward-hacking report on images that were altered in one way each, its alarms, and the reaction to red."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from genalign.algorithms.interfaces import with_stronger_kl
from genalign.algorithms.recipes import dragon, flow_grpo, prdp
from genalign.cli.main import main
from genalign.cli.parsing import parse
from genalign.cli.train_settings import Train
from genalign.metrics.intervals import Estimate
from genalign.training.checkpointing import Checkpoints
from genalign.training.panel import PanelMeasures, PanelSnapshot
from genalign.training.reward_hacking import (
    Actions,
    HackingGuard,
    HackingReport,
    Limit,
    Limits,
    Signal,
    compare_snapshots,
)
from genalign.types import Prompt
from tests.genalign.cli.test_main import config
from tests.packages import ROOT

__all__ = ["config"]
PROMPTS = [Prompt(f"scene {index // 4}") for index in range(48)]


def scenes() -> Tensor:
    """Draw smooth random colors (48, 3, 32, 32)."""
    generator = torch.Generator().manual_seed(0)
    small = 0.3 + 0.4 * torch.rand(48, 3, 5, 5, generator=generator)
    return torch.nn.functional.interpolate(small, (32, 32), mode="bilinear")


def colors(images: Tensor) -> Tensor:
    return images.unfold(2, 8, 8).unfold(3, 8, 8).mean((-1, -2)).flatten(1) - 0.5


def brightness(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return images.flatten(1).mean(1)


LIMITS = Limits()
MEASURES = PanelMeasures({"bright": brightness}, colors, {"blue": lambda images, prompts: float(images[:, 2].mean())})


def statuses(altered: Tensor, limits: Limits = LIMITS) -> dict[str, str | None]:
    before, now = MEASURES(scenes(), PROMPTS), MEASURES(altered, PROMPTS)
    return {signal.name: signal.status for signal in compare_snapshots(before, now, 0.1, limits).signals}


def test_unchanged_samples_are_green_and_diagnostics_have_no_status() -> None:
    samples = ("saturation", "high frequencies", "grid", "bright")
    features = ("variety within a prompt", "variety across prompts", "drift of features", "drift without gain")
    assert statuses(scenes()) == dict.fromkeys(samples + features, "green") | {"blue": None, "KL": None}


def _gridded(images: Tensor) -> Tensor:
    lines = torch.zeros(32)
    lines[7::8] = 0.1
    return images + lines + lines[:, None]


def _noisy(images: Tensor) -> Tensor:
    return images + 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("alter", "red"),
    [
        (_gridded, "grid"),
        (lambda images: 2.5 * images - 1.5 * images.mean(1, keepdim=True), "saturation"),
        (_noisy, "high frequencies"),
        (lambda images: images - 0.1, "bright"),
        (lambda images: 0.9 * images[:1] + 0.1 * images, "variety within a prompt, variety across prompts"),
        (lambda images: 1 - images, "drift of features, drift without gain"),
    ],
)
def test_every_alteration_turns_its_signals_red(alter: Callable[[Tensor], Tensor], red: str) -> None:
    now = statuses(alter(scenes()))
    assert {now[name] for name in red.split(", ")} == {"red"}


def test_a_held_out_reward_may_rise_and_limits_can_be_replaced() -> None:
    assert statuses(scenes() + 0.1)["bright"] == "green"
    assert statuses(_noisy(scenes()), Limits(statistics=Limit(1e6, 1e6)))["high frequencies"] == "green"


def test_failed_scores_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    def status(scored: int) -> str | None:
        def failing(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
            return brightness(images, prompts).where(torch.arange(48) < scored, torch.nan)

        measures = PanelMeasures({"bright": failing})
        before, now = measures(scenes(), PROMPTS), measures(scenes() - 0.1, PROMPTS)
        signals = compare_snapshots(before, now, 0.0, Limits()).signals
        return {signal.name: signal.status for signal in signals}.get("bright")

    assert status(20) == "red" and status(4) is None
    assert "bright is finite for fewer than two prompts" in caplog.text


def test_a_report_is_restored_from_json() -> None:
    before = MEASURES(scenes(), PROMPTS)
    report = compare_snapshots(before, MEASURES(_noisy(scenes()), PROMPTS), float("nan"), LIMITS)
    assert HackingReport.from_list(json.loads(json.dumps(report.as_list(), allow_nan=False))) == report
    with pytest.raises(ValueError, match="different prompts"):
        compare_snapshots(before, MEASURES(scenes(), PROMPTS[1:] + PROMPTS[:1]), 0.0, Limits())


@pytest.mark.parametrize(
    ("mean", "reach", "side", "status"),
    [
        (0.9, 0.05, "rise", "red"),
        (0.9, 0.15, "rise", "amber"),
        (0.9, 0.55, "rise", "green"),
        (0.9, 0.05, "fall", "green"),
        (-0.9, 0.05, "fall", "red"),
        (-0.9, 0.05, "either", "red"),
    ],
)
def test_the_whole_interval_must_lie_beyond_a_limit(mean: float, reach: float, side: str, status: str) -> None:
    assert Limit(0.4, 0.8).status(Estimate(mean, mean - reach, mean + reach, 9), side) == status
    with pytest.raises(ValueError, match="amber <= red"):
        Limit(0.8, 0.4)


def _guard(snapshots: Sequence[PanelSnapshot], actions: Actions) -> HackingGuard:
    guard = HackingGuard(iter(snapshots).__next__, ("bright",), Limits(), actions, every=2)
    guard.begin()
    return guard


def test_a_guard_reports_when_it_is_due_and_logs_alarms(caplog: pytest.LogCaptureFixture) -> None:
    fine, altered = MEASURES(scenes(), PROMPTS), MEASURES(scenes() - 0.1, PROMPTS)
    guard = _guard([fine, fine, altered, fine], Actions())
    reports = [guard.report(rounds, rounds == 3, 0.0) for rounds in (1, 2, 3)]
    assert [report.status if report else None for report in reports] == ["green", "red", "green"]
    (line,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert line.startswith("Round 2: the reward may be exploited: red: bright 0.498 -> 0.398")


def test_amber_and_red_signals_are_named_in_the_alarm() -> None:
    amber = Signal("grid", 0.0, 0.3, Estimate(0.3, 0.28, 0.32, 9), "amber")
    red = Signal("clip", 0.5, 0.2, Estimate(-0.5, -0.6, -0.4, 9), "red")
    green = replace(amber, status="green")
    assert HackingReport((green,)).alarm == ""
    assert HackingReport((green, amber)).alarm == "amber: grid 0 -> 0.3 (shift +0.30)"
    assert HackingReport((amber, red)).alarm == "red: clip 0.5 -> 0.2 (shift -0.50); amber: grid 0 -> 0.3 (shift +0.30)"


def test_the_best_weights_are_saved_but_none_of_a_red_report() -> None:
    base, raised, saved = scenes(), [], []
    trainer = SimpleNamespace(rounds_done=2, learner=SimpleNamespace(raise_kl=raised.append))
    images = (base, base + 0.01, base, base + 0.02, _gridded(base) + 0.2)
    guard = _guard([MEASURES(each, PROMPTS) for each in images], Actions(keep_best=True, raise_kl=0.1, stop=True))
    for number in range(4):
        report = guard.report(2, False, 0.0)
        assert report is not None and not guard.stopped
        guard.react(report, trainer, lambda number=number: saved.append(number))
    assert saved == [0, 2] and raised == [0.1] and guard.stopped
    with pytest.raises(ValueError, match=r"name one in reward_hacking\.rewards"):
        HackingGuard(lambda: MEASURES(base, PROMPTS), (), Limits(), Actions(keep_best=True), 2)


def test_a_guard_is_restored_from_a_checkpoint(tmp_path: Path) -> None:
    untrained, shifted = MEASURES(scenes(), PROMPTS), MEASURES(scenes() * 1.001, PROMPTS)
    first, saved = _guard([untrained, shifted, shifted], Actions(keep_best=True)), []
    second = HackingGuard(lambda: shifted, ("bright",), Limits(), Actions(keep_best=True), every=2)
    report = first.report(1, False, 0.1)
    assert report is not None
    first.react(report, SimpleNamespace(), lambda: saved.append("first"))
    first.stopped = True
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"guard": first})
    latest = checkpoints.latest()
    assert latest is not None
    latest.restore({"guard": second})
    assert second.stopped and second.report(2, False, 0.1) == first.report(2, False, 0.1) == report
    second.react(report, SimpleNamespace(), lambda: saved.append("second"))
    assert saved == ["first"]


def test_the_kl_weight_doubles_from_a_minimum() -> None:
    once = with_stronger_kl(flow_grpo().objective, 0.01)
    assert once.kl == 0.01 and with_stronger_kl(once, 0.01).kl == 0.02
    assert with_stronger_kl(dragon().objective, 0.5).anchor == 0.5
    with pytest.raises(ValueError, match="has no penalty on the distance from the reference policy"):
        with_stronger_kl(prdp().objective, 0.01)


WATCHED = """
reward_hacking:
  every: 1
  prompts: "shapes:val"
  samples_per_task: 2
  rewards: {{green: {{class_path: outside_rewards.Channel}}}}
  diagnostics: {{cells: genalign.worlds.shapes.diversity.cell_entropy}}
  limits: {{statistics: {{amber: {limit}, red: {limit}}}, rewards: {{amber: {limit}, red: {limit}}}}}
  on_red: {{stop: true, keep_best: true, raise_kl: 0.1}}
"""


@pytest.mark.parametrize(("limit", "rounds"), [(1e-9, 1), (100.0, 2)])
def test_a_red_report_stops_a_run_which_still_writes_its_report(
    config: Path, tmp_path: Path, limit: float, rounds: int
) -> None:
    config.write_text(config.read_text() + WATCHED.format(limit=limit) + "\ntraining.learning_rate: 0.5\n")
    assert main(["train", "--config", str(config)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == rounds and all(row["reward_hacking"] for row in rows)
    assert (tmp_path / "run" / "best" / "lora").is_dir() == (rounds == 2)
    page = (tmp_path / "run" / "report.html").read_text()
    assert ("1 of 1 checks raised an alarm, the first after round 1" in page) == (rounds == 1)
    assert (tmp_path / "run" / "gain.json").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("seeds: 1", "reward_hacking.seeds and reward_hacking.samples_per_task must be at least 2"),
        ("prompts: 'shapes:val', on_red: {keep_best: true}", "name one in reward_hacking.rewards"),
    ],
)
def test_wrong_settings_are_refused(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str, message: str
) -> None:
    config.write_text(f"{config.read_text()}\nreward_hacking: {{every: 1, {change}}}\n")
    assert main(["train", "--config", str(config)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_settings_in_the_docs_are_accepted_and_its_limits_are_the_defaults(config: Path) -> None:
    page = (ROOT / "docs" / "hacking.md").read_text()
    (example,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    config.write_text(f"{config.read_text()}\n{example}")
    settings, plain = parse(Train, ["--config", str(config)], "train")
    hacking = settings.reward_hacking
    assert hacking.every == 5 and hacking.on_red == Actions(raise_kl=0.01, keep_best=True)
    rows = re.findall(r"\| ([\d.]+, [\d.]+) \|", page)
    limits = [limit for limit in plain["reward_hacking"]["limits"].values() if limit]
    assert rows == [f"{limit['amber']:g}, {limit['red']:g}" for limit in limits]


def sounds() -> Tensor:
    """Draw noise below 1 kHz at about -25 dB (48, 1, 4000)."""
    noise = torch.randn(48, 1, 4000, generator=torch.Generator().manual_seed(0))
    level = 0.05 + 0.02 * torch.rand(48, 1, 1, generator=torch.Generator().manual_seed(1))
    smooth = torch.nn.functional.avg_pool1d(noise, 5, 1, 2)
    return level * smooth / smooth.std(2, keepdim=True)


@pytest.mark.parametrize(
    ("alter", "red"),
    [
        (lambda waves: waves, set()),
        (lambda waves: 4 * waves, {"level"}),
        (lambda waves: (20 * waves).clamp(-0.3, 0.3), {"level", "crest", "high frequencies"}),
        (lambda waves: waves + 0.03 * torch.randn(waves.shape), {"high frequencies", "level"}),
    ],
    ids=["honest", "louder", "distorted", "hissing"],
)
def test_audio_has_its_own_statistics(alter: Callable[[Tensor], Tensor], red: set[str]) -> None:
    torch.manual_seed(0)
    measures = PanelMeasures()
    report = compare_snapshots(measures(sounds(), PROMPTS), measures(alter(sounds()), PROMPTS), 0.1, Limits())
    assert {signal.name for signal in report.signals} == {"level", "crest", "high frequencies", "KL"}
    assert {signal.name for signal in report.signals if signal.status == "red"} == red
