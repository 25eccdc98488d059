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
from genalign.metrics.image import brightness
from genalign.reward_learning.label_noise import EnsembleVote, Smoothing
from genalign.reward_learning.measures import correlation_within_prompts
from genalign.reward_learning.preferences import COMPARISONS, PREFERENCES, JudgedSample, Judgment, append_judgments
from genalign.runtime.media import AudioMedium, read_image, save_images
from genalign.types import Prompt
from genalign.worlds.shapes.prompts import prompts as shapes_prompts
from genalign.worlds.shapes.scenes import render_metadata
from genalign.worlds.tones import SAMPLE_RATE
from rewards.learned import LearnedReward
from tests.genalign.evaluation.report.pages import Page
from tests.genalign.reward_learning.toy_rewards import PixelTokens, write_judgments
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
    assert "has a training with another fit" in capsys.readouterr().err
    assert (
        main(["reward", "check", "rewards.learned:LearnedReward", "--args.path", str(run), "--samples", "shapes:val"])
        == 0
    )


def test_an_evaluation_of_a_trained_reward_leaves_out_what_it_was_trained_on(tmp_path: Path) -> None:
    """The second dimension is the opposite of the first, so that their accuracies sum to 1."""
    pairs, run = tmp_path / "pairs", tmp_path / "run"
    judgments = [
        replace(one, scores={**one.scores, "dark": one.scores["overall"][::-1]}) for one in write_judgments(pairs, 24)
    ]
    append_judgments(pairs, judgments)
    assert main(["reward", "train", "--config", config(tmp_path)]) == 0
    evaluate = ["reward", "evaluate", "rewards.learned:LearnedReward", "--args.path", str(run)]
    evaluate += ["--preferences", str(pairs), "--measure.robustness", "0", "--output", str(tmp_path / "trust")]
    assert main(evaluate) == 0
    found = json.loads((tmp_path / "trust/evaluation.json").read_text())
    measures, counts = found["measures"], found["counts"]
    assert counts["pairs trained on"] == 18 and counts["items trained on"] == 36 and counts["pairs"] == 24
    assert measures["training data/pairs that were trained on"]["of"] == "18 pairs"
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["held_out"]["accuracy"]["overall"]
    by_dimension = [measures[f"accuracy by dimension/{name}"] for name in ("overall", "dark")]
    assert [one["of"] for one in by_dimension] == ["6 pairs"] * 2 and last["n"] == 6
    assert [one["mean"] for one in by_dimension] == pytest.approx([last["mean"], 1 - last["mean"]])
    assert measures["accuracy/without ties"]["mean"] == pytest.approx(last["mean"]) and last["mean"] != 0.5
    # the card has the nuisances of the held-out samples, which the command measures as well
    trained_on = {entry["digest"] for entry in json.loads((run / "training_items.json").read_text())}
    items = [(one.prompt, sample) for one in judgments for sample in one.samples if sample.digest() not in trained_on]
    images, texts = torch.stack([sample.read() for _, sample in items]), [prompt for prompt, _ in items]
    scores = [LearnedReward(run, name)(images, texts) for name in ("overall", "dark")]
    prompt = torch.tensor([texts.index(text) for text in texts])
    wanted = [correlation_within_prompts(own, brightness(images), prompt) for own in scores]
    (row,) = (line for line in (run / "card.md").read_text().splitlines() if line.startswith("| brightness |"))
    cells = [cell.strip() for cell in row.split("|")[2:4]]
    assert [float(cell.split()[0]) for cell in cells] == pytest.approx([one.mean for one in wanted], abs=2e-3)
    assert "| pixels | - | - |" in (run / "card.md").read_text()


def test_clips_teach_tones_clap_which_of_them_is_a_tone(tmp_path: Path) -> None:
    pairs, generator = tmp_path / "pairs", torch.Generator().manual_seed(0)
    pairs.mkdir()
    judgments, seconds = [], torch.arange(SAMPLE_RATE) / SAMPLE_RATE
    for place in range(12):
        tone = 0.5 * torch.sin(2 * torch.pi * (300 + 40 * place) * seconds)
        noise = 0.3 * torch.rand(SAMPLE_RATE, generator=generator) - 0.15
        samples = []
        for name, clip in {"tone": tone, "noise": noise}.items():
            (pairs / f"{place}-{name}.wav").write_bytes(AudioMedium(SAMPLE_RATE).encode(clip[None]))
            samples.append(JudgedSample(pairs / f"{place}-{name}.wav"))
        shown, scores = (samples, (1.0, 0.0)) if place % 2 else (samples[::-1], (0.0, 1.0))
        judgments.append(Judgment(Prompt(f"a tone, number {place}"), tuple(shown), scores={"overall": scores}))
    append_judgments(pairs, judgments)
    arguments = {"model": "tones-clap", "sample_rate": SAMPLE_RATE}
    clap = {"class_path": "rewards.learned_encoders.ClapTokens", "init_args": arguments}
    assert main(["reward", "train", "--config", config(tmp_path, encoder=clap)]) == 0
    run = tmp_path / "run"
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["held_out"]["accuracy"]["overall"]
    assert last["mean"] == 1.0 and last["n"] == 3
    assert "| spectral centroid | " in (run / "card.md").read_text()
    reward, clips = LearnedReward(run), torch.stack([one.read() for one in judgments[1].samples])
    tone_score, noise_score = reward(clips, [judgments[1].prompt] * 2)
    assert reward.sample_rate == SAMPLE_RATE and tone_score > noise_score


def test_a_trained_encoder_reads_images_of_several_sizes_in_batches_of_encode_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judgments = write_judgments(tmp_path / "pairs", 24, "label")
    append_judgments(tmp_path / "pairs", judgments)
    for judgment in judgments[::2]:
        (path,) = (sample.content for sample in judgment.samples[:1])
        assert isinstance(path, Path)
        save_images(read_image(path)[None].repeat(1, 1, 2, 2), [path])
    batches, forward = list[int](), PixelTokens.forward

    def counted(self: PixelTokens, samples: torch.Tensor, prompts: Any) -> torch.Tensor:
        batches.append(len(samples))
        return forward(self, samples, prompts)

    monkeypatch.setattr(PixelTokens, "forward", counted)
    parts: dict[str, Any] = {
        "encoder": {"class_path": f"{PixelTokens.__module__}.PixelTokens", "init_args": {"trainable": True}},
        "loss": {"class_path": "genalign.reward_learning.preference_losses.LabelPool"},
        "encode_batch": 5,
    }
    assert main(["reward", "train", "--config", config(tmp_path, **parts)]) == 0
    assert max(batches) == 5
    card, page = (tmp_path / "run/card.md").read_text(), page_text(tmp_path / "run")
    held_out = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])["held_out"]
    assert f"Expected calibration error of sigmoid(score): {held_out['calibration']:.3f}." in card
    assert f"calibration error {percent(held_out['calibration'])}" in page
    assert "| pixels | +" in card or "| pixels | -0" in card  # sizes differ within prompts


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


def test_several_rounds_of_judgments_are_joined(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both rounds are of the same eight prompts, of which two are held out in both."""
    first, second = tmp_path / "first", tmp_path / "second"
    for seed, folder in enumerate((first, second)):
        append_judgments(folder, write_judgments(folder, 8, seed=seed))
    pixels = {"class_path": "tests.genalign.reward_learning.toy_rewards.PixelTokens"}
    path = config(tmp_path, preferences=[str(first), str(second)], encoder=pixels, fit={"epochs": 2})
    assert main(["reward", "train", "--config", path]) == 0
    printed = capsys.readouterr().out
    assert "training: 12 of 12 judgments of 6 prompts" in printed and "held-out: 4 of 4 judgments of 2" in printed
    run = tmp_path / "run"
    assert f"# A reward learned from {first}, {second}\n" in (run / "card.md").read_text()
    assert f"A reward learned from {first}, {second}" in page_text(run)
    before = (run / "reward.safetensors").read_bytes()
    assert main(["reward", "train", "--config", path, "--preferences", f"[{first}, {second}]"]) == 0
    assert (run / "reward.safetensors").read_bytes() == before
    assert "has a training with another preferences" in wrong(capsys, path, "--preferences", f"[{second}, {first}]")
    new = ["--output", str(tmp_path / "other")]
    assert "is listed twice" in wrong(capsys, path, "--preferences", f"[{first}, {first}]", *new)
    append_judgments(second, write_judgments(second, 2, seed=2))
    assert "belongs to other judgments" in wrong(capsys, path)
    apart = ["--preferences", str(first), "--held_out", f"[{second}]"]
    assert main(["reward", "train", "--config", path, *apart, *new]) == 0
    assert "held-out: 10 of 10 judgments of 8 prompts" in capsys.readouterr().out


def wrong(capsys: pytest.CaptureFixture[str], path: str, *more: str) -> str:
    assert main(["reward", "train", "--config", path, *more]) == 2
    return capsys.readouterr().err


def test_wrong_input_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    judgments = write_judgments(tmp_path / "pairs", 12)
    append_judgments(tmp_path / "pairs", judgments)
    path = config(tmp_path)
    regression = ["--loss", "genalign.reward_learning.preference_losses.Regression"]
    assert "Regression learns from judgments of kind rating, of which none is left" in wrong(capsys, path, *regression)
    assert "exclude_annotators names 'bob'" in wrong(capsys, path, "--exclude_annotators", "[bob]")
    assert "of kind pair or ranking, of which none is left" in wrong(capsys, path, "--exclude_annotators", "[ada]")
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
    append_judgments(
        tmp_path / "detail",
        [replace(one, scores={"detail": (1.0, 0.0)}) for one in write_judgments(tmp_path / "detail", 3, seed=9)],
    )
    held_out = ["--held_out", str(tmp_path / "detail"), "--output", str(tmp_path / "early")]
    unclear = "the reward learns overall, but held-out judgments are only of detail: give held_out judgments of it"
    assert unclear in wrong(capsys, path, *held_out)
    assert not (tmp_path / "early").exists()
    assert "are also training samples" in wrong(capsys, path, "--held_out", str(tmp_path / "pairs"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    assert "is not empty, but has no training" in wrong(capsys, path, "--output", str(tmp_path / "full"))
