"""genalign init writes a configuration that trains at once, and presets are configurations by name."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from genalign import assets
from genalign.__main__ import main
from genalign.cli.init import Preset
from genalign.cli.parsing import parse
from genalign.cli.train_settings import Train
from genalign.runtime.prompt_files import load_prompts

REWARDS = """
def sharpness(images, prompts):
    return images.diff(dim=-1).abs().mean((1, 2, 3))

class Channel:
    def __init__(self, channel: int, scale: float = 1.0):
        self.channel, self.scale = channel, scale

    def __call__(self, images, prompts):
        return self.scale * images[:, self.channel].mean((1, 2))
"""
REWARD = ["--reward", "initial_rewards:sharpness"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "initial_rewards.py").write_text(REWARDS)
    (tmp_path / "prompts.txt").write_text("a red circle\ntwo blue squares\na green star\na cross\na red circle\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "initial_rewards", raising=False)
    return tmp_path


def init(*arguments: str) -> dict[str, Any]:
    assert main(["init", "--prompts", "prompts.txt", *arguments, "--output", "config.yaml"]) == 0
    written: dict[str, Any] = yaml.safe_load(Path("config.yaml").read_text())
    return written


def test_the_written_configuration_trains_at_once(folder: Path, tiny_folder: Path) -> None:
    written = init("--model", str(tiny_folder), *REWARD)
    assert written["prompts"] == "prompts.txt" and written["rewards"]["sharpness"]["function"].endswith("sharpness")
    text = Path("config.yaml").read_text()
    assert "# 4 different ones" in text and "on 2 held-out prompts, which are not trained on" in text
    smaller = "--rounds 1 --sampling.num_steps 4 --training.group_size 2 --before_after.samples_per_task 2"
    quick = f"{smaller} --held_out.every 0 --output runs/x"
    assert main(["train", "--config", "config.yaml", *quick.split()]) == 0
    assert Path("runs/x/lora").is_dir() and Path("runs/x/checkpoints/round-000001/lora").is_dir()


def test_a_class_takes_its_parameters_and_its_configuration_parses(folder: Path, tiny_folder: Path) -> None:
    written = init("--model", str(tiny_folder), "--reward", "initial_rewards:Channel", "--args.channel", "2")
    (reward,) = written["rewards"].values()
    assert reward["function"] == {"class_path": "initial_rewards.Channel", "init_args": {"channel": 2, "scale": 1.0}}
    settings, _ = parse(Train, ["--config", "config.yaml"], "train")
    assert settings.rewards["Channel"].function.channel == 2


def test_names_that_yaml_would_read_as_something_else_are_quoted(folder: Path, tiny_folder: Path) -> None:
    model = shutil.copytree(tiny_folder, folder / "mine: second")
    written = init("--model", model.name, *REWARD)
    assert written["model"]["path"] == model.name and written["output"] == f"runs/{model.name}"


def test_one_prompt_has_no_evaluations(folder: Path, tiny_folder: Path) -> None:
    Path("prompts.txt").write_text("a red circle\n")
    assert "before_after" not in init("--model", str(tiny_folder), *REWARD)
    assert parse(Train, ["--config", "config.yaml"], "train")[0].before_after is None


def test_without_an_output_it_is_printed(folder: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "--prompts", "prompts.txt", "--model", str(tiny_folder), *REWARD]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["model"]["path"] == str(tiny_folder)


@pytest.mark.parametrize("name", assets.presets())
def test_presets_fit_few_prompts_and_a_model_of_ones_own(name: str, folder: Path) -> None:
    written = init("--preset", name, "--model", "me/my-finetune", *REWARD)
    assert written["model"]["path"] == "me/my-finetune" and written["model"]["device"] == "cuda"
    assert "NOT RUN on a GPU here" in Path("config.yaml").read_text()
    Path("config.yaml").unlink()
    assert init("--preset", name, *REWARD)["model"]["path"].count("/") == 1
    settings, _ = parse(Train, ["--config", "config.yaml"], "train")
    settings.training.fit(load_prompts(Path("prompts.txt")), settings.recipe.objective.unit)


def test_presets_are_configurations_by_name(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--prompts", "prompts.txt", "--rewards.mine.function", "initial_rewards.sharpness", "--output", "x"]
    for word in (["--config", "preset:sdxl-80gb"], ["--config=preset:sdxl-80gb"]):
        with pytest.raises(SystemExit):
            main(["train", *word, *given, "--print_config"])
        assert "stable-diffusion-xl-base-1.0" in capsys.readouterr().out
    assert main(["train", "--config", "preset:sdxl", *given]) == 2
    assert "there is no preset 'sdxl': choose from flux-dev-80gb, sd15-24gb, sd35" in capsys.readouterr().err
    assert "presets" not in assets.names()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--model", "nowhere", *REWARD],
            "there is no folder nowhere: give a diffusers folder, a Hub id or an embedded",
        ),
        (["--model", "empty", *REWARD], "empty"),
        (REWARD, "name a model, --model PATH_OR_ID, or a preset, --preset sd35-medium-80gb"),
        (["--model", "shapes-sd3", "--reward", "initial_rewards:sharpnes"], "did you mean 'sharpness'?"),
        (["--model", "shapes-sd3", "--reward", "initial_rewards:Channel"], "Channel needs channel"),
        (["--preset", "sdxl", *REWARD], "sdxl"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(
    folder: Path, arguments: list[str], message: str, error: Callable[..., str]
) -> None:
    Path("empty").mkdir()
    answer = error("init", "--prompts", "prompts.txt", *arguments)
    assert message in answer and answer.count("\n") == 1
    Path("config.yaml").write_text("mine")
    answer = error("init", "--prompts", "prompts.txt", "--model", "shapes-sd3", *REWARD, "--output", "config.yaml")
    assert "config.yaml exists: choose another output" in answer and Path("config.yaml").read_text() == "mine"


def test_the_setting_lists_the_presets_of_the_package() -> None:
    assert list(get_args(Preset)) == assets.presets() != []
