"""``genalign evaluate geneval`` and its relatives on the tiny pipeline, in one process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from genalign.cli.main import main
from genalign.evaluation.evaluate import load_evaluation
from genalign.evaluation.geneval.metadata import Clause, PromptSpec
from genalign.evaluation.geneval.result_files import read_results, read_samples, write_prompts, write_samples
from genalign.types import PromptSet
from genalign.worlds import shapes
from tests.genalign.evaluation.geneval.test_evaluation_files import varies
from tests.rewards import tiny_detectors

JUDGE = (
    "{class_path: rewards.geneval.GenEvalJudge, init_args: {"
    "detector: {class_path: tests.genalign.evaluation.geneval.shapes_judge.ShapesDetector},"
    " colors: tests.genalign.evaluation.geneval.shapes_judge.PaletteColors}}"
)


@pytest.fixture(scope="module")
def prompt_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write two prompts of every task."""
    path: Path = tmp_path_factory.mktemp("prompts") / "twelve.jsonl"
    tasks = shapes.prompts("iid").by_task().values()
    write_prompts(path, PromptSet("twelve", tuple(prompt for prompts in tasks for prompt in prompts[:2])))
    return path


def _arguments(prompts: Path, model: Path | str, output: Path) -> list[str]:
    settings = ["--prompts", str(prompts), "--model.path", str(model), "--output", str(output), "--seeds", "2"]
    sampling = "--sampling.num_steps 4 --sampling.sigmas [1.0,0.75,0.5,0.25] --sampling.guidance 1.0"
    return ["evaluate", "geneval", *settings, *sampling.split(), "--judge", JUDGE]


def _contents(path: Path) -> dict[str, bytes]:
    files = [file for file in path.rglob("*") if file.is_file() and not varies(file)]
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in files}


def test_a_model_is_evaluated_compared_and_rescored(
    tiny_folder: Path, prompt_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny, trained = tmp_path / "tiny", tmp_path / "trained"
    assert main(_arguments(prompt_file, tiny_folder, tiny)) == 0
    printed = capsys.readouterr().out
    assert "Overall score (avg. over tasks)" in printed and "relaxed 0." in printed
    manifest = json.loads((tiny / "evaluation.json").read_text())
    assert manifest["protocol"]["suite"] == "twelve" and manifest["protocol"]["seeds"] == 2
    assert json.loads(manifest["protocol"]["verifier"])["colours"] == {"class": "PaletteColors"}
    before = _contents(tiny)
    assert main(_arguments(prompt_file, tiny_folder, tiny)) == 0  # all batches are finished
    assert _contents(tiny) == before

    assert main([*_arguments(prompt_file, "shapes-sd3", trained), "--against", str(tiny)]) == 0
    assert "relaxed against tiny: +" in capsys.readouterr().out
    comparison = json.loads((trained / "comparison.json").read_text())
    assert comparison["gain"]["partial"]["mean"] > 0 and set(comparison["wins"]) == {"relaxed", "strict", "partial"}
    assert "trained against tiny" in (trained / "report.html").read_text()

    original = ["evaluate", "geneval-original", "--output", str(trained), "--results", str(trained / "results.jsonl")]
    assert main(original) == 0
    rescored = load_evaluation(trained / "original")
    assert rescored.overall == load_evaluation(trained).overall


def test_other_settings_in_the_same_output_are_refused(
    tiny_folder: Path, prompt_file: Path, tmp_path: Path, error: Callable[..., str]
) -> None:
    command = _arguments(prompt_file, tiny_folder, tmp_path / "output")
    few = [*command, "--samples_per_task", "2"]
    assert main(few) == 0
    records = load_evaluation(tmp_path / "output").records
    assert len({record.task for record in records}) == len({record.prompt for record in records}) == 6
    assert "evaluation with other settings (protocol.samples_per_task)" in error(*command)
    assert "(protocol.seeds)" in error(*few, "--seeds", "1")
    assert "(model.path, fingerprint)" in error(*few, "--model.path", "shapes-sd3")
    assert "samples_per_task must be at least 1" in error(*command, "--samples_per_task", "0")


def test_invalid_settings_are_refused_before_any_file_is_written(
    tiny_folder: Path, prompt_file: Path, tmp_path: Path, error: Callable[..., str]
) -> None:
    new = tmp_path / "new"
    command = _arguments(prompt_file, tiny_folder, new)
    assert "nowhere has no finished evaluation" in error(*command, "--against", str(tmp_path / "nowhere"))
    few = [*_arguments(prompt_file, tiny_folder, tmp_path / "few"), "--samples_per_task", "2"]
    assert main(few) == 0
    differing = error(*command, "--against", str(tmp_path / "few"))
    assert "different protocols cannot be compared: samples_per_task is" in differing
    unicorn = {"tag": "single_object", "include": [{"class": "unicorn", "count": 1}], "prompt": "a photo of a unicorn"}
    (tmp_path / "unicorn.jsonl").write_text(json.dumps(unicorn) + "\n")
    unknown = error(*_arguments(tmp_path / "unicorn.jsonl", "no/such-model", new))
    assert "'unicorn' in 'a photo of a unicorn' is none of the 6 classes" in unknown
    assert "there is no adapter no/such.safetensors" in error(*command, "--lora", "no/such.safetensors")
    assert not new.exists()


DOGS = (
    PromptSpec("two_object", (Clause("dog"), Clause("cat"))).to_prompt(),
    PromptSpec("colors", (Clause("dog", 1, "red"),)).to_prompt(),
    PromptSpec("counting", (Clause("dog", 3),), (Clause("dog", 4),)).to_prompt(),
)


@pytest.fixture(scope="module")
def tiny_judge(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Configure GenEval's judge with tiny random networks: a Mask2Former for dogs and cats, and a CLIP."""
    folder = tmp_path_factory.mktemp("judge")
    detector = tiny_detectors.mask2former(folder / "mask2former")
    thresholds = "{confidence: 0.2, counting: 0.25}"
    return (
        "{class_path: rewards.geneval.GenEvalJudge, init_args: {detector:"
        " {class_path: rewards.backbones.detectors.Mask2Former,"
        f" init_args: {{model: {detector}, thresholds: {thresholds}}}}}, colors: {{class_path:"
        f" rewards.geneval.ClipColors, init_args: {{model: {tiny_detectors.clip(folder / 'clip')}}}}}}}}}"
    )


def _write_images(folder: Path, seed: int) -> Path:
    """Write random images for the prompts about dogs, in GenEval's layout."""
    generator = torch.Generator().manual_seed(seed)
    for index, prompt in enumerate(DOGS):
        write_samples(folder, index, prompt, torch.rand(2, 3, 48, 64, generator=generator))
    return folder


def test_a_folder_is_judged_by_networks_and_compared(
    tiny_judge: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], error: Callable[..., str]
) -> None:
    def command(name: str) -> list[str]:
        folders = ["--output", str(tmp_path / name), "--samples", str(tmp_path / f"{name}-images")]
        return ["evaluate", "geneval", *folders, "--judge", tiny_judge]

    images = _write_images(tmp_path / "one-images", 1)
    _write_images(tmp_path / "two-images", 2)
    assert main(command("one")) == 0
    assert "Total images: 6\nTotal prompts: 3\n" in capsys.readouterr().out
    results = read_results(tmp_path / "one" / "results.jsonl")
    assert [(tmp_path / "one" / result.filename).resolve() for result in results] == [
        sample.path for sample in read_samples(images)
    ]
    assert {name for result in results for name in result.details} == {"dog", "cat"}
    assert all(box[4] > 0.2 for result in results for box in result.details["dog"])
    assert any("found 0 red; and 1 " in result.reason or result.correct for result in results[2:4])
    assert "Mask2Former" in (tmp_path / "one" / "report.html").read_text()

    assert main([*command("two"), "--against", str(tmp_path / "one")]) == 0
    assert "samples of the same number, whose noises are not known" in (tmp_path / "two" / "report.html").read_text()
    first = json.loads((tmp_path / "two" / "comparison.json").read_text())
    capsys.readouterr()
    assert main(["compare-evaluations", str(tmp_path / "one"), str(tmp_path / "two")]) == 0
    assert json.loads((tmp_path / "two" / "comparison.json").read_text()) == first
    assert "relaxed against one: " in capsys.readouterr().out
    assert set(first["tasks"]) == {"two_object", "colors", "counting"}

    write_samples(images, 1, DOGS[1], torch.zeros(1, 3, 48, 64), first=1)
    assert "other settings (fingerprint)" in error(*command("one"))


def test_invalid_image_folders_are_refused(tmp_path: Path, error: Callable[..., str]) -> None:
    images, output = tmp_path / "images", tmp_path / "output"
    command = ["evaluate", "geneval", "--judge", JUDGE, "--output", str(output), "--samples", str(images)]
    _write_images(images, 1)
    assert "'dog' in 'a photo of a dog and a cat' is none of the 6 classes" in error(*command)
    shutil.rmtree(images)
    circle = shapes.prompts("iid").prompts[0]
    write_samples(images, 0, circle, torch.rand(2, 3, 64, 64))
    write_samples(images, 7, circle, torch.rand(2, 3, 64, 64))
    assert "have the same prompt: put its images into one folder" in error(*command)
    shutil.rmtree(images / "00007")
    (images / "00000" / "samples" / "0001.png").write_bytes(b"\x89PNG")
    assert "0001.png cannot be read as an image" in error(*command)
    assert not (output / "summary.json").exists()
