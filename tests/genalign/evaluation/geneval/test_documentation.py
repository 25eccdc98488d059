"""Commands, configurations and code in docs/geneval.md are valid."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from genalign.cli import config
from genalign.cli.evaluate_geneval import EvaluateGenEval, GenEvalImages, GenEvalOriginal
from genalign.evaluation.geneval.result_files import read_prompts
from rewards.backbones.detectors import Owlv2
from rewards.geneval import GenEvalJudge, GenEvalReward
from tests.packages import ROOT

PAGE = (ROOT / "docs" / "geneval.md").read_text(encoding="utf-8")
COMMANDS = {"geneval": EvaluateGenEval, "geneval-images": GenEvalImages, "geneval-original": GenEvalOriginal}


def test_commands_are_parsed() -> None:
    lines = re.findall(r"^    genalign evaluate (.*)$", PAGE, re.MULTILINE)
    parsed = [config.parse(COMMANDS[name], rest, name)[0] for name, *rest in map(shlex.split, lines)]
    assert {type(settings) for settings in parsed} == set(COMMANDS.values())
    (judge,) = [settings.judge for settings in parsed if getattr(settings, "judge", None)]
    assert isinstance(judge, GenEvalJudge) and isinstance(judge.detector, Owlv2)
    assert judge.detector.thresholds.confidence == 0.25


def test_the_reward_is_configured() -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    function = yaml.safe_load(block)["rewards"]["geneval"]["function"]
    parsed, _ = config.parse(config.RewardChoice, ["--function", str(function)], "test")
    assert parsed.function == GenEvalReward("partial")


def test_training_prompts_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(block, {})
    counts = {task: len(prompts) for task, prompts in read_prompts(tmp_path / "train.jsonl").by_task().items()}
    assert counts == {"position": 2000, "counting": 160, "color_attr": 1500, "colors": 400, "two_object": 400}
