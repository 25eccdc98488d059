"""genalign reward evaluate from the command line, on squares whose brightness is preferred."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from genalign.cli.main import main
from genalign.reward_learning.preferences import JudgedSample, Judgment, append_judgments
from genalign.runtime.media import AudioMedium
from genalign.types import Prompt
from tests.genalign.evaluation.report.pages import HOSTILE, Page

REWARDS = """
from dataclasses import dataclass
from pathlib import Path

import torch

CALLS = []

def brightness(samples, prompts):
    CALLS.append(len(samples))
    return samples.mean((1, 2, 3))

def darkness(samples, prompts):
    return -brightness(samples, prompts)

def loudness(samples, prompts):
    return samples.square().mean((1, 2))

def redness(samples, prompts):
    return samples[:, 0].mean((1, 2))

@dataclass
class Trained:
    path: str

    def __call__(self, samples, prompts):
        scores = samples.mean((1, 2, 3))
        return torch.where(scores > 0.95, torch.nan, scores)

@dataclass
class First:
    pull: float

    def __call__(self, left, right, prompts):
        return torch.sigmoid(self.pull + 40 * (left.mean((1, 2, 3)) - right.mean((1, 2, 3))))
"""

PROMPTS = 12


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "outside_brightness.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")  # of the table
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("outside_brightness", None)


def _square(path: Path, gray: int, red: int) -> JudgedSample:
    Image.new("RGB", (16, 16), (min(255, gray + red), gray, gray)).save(path)
    return JudgedSample(path, ("base", "tuned")[red > 0], 0)


def _preferences(folder: Path, name: str = "data") -> Path:
    """Pairs of a darker and a brighter square of each prompt; ada prefers the brighter, bob the first shown."""
    data = folder / name
    data.mkdir()
    judgments = []
    for number in range(PROMPTS):
        prompt = Prompt(f"square {number}" if number else HOSTILE, {"subset": "even" if number % 2 == 0 else "odd"})
        dark = _square(data / f"{number}-dark.png", 10 * number + 20, 0)
        light = _square(data / f"{number}-light.png", 10 * number + 60 + number, 20)
        shown = (dark, light) if number % 2 else (light, dark)
        brighter = (0.0, 1.0) if number % 2 else (1.0, 0.0)
        judgments.append(Judgment(prompt, shown, "pair", {"overall": brighter, "color": (0.5, 0.5)}, "ada"))
        judgments.append(Judgment(prompt, shown, "pair", {"overall": (1.0, 0.0)}, "bob"))
        judgments.append(Judgment(prompt, shown, "pair", {"overall": brighter}, "cy"))
    append_judgments(data, judgments)
    return data


def _evaluated(output: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((output / "evaluation.json").read_text())
    return content


def test_a_reward_on_preferences(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = _preferences(folder)
    command = ["reward", "evaluate", "outside_brightness:brightness", "--preferences", str(data), "--output", "out"]
    command += ["--measure.robustness", "4", "--others.red.function", "outside_brightness.redness"]
    assert main(command) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "without ties" in printed
    assert "annotator bob preferred the first sample in all 12 pairs" in printed
    found = _evaluated(folder / "out")
    measures = found["measures"]
    assert measures["accuracy/without ties"]["mean"] == 1.0 and measures["accuracy/without ties"]["n"] == PROMPTS
    assert measures["accuracy by subset/even"]["mean"] == 1.0 and "accuracy by subset/mean over subsets" in measures
    assert measures["accuracy by generators/base and tuned"]["of"] == "12 pairs"
    assert {name for name in measures if name.startswith("accuracy by margin")} == {
        "accuracy by margin/0.333",
        "accuracy by margin/1",
    }
    assert measures["position bias/annotator bob"]["mean"] == 0.5
    assert measures["agreement with annotators/reward with annotator ada"]["mean"] == 1.0
    assert measures["agreement with annotators/reward with annotator bob"]["mean"] == 0.5
    others = measures["agreement with annotators/annotator cy with the others' majority"]
    assert others["mean"] == pytest.approx(0.75)  # tied with bob's other half
    assert measures["STARC distance/reward and red"]["mean"] < 0.1
    assert measures["nuisances/brightness"]["mean"] == pytest.approx(1)
    assert "robustness/flip: decisions that flip" in measures
    assert any("all of its pairs are ties" in note for note in found["notes"])
    assert any("not known whether the reward was trained" in note for note in found["notes"])
    lines = [json.loads(line) for line in (folder / "out" / "pairs.jsonl").read_text().splitlines()]
    assert len(lines) == PROMPTS and {line["credit"] for line in lines} == {1.0}
    page = Page((folder / "out" / "report.html").read_text())
    assert "script" not in page.tags and "Accuracy by margin" in page.text and "brightness" in page.text
    assert all(address.startswith(("data:", "#")) for address in page.addresses)


def test_the_same_command_again_scores_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = _preferences(folder)
    command = ["reward", "evaluate", "outside_brightness:brightness", "--preferences", str(data), "--output", "out"]
    assert main(command) == 0
    calls = importlib.import_module("outside_brightness").CALLS
    first = _evaluated(folder / "out")
    calls.clear()
    scores = folder / "out" / "scores.jsonl"
    kept = scores.read_text().splitlines(keepends=True)
    scores.write_text("".join(kept[:-1]) + kept[-1][:10])  # cut off by a kill
    assert main(command) == 0
    assert sum(calls) == 1 and _evaluated(folder / "out") == first
    capsys.readouterr()
    assert main([*command, "--measure.scale", "2"]) == 2
    assert "holds an evaluation with other settings" in " ".join(capsys.readouterr().err.split())


def test_training_pairs_are_found_by_hash(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One of the files was copied elsewhere before training, and a sample without a score is left out."""
    data, trained = _preferences(folder), folder / "trained"
    trained.mkdir()
    Image.new("RGB", (16, 16), (255, 255, 255)).save(data / "3-light.png")
    items = [JudgedSample(data / f"{number}-dark.png").digest() for number in range(5)]
    (trained / "training_items.json").write_text(json.dumps([{"digest": one, "prompt": "any"} for one in items]))
    command = ["reward", "evaluate", "outside_brightness:Trained", "--preferences", str(data), "--output", "out"]
    assert main([*command, "--args.path", str(trained / "reward.safetensors")]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "was trained on 5 of the 24 samples, by the hash of their files, which are in 5 of the 12 pairs" in printed
    assert "1 of 12 pairs have no score and are left out" in printed
    assert "these pairs count only in the section training data" in printed
    measures = _evaluated(folder / "out")["measures"]
    assert measures["training data/pairs that were trained on"]["of"] == "4 pairs"
    assert measures["accuracy/without ties"]["of"].startswith("7 pairs")
    assert measures["agreement with annotators/reward with annotators"]["n"] == 7
    every = [JudgedSample(path).digest() for path in sorted(data.glob("*.png"))]
    (trained / "training_items.json").write_text(json.dumps([{"digest": one, "prompt": "any"} for one in every]))
    assert main([*command[:-1], "all", "--args.path", str(trained / "reward.safetensors")]) == 0
    assert "all measures are of training data, collect other pairs" in " ".join(capsys.readouterr().out.split())
    assert _evaluated(folder / "all")["measures"]["accuracy/without ties"]["of"].startswith("11 pairs")


def test_nothing_is_of_training_data_where_there_is_no_pair(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One rating of each prompt makes no pair, and one of the two items was trained on."""
    data = folder / "data"
    data.mkdir()
    squares = [_square(data / f"{number}.png", 50 * number + 20, 0) for number in range(2)]
    ratings = [Judgment(Prompt(f"square {n}"), (one,), "rating", {"overall": (n,)}) for n, one in enumerate(squares)]
    append_judgments(data, ratings)
    (folder / "items.json").write_text(json.dumps([{"digest": squares[0].digest()}]))
    command = ["reward", "evaluate", "outside_brightness:brightness", "--preferences", str(data), "--output", "out"]
    assert main([*command, "--trained_on", "items.json"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "trained on 1 of the 2 samples, by the hash of their files, which are in 0 of the 0 pairs" in printed
    assert "all measures are of training data" not in printed and "the section training data" not in printed


def test_sides_are_measured_where_their_order_is_known(folder: Path) -> None:
    """Of unnamed judgments where it is listed, of named ones unless it is unknown; the first shown is preferred."""
    data = folder / "data"
    data.mkdir()
    orders: list[tuple[str | None, tuple[int, ...] | None]] = [(None, (1, 0)), (None, ()), ("ada", ()), ("eve", None)]
    for number in range(4):
        two = _square(data / f"{number}-0.png", 20, 0), _square(data / f"{number}-1.png", 90 + number, 0)
        for place, (name, shown) in enumerate(orders):
            scores = {"overall": (0.0, 1.0) if shown else (1.0, 0.0)}
            prompt = Prompt(f"square {number} {place}")
            append_judgments(data, [Judgment(prompt, two, "pair", scores, name, shown=shown)])
    command = ["reward", "evaluate", "outside_brightness:brightness", "--preferences", str(data), "--output", "out"]
    assert main(command) == 0
    found = {name: one for name, one in _evaluated(folder / "out")["measures"].items() if name.startswith("position")}
    assert {name: (one["mean"], one["of"]) for name, one in found.items()} == {
        "position bias/all annotators": (0.5, "8 pairs"),
        "position bias/annotator ada": (0.5, "4 pairs"),
    }


def test_one_winner_against_several_of_several_files(folder: Path) -> None:
    """The brightest of three squares wins for four prompts, and the second for two."""
    lines: dict[str, list[dict[str, Any]]] = {"first": [], "second": []}
    for number in range(6):
        files = [f"{number}-{place}.png" for place in range(3)]
        for place, file in enumerate(files):
            _square(folder / file, 20 * place + 10 * number + 40, 0)
        best = 2 if number < 4 else 1
        row = {"prompt": f"square {number}", "file_path": files, "human_preference": [int(p == best) for p in range(3)]}
        lines["first" if number < 3 else "second"].append(row)
    for name, rows in lines.items():
        (folder / f"{name}.json").write_text(json.dumps(rows))
    command = ["reward", "evaluate", "outside_brightness:brightness", "--output", "out"]
    command += ["--preferences", f"[{folder / 'first.json'}, {folder / 'second.json'}]"]
    assert main(command) == 0
    found = _evaluated(folder / "out")
    winners = found["measures"]["one against several/winner above all others"]
    assert winners["mean"] == pytest.approx(4 / 6) and winners["n"] == 6
    assert winners["of"] == "6 winners, 0.333 by chance"
    assert found["measures"]["accuracy/without ties"]["mean"] == pytest.approx(10 / 12)
    assert not any(name.startswith("position bias") for name in found["measures"])  # nobody is named
    assert found["settings"]["preferences"] == [str(folder / "first.json"), str(folder / "second.json")]
    assert main(command) == 0 and _evaluated(folder / "out") == found


def test_a_judge_of_pairs_in_both_orders(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = _preferences(folder)
    command = ["reward", "evaluate", "outside_brightness:First", "--preferences", str(data), "--pairwise", "true"]
    assert main([*command, "--args.pull", "0", "--output", "fair"]) == 0
    assert main([*command, "--args.pull", "9", "--output", "biased"]) == 0
    fair, biased = (_evaluated(folder / name)["measures"] for name in ("fair", "biased"))
    assert fair["position bias/judge"]["mean"] == pytest.approx(0, abs=1e-6)
    assert (
        fair["position bias/same sample in both orders"]["mean"] == 1.0 and fair["accuracy/without ties"]["mean"] == 1
    )
    assert biased["position bias/judge"]["low"] > 0.1
    assert biased["position bias/same sample in both orders"]["mean"] < 1
    assert biased["accuracy/without ties"]["mean"] < 1
    capsys.readouterr()
    assert main([*command, "--args.pull", "0", "--output", "x", "--samples", str(data)]) == 2
    assert "leave out samples, truth and others" in " ".join(capsys.readouterr().err.split())


def test_samples_with_a_truth(folder: Path) -> None:
    """Six squares of each prompt: brightness is the reward, and the truth is darkness or brightness."""
    samples = folder / "samples"
    samples.mkdir()
    lines, generator = [], torch.Generator().manual_seed(0)
    for number in range(8):
        for place, gray in enumerate(torch.randint(0, 200, (6,), generator=generator).tolist()):
            _square(samples / f"{number}-{place}.png", gray, 0)
            lines.append({"file_name": f"{number}-{place}.png", "prompt": f"square {number}"})
    (samples / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    command = ["reward", "evaluate", "outside_brightness:brightness", "--samples", str(samples)]
    assert main([*command, "--output", "same", "--truth", "outside_brightness.brightness"]) == 0
    assert main([*command, "--output", "opposite", "--truth", "outside_brightness.darkness"]) == 0
    same, opposite = _evaluated(folder / "same"), _evaluated(folder / "opposite")
    assert [point["n"] for point in same["best_of_n"]] == [1, 2, 3, 4, 5, 6]
    assert (
        same["measures"]["best of n/gain in truth"]["low"] > 0 > opposite["measures"]["best of n/gain in truth"]["high"]
    )
    assert same["measures"]["order within prompts/Kendall's tau-b"]["mean"] == pytest.approx(1)
    assert opposite["measures"]["STARC distance/reward and truth"]["mean"] == pytest.approx(1)
    gains = [found["measures"]["best of n/gain in truth"]["of"] for found in (same, opposite)]
    assert gains == ["highest at n = 6", "highest at n = 1"]
    assert same["measures"]["accuracy/without ties"]["mean"] == 1 and same["counts"]["pairs"] == 8 * 15
    assert "Truth of the best of n" in Page((folder / "same" / "report.html").read_text()).text


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "nothing to measure on: give preferences"),
        (["--preferences", "nowhere"], "there is no nowhere"),
        (["--preferences", "data", "--measure.dimension", "taste"], "no judgment has the dimension 'taste'"),
        (["--preferences", "data", "--others.truth.function", "outside_brightness.redness"], "choose another"),
        (["--preferences", "data", "--trained_on", "nowhere.json"], "nowhere.json"),
    ],
)
def test_bad_input_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str) -> None:
    _preferences(folder)
    assert main(["reward", "evaluate", "outside_brightness:brightness", "--output", "out", *more]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_reward_that_fails_is_one_line_and_the_output_is_free_for_the_right_one(
    folder: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    data = _preferences(folder)
    command = ["reward", "evaluate", "rewards.learned:LearnedReward", "--preferences", str(data), "--output", "out"]
    assert main([*command, "--args.path", "nowhere"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "reward failed on a first batch: FileNotFoundError: there is no nowhere" in error
    assert not [record for record in caplog.records if record.levelname != "INFO"]
    assert main(["reward", "evaluate", "outside_brightness:brightness", *command[3:]]) == 0


def test_clips_of_one_sample_rate(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The louder of two tones is preferred, and loudness is its reward: the level, which a gain lowers for both."""
    data, medium = folder / "data", AudioMedium(8000)
    data.mkdir()
    judgments = []
    for number in range(6):
        samples = []
        for name, gain in (("soft", 0.1 + 0.02 * number), ("loud", 0.5)):
            tone = gain * torch.sin(torch.arange(2000)[None] * (0.1 + 0.02 * number))
            (data / f"{number}-{name}.wav").write_bytes(medium.encode(tone))
            samples.append(JudgedSample(data / f"{number}-{name}.wav"))
        judgments.append(Judgment(Prompt(f"tone {number}"), tuple(samples), "pair", {"overall": (0.0, 1.0)}))
    append_judgments(data, judgments)
    command = ["reward", "evaluate", "outside_brightness:loudness", "--preferences", str(data), "--output", "out"]
    assert main(command) == 0
    measures = _evaluated(folder / "out")["measures"]
    assert measures["accuracy/without ties"]["mean"] == 1 and measures["nuisances/level"]["mean"] > 0.9
    assert measures["robustness/gain: shift of the score"]["high"] < 0
    assert measures["robustness/gain: decisions that flip"]["mean"] == 0
    (data / "5-loud.wav").write_bytes(AudioMedium(16000).encode(torch.zeros(1, 2000)))
    capsys.readouterr()
    assert main([*command[:-1], "other"]) == 2
    assert "at 16000 Hz, but the first sample at 8000" in " ".join(capsys.readouterr().err.split())
