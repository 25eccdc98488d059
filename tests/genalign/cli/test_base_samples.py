"""genalign reward references and genalign reward direction, and runs that read their files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from genalign.cli.main import main
from rewards.backbones.weight_files import read_tensors
from tests.genalign.training.toy_runs import write_config

RED = "tests.genalign.training.toy_runs.redness"
CLIP = {"class_path": "rewards.clip.ClipReward", "init_args": {"model": "shapes-clip"}}


def shaped(name: str, reward: Any, **settings: Any) -> dict[str, Any]:
    return {"class_path": f"rewards.shaped.{name}", "init_args": {"reward": reward, **settings}}


@pytest.fixture
def folder(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a configuration of two bounded rewards, one within another, and a reported one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a circle\na square\ntwo rings\n")
    rewards = {
        "red": {"function": shaped("PreferenceAsReward", RED, references="refs.json"), "score_batch": 2},
        "capped": {"function": shaped("Ceiling", shaped("Calibrated", RED, references="refs.json"), limit=0.9)},
        "plain": {"function": RED, "weight": 0.0},
    }
    sections = {"prompts": "prompts.txt", "rewards": rewards, "held_out": {"every": 0}}
    write_config(tmp_path / "run.json", tiny_folder, RED, {"rounds": 1}, **sections)
    yield tmp_path


def test_references_are_written_and_read_by_a_run(
    folder: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, error: Callable[..., str]
) -> None:
    command = ["reward", "references", "--config", "run.json", "--samples", "3", "--output", "refs.json"]
    assert main(command) == 0
    assert "red: mean " in capsys.readouterr().out
    first = (folder / "refs.json").read_text()
    stored = json.loads(first)
    (by_red,) = stored["rewards"]  # the reward within both, once
    assert by_red["reward"] == RED and stored["prompts"] == "prompts" and stored["base"]["steps"] == 2
    assert sorted(by_red["scores"]) == ["a circle", "a square", "two rings"]
    values = torch.tensor(list(by_red["scores"].values()))
    assert values.shape == (3, 3) and len(values.unique()) == 9

    # The same again, and a run that reads it, with one warning of its credit
    assert main(command) == 0 and (folder / "refs.json").read_text() == first
    assert main(["train", "--config", "run.json"]) == 0
    assert caplog.text.count("saturates (PreferenceAsReward), but the credit GroupRelative") == 1
    metrics = json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0 < metrics["rewards"]["red"] < 1

    # Runs of other prompts, of another reward and of another base are refused by name
    (folder / "more.txt").write_text("a circle\na moon\n")
    other = "--config", "run.json", "--output", "other"
    assert (
        "refs.json has the scores of the prompt set 'prompts', which lacks 1 of this run's prompts, such as 'a moon'"
        in (error("train", *other, "--prompts", "more.txt"))
    )
    jpeg = {"jpeg": {"function": shaped("Calibrated", "rewards.jpeg.compressibility", references="refs.json")}}
    message = error("train", *other, "--rewards", json.dumps(jpeg))
    assert f'refs.json has scores by "{RED}", and none by "rewards.jpeg.compressibility"' in message
    message = error("train", *other, "--sampling", '{"num_steps": 1, "sigmas": [1.0]}')
    assert "refs.json has the scores of the base model" in message and "steps is 2 there and 1 here" in message


@pytest.mark.slow
def test_without_a_file_of_references_every_reward_is_scored(folder: Path, tiny_folder: Path) -> None:
    rewards = {"red": {"function": RED}, "size": {"function": "rewards.jpeg.compressibility"}}
    sections = {"prompts": "prompts.txt", "rewards": rewards}
    write_config(folder / "plain.json", tiny_folder, RED, {"rounds": 1}, **sections)
    assert main(["reward", "references", "--config", "plain.json", "--samples", "1", "--output", "two.json"]) == 0
    stored = json.loads((folder / "two.json").read_text())
    assert [part["reward"] for part in stored["rewards"]] == [RED, "rewards.jpeg.compressibility"]


def test_a_missing_file_of_references_is_refused_before_anything_is_loaded(
    folder: Path, error: Callable[..., str]
) -> None:
    message = error("train", "--config", "run.json")
    assert "no reference scores in refs.json: write them with genalign reward references --config FILE" in message
    assert not (folder / "run").exists()
    assert "samples must be at least 1, not 0" in error(
        "reward", "references", "--config", "run.json", "--samples", "0", "--output", "refs.json"
    )


def test_prompts_without_references_are_refused_before_anything_is_loaded(
    folder: Path, tiny_folder: Path, error: Callable[..., str]
) -> None:
    bounded = shaped("PreferenceAsReward", RED, references={"a circle": [0.1, 0.2]})
    arguments = {"rewards": {"x": bounded}, "limits": {"x": 1.0}}
    constrained = {"class_path": "rewards.constrained.Constrained", "init_args": arguments}
    for function in (bounded, shaped("Ceiling", bounded, limit=0.9), constrained):
        rewards = {"capped": {"function": function}}
        write_config(folder / "few.json", folder / "no model", RED, {}, prompts="prompts.txt", rewards=rewards)
        assert (
            "reward 'capped' has no references for 2 of the 3 training prompts: the prompt 'a square' is not in the"
            " references: score base samples of it first" in error("train", "--config", "few.json")
        )
    assert not (folder / "few").exists()


def test_a_direction_is_learned(folder: Path, tiny_folder: Path, error: Callable[..., str]) -> None:
    arguments = {"base": CLIP, "direction": "d.safetensors"}
    guided = {"class_path": "rewards.combine.DirectionalCorrection", "init_args": arguments}
    sections = {"prompts": "prompts.txt", "rewards": {"guided": {"function": guided}}, "held_out": {"every": 0}}
    write_config(folder / "guided.json", tiny_folder, RED, {"rounds": 1}, **sections)
    command = "reward", "direction", "--config", "guided.json", "--samples", "2", "--output", "d.safetensors"
    assert main(list(command)) == 0
    direction = read_tensors("d.safetensors")["direction"]
    assert direction.shape == (128,) and 0 < float(direction.norm()) < 1
    assert main(["train", "--config", "guided.json"]) == 0
    assert "a direction is learned for exactly one reward, but 0 in this configuration need one" in error(
        "reward", "direction", "--config", "run.json", "--output", "d.safetensors"
    )
