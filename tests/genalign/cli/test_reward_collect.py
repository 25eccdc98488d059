"""genalign reward collect and label: comparisons of models and folders, and their judgments, on tiny models."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from genalign.cli.main import main
from genalign.reward_learning.examples import examples
from genalign.reward_learning.preferences import COMPARISONS, PREFERENCES, Judgment, read_judgments
from genalign.runtime.media import AudioMedium, save_images
from genalign.types import Prompt
from tests.http_servers import Answer
from tests.rewards.remote.judge_server import completion, judging

SHAPES = {"class_path": "rewards.shapes.ShapesReward"}


def _config(folder: Path, tiny_folder: Path, name: str = "collect.yaml", **settings: Any) -> str:
    """A configuration that compares the tiny model at two numbers of steps."""
    model = {"model": {"path": str(tiny_folder)}}
    own: dict[str, Any] = {
        "output": str(folder / "pairs"),
        "models": {
            "one step": {**model, "sampling": {"num_steps": 1, "guidance": 1.0}},
            "two steps": {**model, "sampling": {"num_steps": 2, "guidance": 1.0}},
        },
        "prompts": str(folder / "prompts.jsonl"),
        "comparisons_per_prompt": 2,
        "batch_size": 3,
    }
    prompts = [{"prompt": f"a {shape}", "tag": "single_object", "include": [{"class": shape, "count": 1}]} for shape in
               ("circle", "ring", "cross")]  # fmt: skip
    (folder / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    (folder / name).write_text(yaml.safe_dump(own | settings))
    return str(folder / name)


def test_models_are_compared_resumed_and_labeled(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = _config(tmp_path, tiny_folder)
    assert main(["reward", "collect", "--config", config]) == 0
    assert "6 comparisons of 3 prompts" in capsys.readouterr().out
    folder = tmp_path / "pairs"
    comparisons = read_judgments(folder / COMPARISONS)
    sides = [tuple(sample.generator for sample in one.samples) for one in comparisons]
    assert {frozenset(side) for side in sides} == {frozenset({"one step", "two steps"})} and len(set(sides)) == 2
    assert len({sample.seed for one in comparisons for sample in one.samples}) == 12
    assert comparisons[0].prompt.metadata is not None and comparisons[0].prompt.metadata["tag"] == "single_object"

    files = {path: path.read_bytes() for path in (folder / "images").iterdir()}
    (folder / COMPARISONS).unlink()  # as if it had been killed
    (folder / "images" / "00004.png").unlink()
    assert main(["reward", "collect", "--config", config]) == 0
    assert {path: path.read_bytes() for path in (folder / "images").iterdir()} == files
    assert read_judgments(folder / COMPARISONS) == comparisons
    other = _config(tmp_path, tiny_folder, seed=1)
    assert main(["reward", "collect", "--config", other]) == 2
    assert "were collected with other settings: choose another output" in capsys.readouterr().err

    noise = {"flips": 0.3, "ties": 0.2}
    annotators = {"ada": {}, "bob": {"taste": "rewards.jpeg.incompressibility", "weight": 0.5}}
    rewards = {"overall": SHAPES, "size": "rewards.jpeg.incompressibility"}
    by = {"class_path": "genalign.reward_learning.labeling.RewardLabeler"}
    by["init_args"] = {"rewards": rewards, "noise": noise, "annotators": annotators}  # type: ignore[assignment]
    (tmp_path / "label.yaml").write_text(yaml.safe_dump({"by": by, "batch_size": 5}))
    label = ["reward", "label", str(folder), "--config", str(tmp_path / "label.yaml")]
    assert main(label) == 0
    printed = capsys.readouterr().out
    assert "12 new and 0 earlier\n" in printed and "agreement on size (pair, 6 judged" in printed
    whole, judgments = (folder / PREFERENCES).read_bytes(), read_judgments(folder)
    lines = whole.splitlines(keepends=True)
    (folder / PREFERENCES).write_bytes(b"".join(lines[:7]) + lines[7][:30])
    assert main(label) == 0 and "5 new and 7 earlier" in capsys.readouterr().out
    assert (folder / PREFERENCES).read_bytes() == whole
    assert main(label) == 0 and "0 new and 12 earlier" in capsys.readouterr().out
    data = examples(judgments)
    assert data.dimensions == ("overall", "size") and len(data.pairs) == 12 and len(data.items) == 12


def test_one_model_is_compared_with_itself_in_groups(tiny_folder: Path, tmp_path: Path) -> None:
    models = {"tiny": {"model": {"path": str(tiny_folder)}, "sampling": {"num_steps": 1, "guidance": 1.0}}}
    config = _config(tmp_path, tiny_folder, models=models, group_size=3, comparisons_per_prompt=1)
    assert main(["reward", "collect", "--config", config]) == 0
    comparisons = read_judgments(tmp_path / "pairs" / COMPARISONS)
    assert [(one.kind, len(one.samples)) for one in comparisons] == [("ranking", 3)] * 3


def _folder(root: Path, prompts: dict[str, list[str]]) -> Path:
    """A folder of another program's images, different ones, with a prompts.jsonl."""
    root.mkdir()
    lines, names = [], [(prompt, name) for prompt, names in prompts.items() for name in names]
    save_images(torch.rand(len(names), 3, 4, 4), [root / name for _, name in names])
    lines = [{"file_name": name, "prompt": prompt, "generator": name[0], "seed": 3} for prompt, name in names]
    (root / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


def _collected(root: Path, output: Path, *more: str) -> list[Judgment]:
    assert main(["reward", "collect", "--samples", str(root), "--output", str(output), *more]) == 0
    return read_judgments(output / COMPARISONS)


def test_samples_of_other_programs_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = _folder(tmp_path / "theirs", {"a": ["a0.png", "b0.png", "a1.png", "b1.png"], "b": ["a2.png"]})
    comparisons = _collected(root, tmp_path / "pairs", "--comparisons_per_prompt", "2")
    assert "left out: 1 of 2 prompts, which have fewer than 2 samples" in capsys.readouterr().out
    assert len(comparisons) == 2 and all(one.prompt == "a" and one.kind == "pair" for one in comparisons)
    theirs = {(root / name).read_bytes() for name in ("a0.png", "b0.png", "a1.png", "b1.png")}
    samples = [sample for one in comparisons for sample in one.samples]
    assert {Path(str(sample.content)).read_bytes() for sample in samples} == theirs
    assert {sample.generator for sample in samples} == {"a", "b"} and {sample.seed for sample in samples} == {3}
    again = _collected(root, tmp_path / "again", "--comparisons_per_prompt", "2")
    assert [s.digest() for one in again for s in one.samples] == [s.digest() for s in samples]
    (root / "b0.png").write_bytes((root / "a0.png").read_bytes())
    (root / "b1.png").write_bytes((root / "a0.png").read_bytes())
    (root / "a1.png").write_bytes((root / "a0.png").read_bytes())
    assert main(["reward", "collect", "--samples", str(root), "--output", str(tmp_path / "equal")]) == 2
    captured = capsys.readouterr()
    assert "left out: 1 of 1 comparisons, whose samples are equal" in captured.out
    assert "gave no comparison" in captured.err


def test_samples_of_several_folders_are_compared_with_each_other(tmp_path: Path) -> None:
    found = _folder(tmp_path / "found", {text: [f"{text}{number}.png" for number in range(3)] for text in "xy"})
    plain = _folder(tmp_path / "plain", {text: [f"{text}{number}.png" for number in range(3)] for text in "xyz"})
    for folder in (found, plain):
        lines = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
        rows = [{name: value for name, value in line.items() if name != "generator"} for line in lines]
        (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    three = ["--comparisons_per_prompt", "3"]
    assert main(["reward", "collect", "--samples", f"[{found}, {plain}]", "--output", str(tmp_path / "a"), *three]) == 0
    comparisons = read_judgments(tmp_path / "a" / COMPARISONS)
    sides = [tuple(sample.generator for sample in one.samples) for one in comparisons if one.prompt != "z"]
    assert len(sides) == 6 and {frozenset(side) for side in sides} == {frozenset({"found", "plain"})}
    assert len(set(sides)) == 2  # sides at random
    assert [[sample.generator for sample in one.samples] for one in comparisons if one.prompt == "z"] == [["plain"] * 2]


JUDGED = list[str]()


def brighter(left: torch.Tensor, right: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
    JUDGED.append("brighter")
    return (left.flatten(1).mean(1) > right.flatten(1).mean(1)).float()


def darker(left: torch.Tensor, right: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
    """A judge that has no answer when it is asked for the first time."""
    JUDGED.append("darker")
    answers = (left.flatten(1).mean(1) < right.flatten(1).mean(1)).float()
    return torch.full_like(answers, torch.nan) if JUDGED.count("darker") == 1 else answers


def test_a_labeler_fills_the_dimensions_that_are_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = _folder(tmp_path / "theirs", {"a": ["a0.png", "a1.png"], "b": ["b0.png", "b1.png"]})
    folder = tmp_path / "pairs"
    _collected(root, folder)
    JUDGED.clear()

    def label(status: int = 0, annotator: str = "vlm", both_orders: bool = False, **judges: str) -> str:
        arguments = {"judges": {name: f"{__name__}.{judge}" for name, judge in judges.items()}}
        by = {"class_path": "genalign.reward_learning.labeling.JudgeLabeler"}
        by["init_args"] = arguments | {"both_orders": both_orders, "annotator": annotator}  # type: ignore[assignment]
        (tmp_path / "by.yaml").write_text(yaml.safe_dump({"by": by}))
        JUDGED.append("start")
        assert main(["reward", "label", str(folder), "--config", str(tmp_path / "by.yaml")]) == status
        captured = capsys.readouterr()
        return captured.out + captured.err

    assert "2 new and 0 earlier; 2 have no score for style\n" in label(overall="brighter", style="darker")
    assert "2 new and 2 earlier\n" in label(overall="brighter", style="darker")
    assert "2 new and 4 earlier\n" in label(overall="brighter", style="darker", light="brighter")
    assert "0 new and 6 earlier\n" in label(overall="brighter", style="darker", light="brighter")
    assert JUDGED == ["start", "brighter", "darker", "start", "darker", "start", "brighter", "start"]
    judgments = read_judgments(folder)
    assert [tuple(one.scores) for one in judgments] == [("overall",)] * 2 + [("style",)] * 2 + [("light",)] * 2
    assert [one.scores["style"] for one in judgments[2:4]] == [one.scores["light"][::-1] for one in judgments[4:]]
    # other settings need another name
    before = (folder / PREFERENCES).read_bytes()
    assert "has judgments of 'vlm' with another overall, see its labelers.json" in label(2, overall="darker")
    assert "has judgments of 'vlm' with another both_orders" in label(2, both_orders=True, overall="brighter")
    assert (folder / PREFERENCES).read_bytes() == before
    assert "2 new and 6 earlier\n" in label(annotator="other", overall="darker")
    assert "2 new and 8 earlier\n" in label(annotator="vlm", style="darker", grain="brighter")
    assert "with another light" in label(2, light="darker")  # of a start before the last one
    (folder / "labelers.json").unlink()
    assert "has judgments of 'vlm' by someone else: give the annotator" in label(2, overall="brighter")


def test_sounds_are_compared_and_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("soundfile")
    root, rate = tmp_path / "theirs", 8000
    root.mkdir()
    times = torch.arange(12000) / rate
    for number, amplitude in enumerate((0.1, 0.5)):
        clip = amplitude * torch.sin(2 * torch.pi * 440 * times)
        (root / f"{number}.wav").write_bytes(AudioMedium(rate).encode(clip[None]))
    lines = [json.dumps({"file_name": f"{number}.wav", "prompt": "a hum"}) + "\n" for number in range(2)]
    (root / "prompts.jsonl").write_text("".join(lines))
    (comparison,) = _collected(root, tmp_path / "pairs")
    assert all(Path(str(sample.content)).parent.name == "audio" for sample in comparison.samples)
    for reward, status, message in (("loudness", 0, "1 new and 0 earlier"), ("broken", 2, "all 1 judgments failed")):
        by = {"class_path": "genalign.reward_learning.labeling.RewardLabeler"}
        by["init_args"] = {"rewards": {"overall": f"{__name__}.{reward}"}}  # type: ignore[assignment]
        (tmp_path / "by.yaml").write_text(yaml.safe_dump({"by": by}))
        (tmp_path / "pairs" / PREFERENCES).unlink(missing_ok=True)
        assert main(["reward", "label", str(tmp_path / "pairs"), "--config", str(tmp_path / "by.yaml")]) == status
        captured = capsys.readouterr()
        assert message in captured.out + captured.err
        if status == 0:
            louder = [float(sample.read().std()) for sample in comparison.samples]
            (judgment,) = read_judgments(tmp_path / "pairs")
            assert judgment.overall() == ((1, 0) if louder[0] > louder[1] else (0, 1))


def test_a_judges_reasons_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = _folder(tmp_path / "theirs", {"a": ["a0.png", "a1.png"]})
    (comparison,) = _collected(root, tmp_path / "pairs")

    def say(levels: list[float], text: str) -> Answer:
        return completion(f"<answer>Image {1 if levels[0] > levels[1] else 2} is better</answer>")

    with judging(say) as endpoint:
        judge = {"class_path": "rewards.remote.vlm_judges.WrittenPairwiseJudge"}
        judge["init_args"] = {"endpoint": {"url": endpoint.url, "model": "judge"}}  # type: ignore[assignment]
        by = {"class_path": "genalign.reward_learning.labeling.JudgeLabeler"}
        by["init_args"] = {"judges": {"overall": judge}}  # type: ignore[assignment]
        (tmp_path / "by.yaml").write_text(yaml.safe_dump({"by": by}))
        label = ["reward", "label", str(tmp_path / "pairs"), "--config", str(tmp_path / "by.yaml")]
        assert main(label) == 0 and main([*label, "--kind", "rating"]) == 2
    assert "a judge of pairs gives no rating: judge pairs" in capsys.readouterr().err
    (judgment,) = read_judgments(tmp_path / "pairs")
    first, second = (float(sample.read().mean()) for sample in comparison.samples)
    winner = 1 if first > second else 2
    assert judgment.overall() == ((1, 0) if winner == 1 else (0, 1)) and judgment.annotator == "judge"
    assert judgment.reason is not None and f"in this order: <answer>Image {winner} is better" in judgment.reason


def loudness(samples: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
    return samples.flatten(1).std(1)


def broken(samples: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
    raise ValueError("it takes no sound")


def test_wrong_settings_are_named(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"models": {}}, "nothing to compare: set models and prompts, or samples"),
        ({"prompts": None}, "models and prompts belong together: set both"),
        ({"samples": "x"}, "nothing to compare: set models and prompts, or samples"),
        ({"group_size": 1}, "group_size must be at least 2 samples to compare, not 1"),
    ]
    for changes, message in wrong:
        assert main(["reward", "collect", "--config", _config(tmp_path, tiny_folder, **changes)]) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    config = _config(tmp_path, tiny_folder, prompts="nowhere.txt")
    assert main(["reward", "collect", "--config", config]) == 2 and "no prompt file" in capsys.readouterr().err
    one = _config(tmp_path, tiny_folder, comparisons_per_prompt=1)  # nothing was made by the settings before
    assert main(["reward", "collect", "--config", one]) == 0
    by = {"class_path": "genalign.reward_learning.labeling.RewardLabeler"}
    by["init_args"] = {"rewards": {"overall": "tests.genalign.cli.test_reward_collect.broken"}}  # type: ignore[assignment]
    (tmp_path / "broken.yaml").write_text(yaml.safe_dump({"by": by}))
    assert main(["reward", "label", str(tmp_path / "pairs"), "--config", str(tmp_path / "broken.yaml")]) == 2
    assert not (tmp_path / "pairs/preferences.jsonl").exists()
    with pytest.raises(FileNotFoundError, match="judge the comparisons with genalign reward label"):
        read_judgments(tmp_path / "pairs")
    capsys.readouterr()
    assert main(["reward", "label", str(tmp_path)]) == 2
    assert "there is no" in capsys.readouterr().err  # comparisons.jsonl
