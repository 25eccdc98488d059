"""The measurements of the pathwise family: on made-up runs by the real configurations, and on a few samples."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from genalign.algorithms.pathwise import Tail
from genalign.algorithms.tails import Chain, RenoisedCopies
from genalign.cli.compare import run_settings
from genalign.cli.evaluate_settings import EvaluatePrompts
from genalign.cli.main import main
from genalign.cli.parsing import parse
from genalign.cli.soup import Soup
from genalign.evaluation.evaluate import Evaluation, EvaluationProtocol, SampleRecord
from genalign.runtime.files import write_json
from genalign.training.reward_hacking import HackingReport
from genalign.worlds import shapes
from rewards.regressor import Regressor
from scripts.benchmarks import reward_gradients
from scripts.benchmarks.learned_proxies import PROXIES
from scripts.benchmarks.reward_gradients import Look, at_rise, front_records, looks
from tests.packages import ROOT

COMPARISONS = ROOT / "scripts" / "configs" / "compare"
PROTOCOL = EvaluationProtocol("s", "h", 1.0, (1.0, 0.0), "ODE", "float32", 4, (64, 64), 1, 2, "v")


@pytest.fixture(autouse=True)
def _paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read the shipped comparisons, and write results into a temporary folder."""
    monkeypatch.setattr(reward_gradients, "COMPARISONS", COMPARISONS)
    monkeypatch.setattr(reward_gradients, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(reward_gradients, "write_proxies", lambda: None)


def comparison(name: str) -> dict[str, Any]:
    settings: dict[str, Any] = yaml.safe_load((COMPARISONS / f"{name}.yaml").read_text())
    return settings


def evaluation(**scores: Sequence[float]) -> Evaluation:
    """An evaluation of as many prompts as each score has values."""
    values = [dict(zip(scores, row, strict=True)) for row in zip(*scores.values(), strict=True)]
    rows = [SampleRecord(f"prompt {n}", "t", 0, n, None, own) for n, own in enumerate(values)]
    return Evaluation(PROTOCOL, tuple(rows))


def result(tmp_path: Path, stem: str) -> dict[str, Any]:
    """The published rows by name, which must be different."""
    rows = json.loads((tmp_path / "results" / f"{stem}.json").read_text())["rows"]
    assert len({row["name"] for row in rows}) == len(rows)
    return {row["name"]: row for row in rows}


# The comparison of the family


def test_what_is_measured_is_the_end_of_every_run() -> None:
    """With held-out evaluations it would be the round that the verifier likes best."""
    settings = comparison("shapes_pathwise")
    assert all(own["held_out"] == {"every_seconds": None} for own in settings["runs"].values())
    run, _ = run_settings(str(COMPARISONS / settings["base"]), "draft", settings["runs"]["draft"])
    assert not run.held_out.is_on and run.before_after is not None and run.reward_hacking.every == 5
    assert set(reward_gradients.SCORES) <= {"strict", "partial", *run.rewards}


def test_alarms_and_minutes_of_a_run(tmp_path: Path) -> None:
    signal = {"name": "saturation", "before": 0.0, "now": 1.0, "status": "amber"}
    shift = {"mean": 1.0, "low": 0.9, "high": 1.1, "n": 4}
    rows: list[dict[str, Any]] = [
        {"round": number, "reward_hacking": None, "machine": {"seconds": 6.0 * (number + 1)}} for number in range(10)
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    values = [(row.name, row.after) for row in reward_gradients.panel_records("draft", 41, tmp_path)]
    assert values == [("draft.alarms", 0.0), ("draft.first_alarm", 10.0), ("draft.minutes", 1.0)]
    rows[4]["reward_hacking"] = [{**signal, "shift": shift}]
    assert HackingReport.from_list(rows[4]["reward_hacking"]).alarm
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [row.after for row in reward_gradients.panel_records("draft", 41, tmp_path)] == [1.0, 4.0, 1.0]


def test_what_never_comes_is_counted_beside_the_lead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}\n" * 5)
    runs = {"draft": {41: tmp_path, 42: tmp_path}}
    comes = iter([(1.0, 3.0), (5.0, 5.0)])  # the second run has neither an alarm nor a fall in its 5 rounds
    monkeypatch.setattr(reward_gradients, "compared", lambda *_, allow_failed: runs)
    monkeypatch.setattr(reward_gradients, "alarm_and_fall", lambda run, score: next(comes))
    reward_gradients.pathwise_hacking(tmp_path)
    means = {name: row["mean"] for name, row in result(tmp_path, "pathwise_hacking_shapes").items()}
    assert means == {"draft.alarm_lead": 1.0, "draft.alarms": 0.5, "draft.falls": 0.5}


# Guards at an equal rise


def test_where_the_reward_has_risen() -> None:
    place, share = at_rise([0.50, 0.54, 0.58, 0.60]) or (-1, 0.0)
    assert place == 1 and share == pytest.approx(0.25)  # a quarter of the way from 0.54 to 0.58
    assert at_rise([0.50, 0.54, 0.51]) is None


class Runs:
    """Made-up runs of shapes_pathwise_guards.yaml, with its real settings, and a stand-in for the commands.

    The settings of the first command of a kind are parsed. An evaluation of an adapter has the partial credit that
    ``partial`` gives for a part of its path, and else that of the base model.
    """

    def __init__(self, folder: Path, partial: dict[str, tuple[float, float]]) -> None:
        settings = comparison("shapes_pathwise_guards")
        self.settings, self.plain = run_settings(str(COMPARISONS / settings["base"]), "none", settings["runs"]["none"])
        self.folder, self.partial, self.parsed = folder, partial, set[str]()

    def run(self, name: str, seed: int, clip: Sequence[float]) -> Path:
        """A run whose CLIP reward before training and after rounds 1, 2, 4, ... was ``clip``."""
        folder = self.folder / name / f"seed-{seed}"
        evaluation(clip=[clip[0]] * 2, partial=[0.6, 0.7]).save(folder / "before")
        looked_at = dict(zip((1, *range(2, 2 * len(clip), 2)), clip[1:], strict=False))
        rows = [
            {"round": n - 1, "held_out": {"clip": {"mean": looked_at[n]}} if n in looked_at else None}
            for n in range(1, max(looked_at) + 1)
        ]
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
        write_json(folder / "config.json", self.plain)
        return folder

    def command(self, *arguments: str) -> None:
        kind, *rest = arguments
        if kind == "soup":
            soup, _ = parse(Soup, rest, "soup")
            assert soup.weights == [0.5] and soup.adapters[0].endswith("lora-last")
            write_json(Path(soup.output) / "soup.json", {})
            return
        plain = json.loads(Path(rest[rest.index("--config") + 1]).read_text())
        if plain["prompts"] not in self.parsed:
            settings, _ = parse(EvaluatePrompts, rest[1:], "evaluate prompts")
            assert settings.rewards.keys() == ({"clip"} if settings.prompts == "shapes:val" else set())
            self.parsed.add(plain["prompts"])
        lora = rest[rest.index("--lora") + 1].removeprefix(str(self.folder)) if "--lora" in rest else ""
        partial = next((self.partial[name] for name in self.partial if name in lora), (0.6, 0.7))
        evaluation(partial=partial, clip=(0.54, 0.54)).save(Path(plain["output"]))


def test_partial_credit_is_compared_where_both_rewards_have_risen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """none passes the rise a quarter of the way from round 2 to round 4; anchor does so with one of two seeds."""
    partial = {"round-000002": (0.58, 0.66), "round-000004": (0.5, 0.62), "half_weight": (0.6, 0.6)}
    partial["lora-last"] = partial["round-000004"]
    made = Runs(tmp_path, partial)
    rising, flat = (0.50, 0.50, 0.54, 0.58), (0.50, 0.51, 0.52, 0.53)
    runs = {
        "none": {41: made.run("none", 41, rising), 42: made.run("none", 42, rising)},
        "anchor": {41: made.run("anchor", 41, rising), 42: made.run("anchor", 42, flat)},
    }
    assert made.settings.held_out.scorers.keys() == {"clip"} and made.settings.held_out.every == 2
    assert (made.settings.training.rounds or 0) < made.settings.checkpoint.keep  # the adapter of every round remains
    lora = runs["none"][41] / "checkpoints" / "round-000004" / "lora"
    assert looks(runs["none"][41])[::3] == [Look(0.5, None), Look(0.58, lora)]

    monkeypatch.setattr(reward_gradients, "compared", lambda *_, allow_failed: runs)
    monkeypatch.setattr(reward_gradients, "DIRECTION", tmp_path)
    monkeypatch.setattr(reward_gradients, "run_genalign", made.command)
    reward_gradients.pathwise_guards(tmp_path)
    rows = result(tmp_path, "pathwise_guards_shapes")
    means = {name: row["mean"] for name, row in rows.items()}
    at_the_rise = (-0.04 - 0.05) / 2  # of the prompts: 0.6 to 0.58 - 0.08 / 4, and 0.7 to 0.66 - 0.04 / 4
    assert means == {
        "none": pytest.approx(at_the_rise),
        "none.reached": 1.0,
        "anchor": pytest.approx(at_the_rise),
        "anchor.reached": 0.5,
        "anchor.difference": pytest.approx(0.0),
        "half_weight": pytest.approx((-0.025 - 0.095) / 2),  # a quarter of the way from half to the last adapter
        "half_weight.reached": 1.0,
        "half_weight.difference": pytest.approx((-0.025 - 0.095) / 2 - at_the_rise),
    }
    assert rows["anchor.difference"]["n"] == rows["none"]["n"] == 2  # prompts


# Growth of gradients


def test_rows_of_the_gradients_growth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gradients(tail: Tail, moves: int) -> tuple[float, float]:
        return 0.01 * moves**2, 2.0 / (1 + tail.copies) if isinstance(tail, RenoisedCopies) else 2.0

    monkeypatch.setattr(reward_gradients, "gradients", gradients)
    monkeypatch.setattr(reward_gradients, "learning_memory", lambda moves: 10.0 + moves)
    monkeypatch.setattr(reward_gradients, "memory_of_kept_graphs", lambda moves: 10.0 * moves)
    reward_gradients.gradient_growth(tmp_path)
    means = {name: row["mean"] for name, row in result(tmp_path, "gradient_growth_shapes").items()}
    assert means["draft_8_over_1"] == pytest.approx(64) and means["draft_lv_2_over_0"] == pytest.approx(1 / 3)
    assert (means["draft_8.memory"], means["draft_8.memory_kept"]) == (18.0, 80.0)
    assert means["draft_lv_0"] == 2.0 and len(means) == 4 * 3 + 3 + 2


@pytest.mark.slow
def test_the_gradient_grows_with_the_moves_that_it_runs_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward_gradients, "GROWTH_SAMPLES", 3)
    one, narrow = reward_gradients.gradients(Chain(), 1)
    assert reward_gradients.gradients(Chain(), 4)[0] > one > 0 < narrow
    assert reward_gradients.gradients(RenoisedCopies(2), 1)[1] > 0


@pytest.mark.slow
def test_memory_grows_with_the_moves_where_their_graphs_are_kept() -> None:
    few, many = map(reward_gradients.learning_memory, (2, 8))
    assert few < many < 1.5 * few < reward_gradients.memory_of_kept_graphs(8)


# Mixtures


def test_mixtures_are_compared_along_the_way() -> None:
    """Red falls and bright rises in equal steps, but for red in the middle, which is above the mean of the ends."""
    red, bright = (0.4, 0.35, 0.3, 0.1, 0.0), (0.0, 0.1, 0.2, 0.3, 0.4)
    front = {
        f"share-{n / 4:.3f}": evaluation(red=[a, a + 0.2], bright=[b, b])
        for n, (a, b) in enumerate(zip(red, bright, strict=True))
    }
    gains: dict[str, list[float]] = {}
    for row in front_records(61, front):
        gains.setdefault(row.name, []).append(row.after - row.before)
    assert gains["share-1.000.red"] == pytest.approx([-0.4, -0.4])
    steps = [gains[f"share-{share}.red.step"][0] for share in ("0.250", "0.500", "0.750", "1.000")]
    assert steps == pytest.approx([-0.05, -0.05, -0.2, -0.1])
    assert gains["middle.red"] == pytest.approx([0.1, 0.1]) and gains["middle.bright"] == pytest.approx([0.0, 0.0])


def test_the_evaluation_of_mixtures_is_a_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = {name: {61: tmp_path / name} for name in comparison("shapes_tastes")["runs"]}

    def command(*arguments: str) -> None:
        kind, *rest = arguments
        soup, _ = parse(Soup, rest, "soup")
        assert kind == "soup" and soup.adapters == [str(tmp_path / "red"), str(tmp_path / "bright")]
        settings, _ = parse(EvaluatePrompts, ["--config", str(soup.evaluate), "--lora", "x"], "evaluate prompts")
        assert settings.rewards.keys() == {"red", "bright"} and settings.batch_size == 96
        for number in range(soup.points):
            share = number / (soup.points - 1)
            evaluation(red=[0.4 - share, 0.2], bright=[share, share]).save(
                Path(soup.output) / f"share-{share:.3f}" / "evaluation"
            )

    monkeypatch.setattr(reward_gradients, "compared", lambda *_, allow_failed: runs)
    monkeypatch.setattr(reward_gradients, "run_genalign", command)
    reward_gradients.soup(tmp_path)
    rows = result(tmp_path, "soup_shapes")
    assert rows["share-1.000.bright"]["mean"] == 1.0 and rows["middle.red"]["mean"] == pytest.approx(0.0)
    assert len(rows) == 2 * (4 + 4 + 1)


# The real commands, on runs of a round or two

TINY: dict[str, Any] = {
    "prompts": "prompts.jsonl",
    "training": {"rounds": 1, "prompts_per_round": 2, "group_size": 2, "batch_size": 4, "updates_per_round": 1},
    "lora": {"rank": 2, "alpha": 2},
}


def trained(name: str, arm: str, seed: int, **own: Any) -> Path:
    """Train an arm of a comparison in the working directory, on two prompts."""
    lines = [json.dumps(prompt.metadata) for prompt in shapes.prompts("train").prompts[:2]]
    Path("prompts.jsonl").write_text("\n".join(lines))
    settings = comparison(name)
    write_json(Path("own.json"), settings["runs"][arm])
    write_json(Path("tiny.json"), {**TINY, **own})
    configs = [str(COMPARISONS / settings["base"]), "own.json", "tiny.json"]
    output = Path(arm) / f"seed-{seed}"
    assert main(["train", *(part for path in configs for part in ("--config", path)), "--output", str(output)]) == 0
    return output


@pytest.mark.slow
def test_mixtures_of_two_trained_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runs = {arm: {61: trained("shapes_tastes", arm, 61, before_after=None)} for arm in ("red", "bright")}
    whole = reward_gradients.soup_evaluation(Path("soups"))
    monkeypatch.setattr(reward_gradients, "soup_evaluation", lambda output: {**whole, "samples_per_task": 2})
    monkeypatch.setattr(reward_gradients, "compared", lambda *_, allow_failed: runs)
    monkeypatch.setattr(reward_gradients, "head", lambda claim, command: {"claim": claim})
    reward_gradients.soup(tmp_path)
    assert {"middle.red", "share-0.250.bright.step", "share-1.000.bright"} <= result(tmp_path, "soup_shapes").keys()


@pytest.mark.slow
def test_adapters_of_a_trained_run_are_evaluated_at_the_rise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Regressor("shapes-clip").save(PROXIES / "head-1.safetensors")
    few = {"prompts": "shapes:val", "samples_per_task": 2, "seeds": 1}
    looked_at = {"held_out": few, "before_after": few, "training": {**TINY["training"], "rounds": 2}}
    runs = {arm: {41: trained("shapes_pathwise_guards", arm, 41, **looked_at)} for arm in ("none", "sum")}
    assert [look.lora is None or look.lora.is_dir() for look in looks(runs["none"][41])] == [True] * 3
    monkeypatch.setattr(reward_gradients, "at_rise", lambda rewards: (1, 0.5))
    monkeypatch.setattr(reward_gradients, "COMPOSITIONS", {**reward_gradients.COMPOSITIONS, "samples_per_task": 2})
    monkeypatch.setattr(reward_gradients, "compared", lambda *_, allow_failed: runs)
    monkeypatch.setattr(reward_gradients, "DIRECTION", tmp_path)
    monkeypatch.setattr(reward_gradients, "head", lambda claim, command: {"claim": claim})
    reward_gradients.pathwise_guards(tmp_path)
    rows = result(tmp_path, "pathwise_guards_shapes")
    assert {f"{name}.reached" for name in ("none", "sum", "half_weight")} <= rows.keys()
    assert {"sum.difference", "half_weight.difference"} <= rows.keys() and rows["none"]["n"] == 6
