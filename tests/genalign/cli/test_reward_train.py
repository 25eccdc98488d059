"""genalign reward train: from a folder of judgments to a reward that can be used."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from genalign.cli import reward_train
from genalign.cli.main import main
from genalign.cli.parsing import parse
from genalign.evaluation.report.words import number, percent
from genalign.reward_learning.label_noise import EnsembleVote, Smoothing
from genalign.reward_learning.preferences import COMPARISONS, PREFERENCES, JudgedSample, Judgment, append_judgments
from genalign.runtime.media import read_image, save_images
from genalign.types import Prompt
from genalign.worlds.shapes.prompts import prompts as shapes_prompts
from genalign.worlds.shapes.scenes import render_metadata
from rewards.learned import LearnedReward
from tests.genalign.evaluation.report.pages import Page
from tests.genalign.reward_learning.toy_rewards import write_judgments
from tests.packages import folder_of

CONFIG = folder_of("scripts") / "configs/reward/shapes_clip.yaml"


def write_shapes_pairs(folder: Path, count: int) -> Path:
    """Judge a scene of each prompt against one of another prompt; the first is right in every other pair."""
    rng = np.random.default_rng(0)
    known = shapes_prompts("train").prompts
    chosen = sorted((known[place] for place in rng.permutation(len(known))[:count]), key=_task)
    right, wrong = (
        render_metadata([prompt.metadata for prompt in prompts if prompt.metadata], rng)
        for prompts in (chosen, chosen[1:] + chosen[:1])
    )
    paths = [folder / "images" / f"{number:05d}.png" for number in range(2 * count)]
    (folder / "images").mkdir(parents=True)
    swapped = torch.arange(count) % 2 == 1
    pairs = torch.where(
        swapped[:, None, None, None, None], torch.stack([wrong, right], 1), torch.stack([right, wrong], 1)
    )
    save_images(pairs.flatten(0, 1), paths)
    judgments = [
        Judgment(
            Prompt(prompt.text),
            (JudgedSample(paths[2 * number]), JudgedSample(paths[2 * number + 1])),
            scores={"overall": (0.0, 1.0) if number % 2 else (1.0, 0.0)},
            annotator="verifier",
        )
        for number, prompt in enumerate(chosen)
    ]
    append_judgments(folder, judgments)
    return folder


def _task(prompt: Prompt) -> str:
    assert prompt.metadata is not None
    return str(prompt.metadata["tag"])


def config(folder: Path, **settings: Any) -> str:
    """Write a configuration of a small training on shapes-clip."""
    plain = {
        "output": str(folder / "run"),
        "preferences": str(folder / "pairs"),
        "held_out_fraction": 0.25,
        "encoder": {"class_path": "rewards.learned_encoders.ClipTokens", "init_args": {"model": "shapes-clip"}},
        "fit": {"epochs": 12, "optimizer": {"learning_rate": 3e-3}},
    }
    path = folder / "reward.yaml"
    path.write_text(yaml.safe_dump(plain | settings))
    return str(path)


def test_200_pairs_teach_shapes_clip_which_scene_is_right(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shapes_pairs(tmp_path / "pairs", 200)
    path = config(tmp_path, uncertainty={"precision": "evidence"})
    assert main(["reward", "train", "--config", path]) == 0
    printed = capsys.readouterr().out
    assert "training: 150 of 150 judgments of 150 prompts" in printed and "held-out: 50 of 50" in printed
    run = tmp_path / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    accuracy = lines[-1]["held_out"]["accuracy"]["overall"]
    assert accuracy["mean"] > 0.8 and accuracy["low"] > 0.8 and len(lines) == 12
    card = (run / "card.md").read_text()
    assert f"| overall | {accuracy['mean']:.3f}" in card and "150 pairs of 300 samples" in card
    assert "Expected calibration error" in card and "Prior precision" in card
    listed = json.loads((run / "training_items.json").read_text())
    assert len(listed) == 300 and set(listed[0]) == {"digest", "prompt"}
    data = json.loads((run / "data.json").read_text())
    whole = {"read": 50, "left_out": {}, "kinds": {"pair": 50}, "annotators": {"verifier": 50}, "prompts": 50}
    assert data["held_out"] == whole | {"samples": 100} and data["training"]["kinds"] == {"pair": 150}
    assert f"report: {run / 'report.html'}" in printed
    page, held_out = page_text(run), lines[-1]["held_out"]
    assert f"held-out accuracy {percent(accuracy['mean'])} calibration error {percent(held_out['calibration'])}" in page
    low, high = percent(accuracy["low"]), percent(accuracy["high"])
    assert f"overall {percent(accuracy['mean'])} {low} to {high} 50" in page and "Used, of the kind pair 150 50" in page
    for line in lines:
        assert f"{percent(line['held_out']['calibration'])} at {line['epoch']:g} epochs" in page
    assert "Expected calibration error of sigmoid" in page and "not finished" not in page
    (run / "report.html").unlink()
    assert main(["report", str(run)]) == 0 and page_text(run) == page
    reward = LearnedReward(run)
    images = torch.stack([read_image(tmp_path / "pairs/images" / f"0000{number}.png") for number in (0, 1)])
    text = json.loads((tmp_path / "pairs" / PREFERENCES).read_text().splitlines()[0])["prompt"]
    scores = reward(images, [Prompt(text)] * 2)
    assert scores[0] > scores[1] and (reward.uncertainty(images, [Prompt(text)] * 2) > 0).all()
    # a finished training is not made again, and another configuration is refused
    before = (run / "reward.safetensors").read_bytes()
    assert main(["reward", "train", "--config", path]) == 0
    assert (run / "reward.safetensors").read_bytes() == before
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 12
    assert main(["reward", "train", "--config", path, "--fit.epochs", "13"]) == 2
    assert "is of a training with another fit" in capsys.readouterr().err
    assert (
        main(["reward", "check", "rewards.learned:LearnedReward", "--args.path", str(run), "--samples", "shapes:val"])
        == 0
    )


def page_text(run: Path) -> str:
    """The text of a page, without the date on which it was written."""
    text = Page((run / "report.html").read_text()).text.replace("\N{NO-BREAK SPACE}", " ")
    return text.partition("Page written")[0]


def test_an_interrupted_command_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append_judgments(tmp_path / "pairs", write_judgments(tmp_path / "pairs", 24))
    parts: dict[str, Any] = {
        "votes": {"members": 2, "share": 0.2},
        "disentangle": {"nuisances": {"red": "tests.genalign.cli.test_reward_train.redness"}},
        "fit": {"epochs": 4, "members": 2},
    }
    path = config(tmp_path, **parts)
    line, shown = reward_train._line, list[int]()

    def killed(metrics: Any, steps: int) -> str:
        shown.append(metrics["step"])
        if len(shown) == 2:
            raise KeyboardInterrupt
        return line(metrics, steps)

    monkeypatch.setattr(reward_train, "_line", killed)
    with pytest.raises(KeyboardInterrupt):
        main(["reward", "train", "--config", path])
    assert main(["report", str(tmp_path / "run")]) == 0
    assert "not finished: 2 of 4 epochs" in page_text(tmp_path / "run")
    assert main(["reward", "train", "--config", path]) == 0
    whole = config(tmp_path, **parts, output=str(tmp_path / "whole"))
    assert main(["reward", "train", "--config", whole]) == 0
    for name in ("reward.safetensors", "metrics.jsonl", "changed_pairs.jsonl", "training_items.json"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert "| red | " in (tmp_path / "run/card.md").read_text()
    run = tmp_path / "run"
    held_out = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["held_out"]
    listed = [json.loads(line) for line in (run / "changed_pairs.jsonl").read_text().splitlines()]
    text, votes = page_text(run), json.loads((run / "data.json").read_text())["votes"]
    assert votes["changed"] == len(listed) > 0
    assert f"Labels dropped by the vote of 2 members: {len(listed)} of {votes['labels']} " in text
    for line in listed:
        assert [JudgedSample(run / name).digest() for name in line["files"]] == line["digests"]
        assert line["prompt"] in text
    for place, one in enumerate(held_out["members"]["overall"], start=1):
        assert f"member {place} {percent(one['mean'])} {percent(one['low'])} to" in text
    own = held_out["nuisances"]["red"]
    assert f"score {number(own['score'])}, its own output {number(own['own'])}" in text


def redness(samples: torch.Tensor, prompts: Any) -> torch.Tensor:
    return samples[:, 0].mean((1, 2))


def test_the_example_configuration_is_read() -> None:
    settings, _ = parse(reward_train.RewardTrain, ["--config", str(CONFIG)], "reward train")
    assert settings.fit.members == 4 and isinstance(settings.label_noise, Smoothing)
    assert [type(term).__name__ for term in settings.objective.regularizers] == ["Centering"]
    settings, _ = parse(reward_train.RewardTrain, ["--config", str(CONFIG), "--votes.share", "0.2"], "reward train")
    assert settings.votes == EnsembleVote(share=0.2)


def test_an_ensemble_on_pairs_is_centered_by_default(tmp_path: Path) -> None:
    path = config(tmp_path)

    def terms(*arguments: str) -> list[str]:
        settings, _ = parse(reward_train.RewardTrain, ["--config", path, *arguments], "reward train")
        assert settings.objective.centered == bool(settings.objective.regularizers or settings.loss)
        return [type(term).__name__ for term in settings.objective.regularizers]

    ensemble = ("--fit.members", "2")
    assert terms() == [] and terms(*ensemble) == ["Centering"]
    assert terms(*ensemble, "--regularizers", "[]") == []
    assert terms(*ensemble, "--loss", "genalign.reward_learning.preference_losses.Regression") == []


def wrong(capsys: pytest.CaptureFixture[str], path: str, *more: str) -> str:
    assert main(["reward", "train", "--config", path, *more]) == 2
    return capsys.readouterr().err


def test_wrong_input_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    judgments = write_judgments(tmp_path / "pairs", 12)
    append_judgments(tmp_path / "pairs", judgments)
    path = config(tmp_path)
    regression = ["--loss", "genalign.reward_learning.preference_losses.Regression"]
    assert "Regression learns from judgments of the kind rating, of which none is left" in wrong(
        capsys, path, *regression
    )
    assert "exclude_annotators names 'bob'" in wrong(capsys, path, "--exclude_annotators", "[bob]")
    assert "of the kind pair or ranking, of which none is left" in wrong(capsys, path, "--exclude_annotators", "[ada]")
    ensemble = ["--fit.members", "2", "--encoder.init_args.blocks", "1"]
    assert "share one encoder, which must be frozen" in wrong(capsys, path, *ensemble)
    clap = {
        "class_path": "rewards.learned_encoders.ClapTokens",
        "init_args": {"model": "tones-clap", "sample_rate": 16000},
    }
    other = config(tmp_path, encoder=clap, output=str(tmp_path / "other"))
    assert "ClapTokens is an encoder of sound, and a sample of" in wrong(capsys, other)
    assert "fit.patience needs held-out" in wrong(capsys, path, "--fit.patience", "2", "--held_out_fraction", "0")
    mixed = tmp_path / "mixed"
    append = write_judgments(mixed, 3, "rating") + write_judgments(mixed, 3, "label", seed=5)
    append_judgments(mixed, append)
    assert "the judgments mix ratings" in wrong(capsys, path, "--preferences", str(mixed), "--held_out_fraction", "0")
    assert "there is no" in wrong(capsys, path, "--preferences", str(tmp_path / "none"))
    assert "no judgment has the dimension 'taste': there are overall" in wrong(capsys, path, "--dimensions", "[taste]")
    append_judgments(tmp_path / "pairs", [replace(one, scores={}) for one in judgments], COMPARISONS)
    unjudged = str(tmp_path / "pairs" / COMPARISONS)
    assert "have no scores: make them with genalign reward label" in wrong(capsys, path, "--preferences", unjudged)
    assert "LastLayerLaplace is of one member that learns from pairs" in wrong(
        capsys,
        config(tmp_path, disentangle={"nuisances": {"red": f"{__name__}.redness"}}, output=str(tmp_path / "early")),
        *("--uncertainty.precision", "1"),
    )
    assert not (tmp_path / "early").exists()  # before anything is encoded
    assert "are training samples as well" in wrong(capsys, path, "--held_out", str(tmp_path / "pairs"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    assert "is not empty and holds no training" in wrong(capsys, path, "--output", str(tmp_path / "full"))
