"""What a panel sees of images that were spoilt in one way each, what is an alarm, and what a red light does."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from genalign.algorithms.interfaces import with_stronger_kl
from genalign.algorithms.recipes import dragon, flow_grpo, prdp
from genalign.cli.config import Train, parse
from genalign.cli.main import main
from genalign.metrics.image import grid_energy, high_frequency, saturation
from genalign.metrics.intervals import Estimate
from genalign.training.reward_hacking import (
    Actions,
    HackingGuard,
    HackingReport,
    Limit,
    Limits,
    PanelMeasures,
    PanelSnapshot,
    Signal,
    compare_snapshots,
)
from genalign.types import Prompt
from tests.genalign.cli.test_main import config
from tests.packages import ROOT

__all__ = ["config"]
PROMPTS = [Prompt(f"scene {index // 4}") for index in range(48)]


def scenes() -> Tensor:
    """Smooth random colours (48, 3, 32, 32)."""
    generator = torch.Generator().manual_seed(0)
    small = 0.3 + 0.4 * torch.rand(48, 3, 5, 5, generator=generator)
    return torch.nn.functional.interpolate(small, (32, 32), mode="bilinear")


def colors(images: Tensor) -> Tensor:
    return images.unfold(2, 8, 8).unfold(3, 8, 8).mean((-1, -2)).flatten(1) - 0.5


def brightness(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return images.flatten(1).mean(1)


MEASURES = PanelMeasures({"bright": brightness}, colors, {"blue": lambda images, prompts: float(images[:, 2].mean())})


def lights(spoilt: Tensor) -> dict[str, str | None]:
    before, now = MEASURES(scenes(), PROMPTS), MEASURES(spoilt, PROMPTS)
    return {signal.name: signal.status for signal in compare_snapshots(before, now, 0.1, Limits()).signals}


def test_what_did_not_change_is_green_and_shown_figures_have_no_light() -> None:
    found = lights(scenes())
    assert found.pop("blue") is None and found.pop("KL") is None
    assert set(found) == {
        "saturation",
        "high frequencies",
        "grid",
        "bright",
        "variety within a prompt",
        "variety across prompts",
        "drift of features",
        "drift without gain",
    }
    assert set(found.values()) == {"green"}


def _gridded(images: Tensor) -> Tensor:
    lines = torch.zeros(32)
    lines[7::8] = 0.1
    return images + lines + lines[:, None]


def _saturated(images: Tensor) -> Tensor:
    grey = images.mean(1, keepdim=True)
    return grey + 2.5 * (images - grey)


def _noisy(images: Tensor) -> Tensor:
    return images + 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))


def _all_alike(images: Tensor) -> Tensor:
    return 0.9 * images[:1] + 0.1 * images


@pytest.mark.parametrize(
    ("spoil", "red"),
    [
        (_gridded, "grid"),
        (_saturated, "saturation"),
        (_noisy, "high frequencies"),
        (lambda images: images - 0.1, "bright"),
        (_all_alike, "variety within a prompt"),
        (_all_alike, "variety across prompts"),
        (lambda images: 1 - images, "drift of features"),
        (lambda images: 1 - images, "drift without gain"),
    ],
)
def test_every_way_of_spoiling_turns_its_light_red(spoil: object, red: str) -> None:
    assert lights(spoil(scenes()))[red] == "red"  # type: ignore[operator]


def test_a_held_out_reward_that_rises_stays_green() -> None:
    assert lights(scenes() + 0.1)["bright"] == "green"


def test_statistics_by_hand() -> None:
    half = torch.zeros(1, 3, 16, 16)
    half[:, 0, :, :8] = 1.0  # one edge, at a multiple of 8
    assert saturation(half).item() == 0.5
    assert grid_energy(half).item() > 5
    assert abs(grid_energy(torch.rand(64, 3, 64, 64)).mean().item()) < 0.02
    checkers = (torch.arange(16)[:, None] + torch.arange(16)) % 2
    fine, flat = checkers.expand(1, 3, 16, 16).float(), torch.linspace(0, 1, 16).expand(1, 3, 16, 16)
    assert high_frequency(fine).item() == pytest.approx(0.0, abs=1e-4)
    assert high_frequency(flat).item() < -2
    with pytest.raises(ValueError, match="no edge of blocks of 8"):
        grid_energy(torch.rand(1, 3, 8, 8))


def test_failed_scores_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    def seen(scored: int) -> str | None:
        def failing(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
            return brightness(images, prompts).where(torch.arange(48) < scored, torch.nan)

        measures = PanelMeasures({"bright": failing})
        before, now = measures(scenes(), PROMPTS), measures(scenes() - 0.1, PROMPTS)
        return {signal.name: signal.status for signal in compare_snapshots(before, now, 0.0, Limits()).signals}.get(
            "bright"
        )

    assert seen(20) == "red" and seen(4) is None
    assert "bright is finite for fewer than two prompts" in caplog.text


def test_a_panel_is_plain_json_and_comes_back() -> None:
    before = MEASURES(scenes(), PROMPTS)
    seen = compare_snapshots(before, MEASURES(_noisy(scenes()), PROMPTS), float("nan"), Limits())
    again = HackingReport.from_list(json.loads(json.dumps(seen.as_list(), allow_nan=False)))
    assert again == seen
    with pytest.raises(ValueError, match="different prompts"):
        compare_snapshots(before, MEASURES(scenes(), PROMPTS[1:] + PROMPTS[:1]), 0.0, Limits())


@pytest.mark.parametrize(
    ("shift", "side", "light"),
    [
        (Estimate(0.9, 0.85, 0.95, 9), "rise", "red"),
        (Estimate(0.9, 0.75, 1.05, 9), "rise", "amber"),
        (Estimate(0.9, 0.35, 1.45, 9), "rise", "green"),
        (Estimate(0.9, 0.85, 0.95, 9), "fall", "green"),
        (Estimate(-0.9, -0.95, -0.85, 9), "fall", "red"),
        (Estimate(-0.9, -0.95, -0.85, 9), "either", "red"),
    ],
)
def test_the_whole_interval_must_lie_beyond_a_limit(shift: Estimate, side: str, light: str) -> None:
    assert Limit(0.4, 0.8).status(shift, side) == light  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="amber <= red"):
        Limit(0.8, 0.4)


def _guard(looks: Sequence[PanelSnapshot], actions: Actions) -> HackingGuard:
    it = iter(looks)
    guard = HackingGuard(lambda: next(it), ("bright",), Limits(), actions, every=2)
    guard.begin()
    return guard


def test_a_guard_looks_when_it_is_due_and_says_what_it_saw(caplog: pytest.LogCaptureFixture) -> None:
    fine, spoilt = MEASURES(scenes(), PROMPTS), MEASURES(scenes() - 0.1, PROMPTS)
    guard = _guard([fine, fine, spoilt, fine], Actions())
    looks = [guard.report(done, done == 3, 0.0) for done in (1, 2, 3)]
    assert [seen.status if seen else None for seen in looks] == ["green", "red", "green"]
    (line,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert line.startswith("Round 2: the reward may be exploited: red: bright 0.498 -> 0.398")


def test_an_amber_light_is_an_alarm_too() -> None:
    amber = Signal("grid", 0.0, 0.3, Estimate(0.3, 0.28, 0.32, 9), "amber")
    red = Signal("clip", 0.5, 0.2, Estimate(-0.5, -0.6, -0.4, 9), "red")
    green = replace(amber, status="green")
    assert HackingReport((green,)).alarm == ""
    assert HackingReport((green, amber)).alarm == "amber: grid 0 -> 0.3 (shift +0.30)"
    assert HackingReport((amber, red)).alarm == "red: clip 0.5 -> 0.2 (shift -0.50); amber: grid 0 -> 0.3 (shift +0.30)"


def test_the_best_look_is_kept_and_never_a_red_one() -> None:
    base = scenes()
    grids = _gridded(base) + 0.2
    looks = [MEASURES(images, PROMPTS) for images in (base, base + 0.01, base, base + 0.02, grids)]
    guard = _guard(looks, Actions(keep_best=True))
    seen = [guard.report(2, False, 0.0) for _ in range(4)]
    assert [guard.is_best(panel) for panel in seen if panel] == [True, False, True, False]
    with pytest.raises(ValueError, match=r"name one in reward_hacking\.rewards"):
        HackingGuard(lambda: looks[0], (), Limits(), Actions(keep_best=True), 2)


def test_the_pull_doubles_from_the_least() -> None:
    once = with_stronger_kl(flow_grpo().objective, 0.01)
    assert once.kl == 0.01 and with_stronger_kl(once, 0.01).kl == 0.02  # type: ignore[attr-defined]
    assert with_stronger_kl(dragon().objective, 0.5).anchor == 0.5  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="has no distance from the reference policy"):
        with_stronger_kl(prdp().objective, 0.01)


WATCHED = """
reward_hacking:
  every: 1
  samples_per_task: 2
  rewards: {{green: {{class_path: outside_rewards.Channel}}}}
  diagnostics: {{cells: genalign.worlds.shapes.diversity.cell_entropy}}
  limits: {{statistics: {{amber: {limit}, red: {limit}}}}}
  on_red: {{stop: true, keep_best: true, raise_kl: 0.1}}
"""


@pytest.mark.parametrize(("limit", "rounds"), [(1e-9, 1), (100.0, 2)])
def test_a_red_light_stops_a_run_which_still_ends_in_order(
    config: Path, tmp_path: Path, limit: float, rounds: int
) -> None:
    config.write_text(config.read_text() + WATCHED.format(limit=limit) + "\ntraining.learning_rate: 0.5\n")
    assert main(["train", "--config", str(config)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == rounds and all(row["reward_hacking"] for row in rows)
    assert (tmp_path / "run" / "best" / "lora").is_dir() == (rounds == 2)
    page = (tmp_path / "run" / "report.html").read_text()
    assert ("The reward may be exploited: alarm in 1 of 1 looks, first in round 0" in page) == (rounds == 1)
    assert (tmp_path / "run" / "gain.json").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "reward_hacking: {every: 1, seeds: 1}",
            "reward_hacking.seeds and reward_hacking.samples_per_task must be at least 2",
        ),
        (
            "reward_hacking: {every: 1, rewards: {red: outside_rewards.redness}}",
            "reward_hacking.rewards.red is trained on, and would see nothing: name another reward",
        ),
        ("reward_hacking: {every: 1, on_red: {keep_best: true}}", "name one in reward_hacking.rewards"),
    ],
)
def test_what_cannot_be_watched_is_refused(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str, message: str
) -> None:
    config.write_text(f"{config.read_text()}\n{change}\n")
    assert main(["train", "--config", str(config)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_limits_can_be_replaced() -> None:
    before, now = MEASURES(scenes(), PROMPTS), MEASURES(_noisy(scenes()), PROMPTS)
    calm = replace(Limits(), statistics=Limit(1e6, 1e6))
    assert [s.status for s in compare_snapshots(before, now, 0.0, calm).signals if s.name == "high frequencies"] == [
        "green"
    ]


def test_the_settings_in_the_docs_are_accepted_and_its_limits_are_the_defaults(config: Path) -> None:
    page = (ROOT / "docs" / "hacking.md").read_text()
    (shown,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    config.write_text(f"{config.read_text()}\n{shown}")
    settings, plain = parse(Train, ["--config", str(config)], "train")
    assert settings.reward_hacking.every == 5 and settings.reward_hacking.on_red == Actions(
        raise_kl=0.01, keep_best=True
    )
    rows = re.findall(r"\| ([\d.]+, [\d.]+) \|", page)
    limits = [limit for limit in plain["reward_hacking"]["limits"].values() if limit]
    assert rows == [f"{limit['amber']:g}, {limit['red']:g}" for limit in limits]


def sounds() -> Tensor:
    """Noise below 1 kHz at about -25 dB (48, 1, 4000)."""
    noise = torch.randn(48, 1, 4000, generator=torch.Generator().manual_seed(0))
    level = 0.05 + 0.02 * torch.rand(48, 1, 1, generator=torch.Generator().manual_seed(1))
    smooth = torch.nn.functional.avg_pool1d(noise, 5, 1, 2)
    return level * smooth / smooth.std(2, keepdim=True)


@pytest.mark.parametrize(
    ("spoilt", "red"),
    [
        (lambda waves: waves, set()),
        (lambda waves: 4 * waves, {"level"}),
        (lambda waves: (20 * waves).clamp(-0.3, 0.3), {"level", "crest", "high frequencies"}),
        (lambda waves: waves + 0.03 * torch.randn(waves.shape), {"high frequencies", "level"}),
    ],
    ids=["honest", "louder", "distorted", "hissing"],
)
def test_sounds_have_statistics_of_their_own(spoilt: object, red: set[str]) -> None:
    assert callable(spoilt)
    torch.manual_seed(0)
    measures = PanelMeasures()
    found = compare_snapshots(measures(sounds(), PROMPTS), measures(spoilt(sounds()), PROMPTS), 0.1, Limits())
    assert {signal.name for signal in found.signals} == {"level", "crest", "high frequencies", "KL"}
    assert {signal.name for signal in found.signals if signal.status == "red"} == red
