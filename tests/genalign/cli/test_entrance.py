"""The command line before and around a command: quick answers, errors of files in one line, tracebacks on request."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from pathlib import Path

import pytest
from safetensors import SafetensorError

from genalign.__main__ import main
from genalign.cli.commands import COMMANDS, imported
from genalign.cli.error_messages import error_line
from genalign.cli.parsing import parse
from genalign.cli.train_settings import Train
from genalign.scoring.score import RewardError
from genalign.training.errors import TrainingStoppedError
from genalign.training.nonfinite import DivergedError
from tests.packages import folder_of

PROGRAM = """
import sys
from genalign.__main__ import main
for words in {commands!r}:
    code = main(words)
print("imported", *(name for name in {heavy!r} if name in sys.modules), file=sys.stderr)
raise SystemExit(code)
"""
HEAVY = ("torch", "diffusers", "transformers", "peft", "numpy")


def answer(folder: Path, *commands: list[str], heavy: Sequence[str] = HEAVY) -> tuple[int, str, list[str]]:
    """Run commands in a process of their own: the last status, what they print, which heavy modules they import."""
    program = PROGRAM.format(commands=commands, heavy=heavy)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=folder, check=False)
    *lines, imported = (done.stdout + done.stderr).splitlines()
    assert imported.startswith("imported"), done.stderr
    return done.returncode, "\n".join(lines), imported.split()[1:]


@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        (["--help"], 0, "usage: genalign COMMAND"),
        ([], 0, "usage: genalign COMMAND"),
        (["--version"], 0, "genalign 0."),
        (["trian"], 2, "error: no command 'trian': did you mean 'train'?"),
        (["--debug", "xyzzy"], 2, "error: no command 'xyzzy': see --help for all"),
        (["evaluate", "--help"], 0, "genalign evaluate COMMAND --help explains the settings of one."),
        (["reward", "--help"], 0, "reward check"),
        (["evaluate", "shaps"], 2, "error: no command 'evaluate shaps': did you mean 'shapes'?"),
        (["evaluate"], 2, "error: choose one of prompts, shapes, tones"),
        (["train", "--help"], 0, "--training.rounds"),
        (["report", "--help"], 0, "Folder of the run"),
        (["compare", "--help"], 0, "usage: genalign compare CONFIG"),
        (["train", "--recipe.help", "flow_grpo"], 0, "--recipe.clip_range"),
        (["train", "--trainin.rounds", "3"], 2, "unknown setting 'trainin.rounds': did you mean 'training.rounds'?"),
        (["train", "--config", "nofile.yaml"], 2, "error: nofile.yaml: no such configuration file"),
        (["train", "--config", "typo.yaml"], 2, "unknown setting 'training.round': did you mean 'training.rounds'?"),
        (["train"], 2, "output, model.path, prompts, recipe are missing"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_answers_that_need_no_command_are_given_without_torch(
    words: list[str], status: int, text: str, tmp_path: Path
) -> None:
    demo = folder_of("genalign") / "assets" / "demo.yaml"
    (tmp_path / "typo.yaml").write_text(demo.read_text().replace("rounds:", "round:"))
    code, printed, imported = answer(tmp_path, words)
    assert (code, imported) == (status, []) and text in printed


SEARCH = (
    "--output x --model shapes-sd3 --prompts shapes:val --strategy BestOfN"
    " --rewards.a.function rewards.jpeg.compressibility"
)


def test_a_command_imports_what_it_uses(tmp_path: Path) -> None:
    commands = ["report", "nowhere"], ["steer", *SEARCH.split(), "--batch_size", "0"]
    _, printed, imported = answer(tmp_path, *commands, heavy=("diffusers", "peft", "transformers"))
    assert "nowhere is not a run folder" in printed and "batch_size must be at least 1, not 0" in printed
    assert not imported


def test_an_interruption_while_modules_are_imported_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("genalign.cli.main.main", interrupted)
    assert main(["report", "runs/mine"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("name", ["rewards", "pipelines"])
def test_a_file_that_hides_a_package_of_genalign_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / f"{name}.py").write_text("")
    command = [sys.executable, "-m", "genalign", "train", "--output", "run"]  # -m puts the working directory first
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    hidden = f"error: {tmp_path / name}.py is imported as {name!r} instead of genalign's package "
    assert done.returncode == 2 and done.stderr.startswith(hidden) and done.stderr.count("\n") == 1
    assert f"rename it, e.g. to my_{name}, or run genalign in another folder" in done.stderr


def test_every_command_can_be_imported() -> None:
    for command in COMMANDS.values():
        assert callable(imported(command.function)) and is_dataclass(imported(command.settings)), command.name


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


@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize(
    "raised",
    [
        ValueError("bad value"),
        NotADirectoryError(20, "bad place", "file/below"),
        OSError("bad folder"),
        SafetensorError("bad header"),
        RewardError("bad reward"),
        DivergedError("bad round"),
        TrainingStoppedError("bad run"),
    ],
    ids=lambda raised: type(raised).__name__,
)
def test_every_kind_of_input_error_is_one_line_and_a_traceback_on_request(
    raised: Exception, debug: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(started: float) -> None:
        raise raised

    monkeypatch.setattr("genalign.cli.main.command_context", fail)
    assert main(["report", "runs/mine", *["--debug"] * debug]) == 2
    answer = capsys.readouterr().err
    assert answer.endswith(f"error: {error_line(raised)}\n") and "bad " in answer
    assert ("Traceback" in answer) == debug and (debug or answer.count("\n") == 1)


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
        assert answer == f"error: output is {path!r}, which is not a path: is a shell variable unset?\n"
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


@pytest.mark.slow
def test_a_warning_of_the_hub_is_printed_once(tmp_path: Path) -> None:
    program = (
        "import logging; from genalign.__main__ import main; main(['report', 'nowhere']);"
        "import huggingface_hub.file_download;"  # which gives the library's logger its handler
        "logging.getLogger('huggingface_hub.file_download').warning('retrying')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stderr.count("retrying") == 1
