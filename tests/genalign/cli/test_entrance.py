"""The command line before and around a command: quick answers, errors of files in one line, tracebacks on request."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import SafetensorError

from genalign.__main__ import COMMANDS as NAMES
from genalign.__main__ import main
from genalign.cli import main as composition
from genalign.cli.config import Train
from genalign.cli.error_messages import error_line
from genalign.cli.parsing import parse

MODULES = "import sys; from genalign.__main__ import main; code = main({words!r}); heavy = {{'torch', 'diffusers'}};"


def test_every_command_is_in_the_usage() -> None:
    assert set(NAMES) == set(composition.COMMANDS)


@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        (["--help"], 0, "usage: genalign COMMAND"),
        ([], 0, "usage: genalign COMMAND"),
        (["--version"], 0, "genalign 0."),
        (["evaluate", "geneval-compare", "--output", "a"], 2, "use genalign compare-evaluations BEFORE AFTER"),
        (["evaluate", "geneval-images"], 2, "use genalign evaluate geneval --samples DIR"),
        (["trian"], 2, "error: no command 'trian': did you mean 'train'?"),
        (["--debug", "xyzzy"], 2, "error: no command 'xyzzy': see --help for all"),
    ],
)
def test_answers_that_need_no_command_are_given_without_torch(words: list[str], status: int, text: str) -> None:
    program = MODULES.format(words=words) + " assert not heavy & set(sys.modules); raise SystemExit(code)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == status and text in done.stdout + done.stderr, done.stderr


def _broken(samples: object, prompts: object) -> None:
    raise RuntimeError("my bug")


STEER = ["--prompts", "shapes:val", "--limit", "1", "--strategy", "genalign.BestOfN", "--budget.nfe", "40"]


def test_a_failing_reward_is_named_with_its_line_and_a_traceback_on_request(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    line = _broken.__code__.co_firstlineno + 1
    reward = ["--rewards.mine.function", f"{__name__}._broken", "--model.path", "shapes-sd3"]
    command = ["steer", "--output", str(tmp_path / "run"), *STEER, *reward]
    for debug in ([], ["--debug"]):
        assert main([*command, *debug]) == 2
        answer = capsys.readouterr().err
        assert f"error: reward 'mine' failed on a first batch: RuntimeError: my bug (test_entrance.py:{line})" in answer
        assert ("Traceback" in answer) == bool(debug)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (NotADirectoryError(20, "Not a directory", "p.txt/locks"), "p.txt/locks: Not a directory"),
        (
            OSError("Error no file named model.safetensors\n  found in directory x"),
            "Error no file named model.safetensors found in directory x",
        ),
        (SafetensorError("header too large"), "header too large"),
        (ValueError(), "ValueError"),
    ],
)
def test_errors_of_the_system_and_of_libraries_are_one_line(error: Exception, line: str) -> None:
    assert error_line(error) == line


def test_home_and_variables_are_expanded_and_empty_paths_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Callable[..., str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("UNSET", raising=False)
    short = "--recipe genalign.flow_grpo --rewards.mine.function rewards.jpeg.compressibility --prompts shapes:val"
    settings = ["--model.path", "shapes-sd3", *short.split()]
    for path in ("~/runs", "$HOME/runs"):
        parsed, plain = parse(Train, ["--output", path, *settings], "train")
        assert parsed.output == plain["output"] == str(tmp_path / "home" / "runs")
    for path in ("", "$UNSET", "$UNSET/runs"):
        answer = error("train", "--output", path, *settings)
        assert answer == f"error: output is {path!r}, which names no path: is a variable of the shell unset?\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["file", "file/below", "n" * 300])
def test_an_output_that_cannot_be_is_refused_in_one_line(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Callable[..., str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    reward = ["--rewards.mine.function", "rewards.jpeg.compressibility", "--model.path", "shapes-sd3"]
    evaluated = ["evaluate", "shapes", "--output", place, "--samples_per_task", "1", "--seeds", "1"]
    for command in (["steer", "--output", place, *STEER, *reward], evaluated):
        answer = error(*command)
        assert answer.count("\n") == 1 and "Traceback" not in answer and place[:20] in answer
    assert Path("file").read_text() == "mine"
