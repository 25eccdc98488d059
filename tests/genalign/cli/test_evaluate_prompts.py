"""``genalign evaluate prompts``: any model or folder, on any prompts, by any rewards; and ``compare-evaluations``."""

from __future__ import annotations

import json
import logging
import multiprocessing
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from genalign.cli.main import main
from genalign.diffusion.policy import Lora, Policy
from genalign.evaluation.evaluate import EXTERNAL, load_evaluation
from genalign.metrics.vendi import vendi_score
from genalign.runtime.media import read_image, save_images
from genalign.worlds.registry import WORLDS
from pipelines import load
from tests.packages import ROOT

REWARDS = """
import os
import torch

calls = []

def redness(images, prompts):
    calls.append([prompt.text for prompt in prompts])
    if os.environ.get("FAIL_AT") == str(len(calls)):
        raise KeyboardInterrupt
    return images[:, 0].flatten(1).mean(1)

def length(samples, prompts):
    return torch.tensor([float(len(prompt)) for prompt in prompts])

def broken(images, prompts):
    return images.nothing

def picky(images, prompts):
    if "blue" in prompts[0]:
        raise ValueError("I take no blue")
    return images[:, 0].flatten(1).mean(1)

def missing(images, prompts):
    return torch.full((len(images),), torch.nan)

def colors(images):
    return images.flatten(2).mean(2)

def variety(features):
    from genalign.metrics.vendi import vendi_score
    return vendi_score(features)
"""
PROMPTS = "prompt,tag\na red circle,red\na red square,red\na blue circle,blue\na blue square,blue\n"
SET = "{features: my_scores.colors, reward: my_scores.variety}"


@pytest.fixture(autouse=True)
def rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A module of rewards and a table of prompts in the working directory."""
    (tmp_path / "my_scores.py").write_text(REWARDS)
    (tmp_path / "prompts.csv").write_text(PROMPTS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("my_scores", None)


@pytest.fixture
def command(tiny_folder: Path) -> list[str]:
    """Eight samples of four prompts, in batches of three."""
    model = ["--model.path", str(tiny_folder), "--prompts", "prompts.csv", "--seeds", "2", "--batch_size", "3"]
    sampling = ["--sampling.num_steps", "2", "--sampling.sigmas", "[1.0, 0.5]", "--sampling.guidance", "1.0"]
    return ["evaluate", "prompts", *model, *sampling, "--rewards.red.function", "my_scores.redness"]


def _files(folder: Path) -> dict[str, bytes]:
    """Everything in the folder of an evaluation but its costs and its page."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name not in ("cost.json", "report.html")]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths if p.parent.name not in ("costs", "locks")}


def test_a_model_is_evaluated_on_own_prompts_by_own_rewards(
    command: list[str], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    second = ["--rewards.length.function", "my_scores.length", "--set_rewards.variety", SET]
    with caplog.at_level(logging.INFO):
        assert main([*command, *second, "--output", "base"]) == 0
    phases = [record.message for record in caplog.records if record.name == "genalign.runtime.progress"]
    assert phases == ["loading the model", "sampling 0/8 samples", "joining the batches"]
    evaluation = load_evaluation(Path("base"))
    assert [(record.prompt, record.sample) for record in evaluation.records[:3]] == [
        ("a red circle", 0), ("a red circle", 1), ("a red square", 0),
    ]  # fmt: skip
    for record in evaluation.records:
        image = read_image(Path("base") / str(record.image))
        assert record.scores["red"] == pytest.approx(float(image[0].mean()), abs=0.003)
        assert record.scores["length"] == len(record.prompt)
    assert set(evaluation.tasks) == {"red", "blue"} and evaluation.overall["red"].n == 4
    images = torch.stack([read_image(Path("base") / str(record.image)) for record in evaluation.records])
    variety = evaluation.sets["variety"]
    assert (variety.value, variety.n) == (pytest.approx(vendi_score(images.flatten(2).mean(2)), rel=1e-3), 8)
    printed = capsys.readouterr().out
    assert "variety: " in printed and "(a score of the set of all 8 samples, without an interval)" in printed
    assert "cost of base: 16 NFE, " in printed and "report: base/report.html" in printed
    page = Path("base/report.html").read_text()
    assert '<a href="images/00000.png" target="_blank">' in page and 'data-label="prompts"' in page
    assert "Red score on prompts" in page and page.count("data:image/png;base64") == 8
    assert json.loads(Path("base/summary.json").read_text())["sets"]["variety"] == {"value": variety.value, "n": 8}


def test_a_world_brings_its_verifier(command: list[str], tiny_folder: Path) -> None:
    """The preset has the scores and the protocol of the same prompts, and a reward beside them another protocol."""
    small = ["--seeds", "1", "--samples_per_task", "1", "--batch_size", "4", "--model.path", str(tiny_folder)]
    sampling = ["--sampling.num_steps", "2", "--sampling.sigmas", "[1.0, 0.5]", "--sampling.guidance", "1"]
    for name, words in (("preset", ["shapes"]), ("whole", ["prompts", "--prompts", "shapes:comp"])):
        assert main(["evaluate", *words, *small, *sampling, "--output", name]) == 0
    preset, whole = load_evaluation(Path("preset")), load_evaluation(Path("whole"))
    assert preset == whole and preset.score_names == ("strict", "partial", "relaxed")
    assert preset.protocol.verifier == WORLDS["shapes"].verifier and Path("preset/report.html").is_file()
    more = ["--prompts", "shapes:comp", "--rewards.red.function", "my_scores.redness"]
    assert main(["evaluate", "prompts", *more, *small, *sampling, "--output", "more"]) == 0
    joined = load_evaluation(Path("more"))
    assert joined.score_names == ("strict", "partial", "relaxed", "red") and "redness" in joined.protocol.verifier


def test_an_interrupted_evaluation_resumes_with_equal_files(
    command: list[str], monkeypatch: pytest.MonkeyPatch, error: Callable[..., str]
) -> None:
    sets = ["--set_rewards.variety", SET]
    assert main([*command, *sets, "--output", "whole"]) == 0
    calls = sys.modules["my_scores"].calls
    calls.clear()
    monkeypatch.setenv("FAIL_AT", "2")
    with pytest.raises(KeyboardInterrupt):
        main([*command, *sets, "--output", "part"])
    assert sorted(path.name for path in Path("part/batches").iterdir()) == ["00000.json"]
    monkeypatch.delenv("FAIL_AT")
    calls.clear()
    assert main([*command, *sets, "--output", "part"]) == 0
    assert sum(map(len, calls)) == 5  # the second batch of three again, and the third of two
    assert _files(Path("part")) == _files(Path("whole"))
    message = error(*command, *sets, "--output", "part", "--sampling.guidance", "2")
    assert "holds an evaluation with other settings (protocol.guidance): choose another" in message


def test_the_samples_of_an_evaluation_are_scored_by_other_rewards(command: list[str]) -> None:
    assert main([*command, "--output", "base"]) == 0
    reward = ["--rewards.length.function", "my_scores.length"]
    assert main(["evaluate", "prompts", "--samples", "base", *reward, "--output", "again"]) == 0
    base, again = load_evaluation(Path("base")), load_evaluation(Path("again"))
    assert [(r.task, r.prompt, r.sample) for r in again.records] == [(r.task, r.prompt, r.sample) for r in base.records]
    assert again.records[0].image == "../base/images/00000.png" and again.score_names == ("length",)


def _evaluate(arguments: list[str]) -> None:
    torch.set_num_threads(1)
    raise SystemExit(main(arguments))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The number of threads decides the last bits of sums."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_processes_share_the_batches(command: list[str]) -> None:
    """Two processes on one output write the files of one, and each batch once."""
    assert main([*command, "--output", "whole"]) == 0
    context = multiprocessing.get_context("fork")
    arguments = [*command, "--output", "shared"]
    processes = [context.Process(target=_evaluate, args=(arguments,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    assert main(arguments) == 0  # whoever was left writes the results
    assert _files(Path("shared")) == _files(Path("whole"))


def test_ranks_take_their_share(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main([*command, "--output", "whole"]) == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, names in (("1", ["00001.json"]), ("0", ["00000.json", "00001.json", "00002.json"])):
        monkeypatch.setenv("RANK", rank)
        assert main([*command, "--output", "shared"]) == 0
        assert sorted(path.name for path in Path("shared/batches").iterdir()) == names
    assert _files(Path("shared")) == _files(Path("whole"))


def test_models_are_compared(command: list[str], capsys: pytest.CaptureFixture[str], error: Callable[..., str]) -> None:
    sets = ["--set_rewards.variety", SET]
    assert main([*command, *sets, "--output", "base"]) == 0
    other = [*command, *sets, "--model.dtype", "float32", "--model.path", "shapes-sd3", "--output", "tuned"]
    assert main([*other, "--against", "base"]) == 0
    printed = capsys.readouterr().out
    assert "red against base: " in printed and "; prompts won " in printed and "variety against base: " in printed
    assert "cost of base: 16 NFE, " in printed and "cost of tuned: 16 NFE, " in printed
    comparison = json.loads(Path("tuned/comparison.json").read_text())
    before, after = load_evaluation(Path("base")), load_evaluation(Path("tuned"))
    gain = after.overall["red"].mean - before.overall["red"].mean
    assert comparison["gain"]["red"]["mean"] == pytest.approx(gain)
    assert comparison["sets"]["variety"] == after.sets["variety"].value - before.sets["variety"].value
    assert comparison["cost"]["before"]["nfe"] == comparison["cost"]["after"]["nfe"] == 16
    page = Path("tuned/report.html").read_text()
    assert '<a href="../base/images/' in page
    assert "tuned against base" in page and "Largest differences" in page
    assert "no verdict from 4 prompts" in page and "sign test p\N{NO-BREAK SPACE}=" in page
    differences = {
        prompt: abs(sum(a.scores["red"] - b.scores["red"] for b, a in pairs))
        for prompt in {record.prompt for record in before.records}
        if (pairs := [(b, a) for b, a in zip(before.records, after.records, strict=True) if b.prompt == prompt])
    }
    first = max(differences, key=differences.__getitem__)
    gallery = page[page.index("Largest differences") :]
    assert min(differences, key=gallery.index) == first

    Path("tuned/comparison.json").unlink()
    assert main(["compare-evaluations", "base", "tuned"]) == 0
    assert json.loads(Path("tuned/comparison.json").read_text()) == comparison
    assert main([*command, "--seeds", "1", "--output", "few"]) == 0
    message = error("compare-evaluations", "base", "few")
    assert "different protocols cannot be compared: seeds is 2 before and 1 after" in message
    assert "none has no finished evaluation" in error("compare-evaluations", "none", "tuned")
    new = [*command, *sets, "--seeds", "1", "--output", "new", "--against", "base"]
    assert "cannot be compared: seeds" in error(*new) and not Path("new").exists()


def _write_images(folder: Path, *sides: int) -> None:
    """Write one image of each side, red in the first prompt's, with a listing."""
    folder.mkdir()
    texts = ["a red circle", "a red square", "a blue circle", "a blue square"]
    rows = []
    for number, side in enumerate(sides):
        image = torch.zeros(1, 3, side, side)
        image[:, 0] = (number + 1) / 10
        save_images(image, [folder / f"{number}.png"])
        rows.append(json.dumps({"file_name": f"{number}.png", "prompt": texts[number % 4]}))
    (folder / "prompts.jsonl").write_text("\n".join(rows) + "\n")


def test_images_of_two_sizes_are_scored(caplog: pytest.LogCaptureFixture) -> None:
    _write_images(Path("mine"), 8, 16, 16, 8, 8)
    Image.new("RGB", (4, 4)).save("mine/unlisted.png")
    arguments = ["evaluate", "prompts", "--samples", "mine", "--rewards.red.function", "my_scores.redness"]
    with caplog.at_level(logging.WARNING):
        assert main([*arguments, "--output", "out"]) == 0
    assert "1 files of mine are not in its prompts.jsonl, the first of them mine/unlisted.png" in caplog.text
    evaluation = load_evaluation(Path("out"))
    scores = [record.scores["red"] for record in evaluation.records]
    assert scores == pytest.approx([26 / 255, 51 / 255, 76 / 255, 102 / 255, 128 / 255], abs=0.003)
    assert evaluation.protocol.kernel == EXTERNAL and list(evaluation.tasks) == ["all"]
    assert [(record.prompt, record.sample) for record in evaluation.records][-1] == ("a red circle", 1)
    assert evaluation.records[0].image == "../mine/0.png"
    assert main([*arguments, "--prompts", "prompts.csv", "--output", "tasks"]) == 0  # metadata by text
    assert list(load_evaluation(Path("tasks")).tasks) == ["red", "blue"]


def test_folders_are_compared(
    error: Callable[..., str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINE", str(Path.cwd()))
    _write_images(Path("one"), 8, 8)
    _write_images(Path("two"), 16, 16)
    arguments = ["evaluate", "prompts", "--rewards.red.function", "my_scores.redness", "--samples"]
    assert main([*arguments, "$MINE/one", "--output", "a"]) == 0
    unset = error(*arguments, "two", "--output", "b", "--against", "$UNSET/a")
    assert "against is '$UNSET/a', which is not a path" in unset
    assert main([*arguments, "two", "--output", "b", "--against", "a"]) == 0
    assert "red against a: +0.000" in capsys.readouterr().out
    assert "samples of the same number, whose noises are not known" in Path("b/report.html").read_text()
    save_images(torch.zeros(1, 3, 8, 8), [Path("one/0.png")])
    assert "other settings (fingerprint)" in error(*arguments, "one", "--output", "a")
    Path("two/1.png").unlink()
    assert "two/1.png, which two lists, is missing" in error(*arguments, "two", "--output", "c")
    Path("prompts.csv").write_text("prompt\na green circle\n")
    message = error(*arguments, "one", "--prompts", "prompts.csv", "--output", "c")
    assert "'a red circle' is not among the prompts of prompts" in message


def test_clips_are_scored(error: Callable[..., str]) -> None:
    Path("clips").mkdir()
    rows = [json.dumps({"file_name": f"{number}.wav", "prompt": f"tone {number}"}) for number in range(3)]
    Path("clips/prompts.jsonl").write_text("\n".join(rows))
    for number in range(3):
        soundfile.write(f"clips/{number}.wav", np.full(2000 + 500 * number, 0.1), 16000)
    arguments = ["evaluate", "prompts", "--samples", "clips", "--rewards.length.function", "my_scores.length"]
    assert main([*arguments, "--output", "out"]) == 0
    assert load_evaluation(Path("out")).overall["length"].mean == 6
    assert Path("out/report.html").read_text().count("<audio") == 3
    soundfile.write("clips/1.wav", np.full(2000, 0.1), 8000)
    mixed = "clips/1.wav is at 8000 Hz, but the first clip is at 16000 Hz: convert"
    assert mixed in error(*arguments, "--output", "other")
    level = ["--rewards.length.function", "rewards.tones.TonesReward", "--output", "other"]
    assert "expects waveforms at 8000 Hz, but gets 16000" in error(*arguments, *level)


def test_failing_rewards(command: list[str], error: Callable[..., str], caplog: pytest.LogCaptureFixture) -> None:
    broken = error(*command, "--rewards.broken.function", "my_scores.broken", "--output", "broken")
    assert "reward 'broken' failed on all 3 samples of a batch" in broken and "my_scores.py:17)" in broken
    assert broken.count("\n") == 1 and not list(Path("broken").glob("batches/*"))
    Path("mixed.txt").write_text("a red circle\na blue circle\n")
    picky = ["--prompts", "mixed.txt", "--rewards.picky.function", "my_scores.picky", "--batch_size", "1"]
    with caplog.at_level(logging.WARNING):
        assert main([*command, *picky, "--output", "picky"]) == 0
    evaluation = load_evaluation(Path("picky"))
    assert evaluation.failed == 2 and evaluation.overall["picky"].n == 1
    assert "reward 'picky' raised ValueError: I take no blue (my_scores.py:21)" in caplog.text
    nothing = error(*command, "--rewards.none.function", "my_scores.missing", "--output", "none")
    assert "'none' scored none of the samples, so it has no mean" in nothing and nothing.count("\n") == 1


def test_incomplete_settings_are_refused(tiny_folder: Path, error: Callable[..., str]) -> None:
    reward, model = ["--rewards.red.function", "my_scores.redness"], ["--model.path", str(tiny_folder)]
    prompts, output = ["--prompts", "prompts.csv"], ["--output", "out"]
    assert "model.path is missing: name a model" in error("evaluate", "prompts", *prompts, *reward, *output)
    assert "prompts is missing: name a prompt file" in error("evaluate", "prompts", *model, *reward, *output)
    assert "rewards is empty: name at least one" in error("evaluate", "prompts", *model, *prompts, *output)
    assert "seeds must be at least 1" in error(
        "evaluate", "prompts", *model, *prompts, *reward, *output, "--seeds", "0"
    )
    both = [*model, "--samples", "mine", *prompts, *reward, *output]
    assert "samples is a folder to score, but model and lora generate new samples" in error(
        "evaluate", "prompts", *both
    )
    shapes = ["evaluate", "shapes", "--samples", "mine", *output]
    assert "give one or the other" in error(*shapes, "--lora", "my_lora") and "mine" in error(*shapes)
    twice = ["--prompts", "shapes:comp", "--rewards.strict.function", "my_scores.redness"]
    assert "two scores are named 'strict'" in error("evaluate", "prompts", *model, *twice, *output)
    assert not Path("out").exists()


def test_commands_of_the_evaluation_page_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two adapters on own prompts, and images of another program, as docs/evaluation.md writes it."""
    page = re.sub(r"\\\n +", "", (ROOT / "docs" / "evaluation.md").read_text())
    lines = re.findall(r"^ {4}genalign (evaluate prompts .*)$", page, re.MULTILINE)
    Path("prompts.txt").write_text("a red circle\na blue square\n")
    pipeline = load("shapes-sd3")
    for seed, name in enumerate(("first", "second")):
        policy = Policy(pipeline.denoiser, Lora(rank=2), seed=seed)
        assert policy.config is not None
        adapter = {key: value + 0.02 * (seed + 1) for key, value in policy.adapter_state().items()}
        pipeline.save_lora(tmp_path / "runs" / name / "lora", adapter, policy.config)
        pipeline = load("shapes-sd3")
    _write_images(Path("my_images"), 8, 16)
    assert len(lines) == 3
    for line in lines:
        assert main([*shlex.split(line), "--seeds", "1"] if "samples" not in line else shlex.split(line)) == 0
    assert "size against eval-first: " in capsys.readouterr().out
    assert main(["compare-evaluations", "runs/eval-first", "runs/eval-second"]) == 0
    before, after = load_evaluation(Path("runs/eval-first")), load_evaluation(Path("runs/eval-second"))
    assert before.overall != after.overall and before.protocol == after.protocol
    for name in ("eval-second/report.html", "eval-second/comparison.json", "other/report.html"):
        assert (Path("runs") / name).is_file()
    (sets,) = re.findall(r"```yaml\n(set_rewards:.*?)```", page, re.DOTALL)
    Path("sets.yaml").write_text(sets)
    assert main([*shlex.split(lines[2]), "--config", "sets.yaml", "--output", "sets"]) == 0
    assert 1 <= load_evaluation(Path("sets")).sets["variety"].value <= 2


def test_distances_to_a_reference_folder(command: list[str]) -> None:
    """The Frechet distance of a set to itself is 0, and that to another set is not."""
    assert main([*command, "--output", "base"]) == 0
    clip = "{class_path: rewards.backbones.image_features.ClipFeatures, init_args: {model: shapes-clip}}"
    folder = "{class_path: rewards.backbones.reference_images.ImageFolder, init_args: {folder: base/images}}"
    extracted = f"init_args: {{images: {folder}, features: {clip}}}"
    features = f"{{class_path: rewards.backbones.image_features.extract_features, {extracted}}}"
    reward = f"{{class_path: rewards.set_rewards.FrechetReward, init_args: {{reference: {features}}}}}"
    sets = [
        "--set_rewards.fd",
        f"{{features: {clip}, reward: {reward}}}",
        "--rewards.red.function",
        "my_scores.redness",
    ]
    assert main(["evaluate", "prompts", "--samples", "base", *sets, "--output", "same"]) == 0
    _write_images(Path("mine"), 64, 64, 64, 64)
    assert main(["evaluate", "prompts", "--samples", "mine", *sets, "--output", "other"]) == 0
    same, other = (load_evaluation(Path(name)).sets["fd"].value for name in ("same", "other"))
    assert same == pytest.approx(0, abs=1e-3) and other < -1
