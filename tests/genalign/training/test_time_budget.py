"""The number of rounds that fits a time budget: how it is chosen, recorded, retained and overridden."""

from __future__ import annotations

import json
import logging
import signal
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from genalign.__main__ import main
from genalign.runtime.distributed import SINGLE_PROCESS, ProcessGroup
from genalign.runtime.files import load_state
from genalign.training import time_budget
from genalign.training.reward_hacking import due
from genalign.training.settings import FittedSettings
from genalign.training.time_budget import RoundFitter, TimeBudget, rounds_in
from genalign.training.trainer import Trainer
from tests.genalign.training.toy_runs import signals

RATE = 0.01
ONE_SAMPLE = ["--before_after.samples_per_task=1", "--before_after.seeds=1"]
DEMO = TimeBudget(training_minutes=5, total_minutes=8, min_rounds=8)


def test_the_rounds_that_fit_take_no_longer_with_what_is_observed_between_them() -> None:
    """Every number of rounds up to the chosen one is within the time, and one more is not."""
    every = 4
    for seconds in (0.0, 9.9, 10.0, 55.0, 60.0, 61.0, 250.0):
        rounds = rounds_in(seconds, 10.0, 5.0, lambda number, last: due(number, every, last))

        def cost(total: int) -> float:
            return sum(10.0 + 5.0 * due(number, every, number == total) for number in range(2, total + 1))

        assert cost(rounds) <= seconds < cost(rounds + 1), seconds
    assert rounds_in(100.0, 10.0, 5.0, lambda *_: False) == 11
    assert rounds_in(-1.0, 10.0, 0.0, lambda *_: False) == 1


@dataclass
class FakeTrainer:
    """What a fitter needs of a trainer whose first round took ``seconds``."""

    seconds: float
    settings: FittedSettings = field(default_factory=FittedSettings)
    processes: ProcessGroup = SINGLE_PROCESS


@pytest.mark.parametrize(
    ("speed", "training", "total"), [(0.5, (240, 270), 330), (1.0, (230, 270), 370), (2.0, (200, 270), 450)]
)
def test_a_command_ends_in_time_on_machines_of_any_speed(
    speed: float, training: tuple[float, float], total: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading, evaluations, rounds and looks take ``speed`` times 15, 25, 12 and 6 s."""
    begun = speed * (15 + 25)
    monkeypatch.setattr(time_budget.time, "monotonic", lambda: begun + speed * (12 + 6))
    recorded: list[int] = []
    fitter = RoundFitter(DEMO, 0.0, speed * 25, [8], recorded.append, training_started=begun)
    rounds = fitter.fit(trainer := FakeTrainer(speed * 12))
    assert trainer.settings.rounds == rounds == recorded[0] > 8
    looks = sum(due(number, 8, number == rounds) for number in range(1, rounds + 1))
    seconds = speed * (12 * rounds + 6 * looks)
    assert training[0] <= seconds <= training[1]
    assert begun + seconds + speed * 25 <= total < 480


@pytest.mark.parametrize(("budget", "fits"), [(DEMO, 1), (TimeBudget(training_minutes=1), 1), (TimeBudget(5), 4)])
def test_too_little_time_is_a_line_and_the_fewest_rounds_allowed(
    budget: TimeBudget, fits: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Rounds of 60 s after 340 s of loading and evaluation, which takes 300 s at the end again."""
    caplog.set_level(logging.INFO, "genalign")
    monkeypatch.setattr(time_budget.time, "monotonic", lambda: 400.0)
    fitter = RoundFitter(budget, 0.0, 300.0, [], lambda rounds: None, training_started=340.0)
    rounds = fitter.fit(FakeTrainer(60.0))
    assert rounds == max(fits, budget.min_rounds)
    (line,) = caplog.messages
    assert ("the minimum, although only 1 fit the time budget" in line) == (fits == 1)
    assert "the first took 60.0 s" in line and f"about 0:{rounds:02d}:00 of training" in line
    warm = FittedSettings(warmup_rounds=20)  # the schedule needs a round after its warm-up
    assert fitter.fit(FakeTrainer(60.0, warm)) == 21


def test_evaluations_at_intervals_of_time_are_counted_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds of 10 s and looks of 5 s in 90 % of 1000 s after the first: every 10 rounds, or every second one."""
    monkeypatch.setattr(time_budget.time, "monotonic", lambda: 15.0)
    budget = TimeBudget(training_minutes=1015 / 60)
    rare, often = (
        RoundFitter(budget, 0.0, 0.0, [], lambda rounds: None, seconds, training_started=0.0).fit(FakeTrainer(10.0))
        for seconds in (100.0, 20.0)
    )
    assert (rare, often) == (86, 72)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"training_minutes": 0.0}, r"time_budget\.training_minutes must be positive, not 0\.0; null sets no limit"),
        ({"total_minutes": -1.0}, r"time_budget\.total_minutes must be positive"),
        ({"min_rounds": 1}, r"time_budget\.min_rounds must be at least 2, not 1"),
    ],
)
def test_impossible_budgets_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TimeBudget(**settings)


# --- runs -------------------------------------------------------------------------------------------------------------


def _arguments(model: Path, work: Path) -> list[str]:
    """A run on two prompts whose rounds are fitted to three hours."""
    (work / "prompts.txt").write_text("a red circle\ntwo squares")
    training = {"group_size": 4, "learning_rate": RATE, "learning_rate_schedule": "linear", "updates_per_round": 1}
    values = {
        "model.path": model,
        "prompts": work / "prompts.txt",
        "recipe": "genalign.flow_grpo",
        "rewards.red.function": "tests.genalign.training.toy_runs.signaling",
        "sampling": '{"num_steps": 2, "sigmas": [1.0, 0.5]}',
        "training": json.dumps(training),
        "time_budget.training_minutes": 180,
        "lora.rank": 2,
    }
    return ["train", *(f"--{name}={value}" for name, value in values.items())]


@pytest.fixture
def arguments(tiny_folder: Path, tmp_path: Path) -> list[str]:
    """A run whose rounds are fitted to a time budget."""
    return _arguments(tiny_folder, tmp_path)


@pytest.fixture(scope="module")
def given(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the same run with three rounds that are given, which override the budget."""
    work = tmp_path_factory.mktemp("given")
    assert main([*_arguments(tiny_folder, work), f"--output={work / 'run'}", "--training.rounds=3"]) == 0
    return work / "run"


@pytest.fixture
def three(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if three rounds fitted the budget; a second fit in one process would be an error."""
    answers = [3]
    monkeypatch.setattr(time_budget, "rounds_in", lambda *_: answers.pop())


def _rows(run: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("machine")
    return rows


def _rounds(run: Path) -> int | None:
    rounds: int | None = json.loads((run / "config.json").read_text())["training"]["rounds"]
    return rounds


def _require_equal(run: Path, other: Path) -> None:
    assert _rows(run) == _rows(other) and _rounds(run) == _rounds(other) == 3
    first, second = (load_state(path / "lora" / "pytorch_lora_weights.safetensors")[0] for path in (run, other))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.usefixtures("three")
def test_a_run_that_fits_its_rounds_is_one_with_that_number_of_rounds(
    arguments: list[str], given: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "genalign")
    run = tmp_path / "run"
    assert main([*arguments, f"--output={run}"]) == 0
    rates = [row["learning_rate"] for row in _rows(run)]
    assert rates == pytest.approx([RATE, RATE * 2 / 3, RATE / 3])  # the schedule ends with the run
    assert sum("3 rounds (training.rounds) fit the time budget; the first took" in m for m in caplog.messages) == 1
    assert any("round 1/3: " in message for message in caplog.messages)
    _require_equal(run, given)


@pytest.mark.usefixtures("three")
@pytest.mark.parametrize("by_name", [True, False])
def test_a_resumed_run_keeps_the_number_of_rounds(
    arguments: list[str], given: Path, tmp_path: Path, by_name: bool
) -> None:
    run = tmp_path / "run"
    signals.append(signal.SIGTERM)
    assert main([*arguments, f"--output={run}"]) == 143 and len(_rows(run)) == 1 and _rounds(run) == 3
    assert main(["train", "--resume", str(run)] if by_name else [*arguments, f"--output={run}", "--resume"]) == 0
    _require_equal(run, given)


@pytest.mark.usefixtures("three")
def test_a_run_that_dies_in_its_first_round_fits_its_rounds_when_it_is_resumed(
    arguments: list[str], given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as context, pytest.raises(RuntimeError, match="lost"):
        context.setattr(Trainer, "sample", Mock(side_effect=RuntimeError("lost")))
        main([*arguments, f"--output={run}"])
    assert _rounds(run) is None and not (run / "metrics.jsonl").exists()
    assert main(["report", str(run)]) == 0 and "not finished: 0 rounds" in (run / "report.html").read_text()
    assert main(["train", "--resume", str(run)]) == 0
    _require_equal(run, given)


def test_the_evaluation_after_training_is_expected_to_take_as_long_as_the_one_before_it(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No time is left, as if everything were used up, so that the run has the two rounds of the shortest."""
    run, spent = tmp_path / "run", list[float]()
    monkeypatch.setattr(TimeBudget, "seconds_left", lambda _, *seconds: spent.extend(seconds) or 0.0)
    assert main([*arguments, f"--output={run}", "--before_after.prompts=shapes:len", *ONE_SAMPLE]) == 0
    training, total, afterwards = spent
    assert afterwards == json.loads((run / "before" / "cost.json").read_text())["seconds"] > 0
    assert 0 < training < total - afterwards  # which counts the loading and the evaluation before, too
    assert len(_rows(run)) == _rounds(run) == 2


def test_a_run_without_a_budget_has_100_rounds(arguments: list[str], tmp_path: Path) -> None:
    arguments = [word for word in arguments if "time_budget" not in word]
    assert main([*arguments, f"--output={tmp_path / 'run'}", "--training.max_nfe=1"]) == 0
    assert _rounds(tmp_path / "run") == 100 and len(_rows(tmp_path / "run")) == 1


def test_a_plan_says_that_rounds_are_fitted(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *arguments[1:], f"--output={tmp_path / 'run'}"]) == 0
    assert "as many as fit time_budget, counted as 100" in " ".join(capsys.readouterr().out.split())


def test_all_ranks_take_the_number_of_the_main_rank() -> None:
    class Other(ProcessGroup):
        def all_gather_object(self, value: Any) -> list[Any]:
            return [[7, 7], value]

    trainer = FakeTrainer(1.0, processes=Other(1, 2))
    recorded: list[int] = []
    assert RoundFitter(TimeBudget(60), 0.0, 0.0, [], recorded.append).fit(trainer) == 7
    assert trainer.settings == replace(FittedSettings(), rounds=7) and not recorded
