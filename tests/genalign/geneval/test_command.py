"""``genalign evaluate geneval`` on the tiny pipeline, in one process and in several that are killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from genalign.cli import main
from genalign.evaluation import load_evaluation
from genalign.geneval.files import write_prompts
from genalign.types import PromptSet
from genalign.worlds import shapes

SECONDS = 1.0  # that the judge takes, so that a process is killed at work
ROOT = Path(__file__).parents[3]
JUDGE = (
    "{class_path: rewards.geneval.GenEvalJudge, init_args: {"
    "detector: {class_path: tests.genalign.geneval.shapes_judge.ShapesDetector, init_args: {seconds: SECONDS}},"
    " colours: tests.genalign.geneval.shapes_judge.PaletteColours}}"
)


@pytest.fixture(scope="module")
def prompt_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two prompts of every task."""
    path: Path = tmp_path_factory.mktemp("prompts") / "twelve.jsonl"
    tasks = shapes.prompts("iid").by_task().values()
    write_prompts(path, PromptSet("twelve", tuple(prompt for prompts in tasks for prompt in prompts[:2])))
    return path


def _arguments(prompts: Path, model: Path | str, output: Path, seconds: float = 0.0) -> list[str]:
    sampling = [
        "--sampling.num_steps",
        "4",
        "--sampling.sigmas",
        "[1.0, 0.75, 0.5, 0.25]",
        "--sampling.guidance",
        "1.0",
    ]
    settings = ["--prompts", str(prompts), "--model.path", str(model), "--output", str(output), "--seeds", "2"]
    return ["evaluate", "geneval", *settings, *sampling, "--judge", JUDGE.replace("SECONDS", str(seconds))]


def _contents(path: Path) -> dict[str, bytes]:
    kept = [file for file in path.rglob("*") if file.is_file() and file.name != "report.html"]
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in kept}


def test_an_evaluation_is_made_compared_and_rescored(
    tiny_folder: Path, prompt_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny, trained = tmp_path / "tiny", tmp_path / "trained"
    assert main(_arguments(prompt_file, tiny_folder, tiny)) == 0
    printed = capsys.readouterr().out
    assert "12/12" in printed and "Overall score (avg. over tasks)" in printed and "relaxed 0." in printed
    manifest = json.loads((tiny / "evaluation.json").read_text())
    assert manifest["protocol"]["suite"] == "twelve" and manifest["protocol"]["seeds"] == 2
    assert json.loads(manifest["protocol"]["verifier"])["colours"] == {"class": "PaletteColours"}
    before = _contents(tiny)
    assert main(_arguments(prompt_file, tiny_folder, tiny)) == 0  # nothing is left to do
    assert _contents(tiny) == before and "12/12" not in capsys.readouterr().out

    assert main([*_arguments(prompt_file, "shapes-sd3", trained), "--against", str(tiny)]) == 0
    assert "relaxed against tiny: +" in capsys.readouterr().out
    comparison = json.loads((trained / "comparison.json").read_text())
    assert comparison["gain"]["partial"]["mean"] > 0 and set(comparison["wins"]) == {"relaxed", "strict", "partial"}
    assert "Against tiny" in (trained / "report.html").read_text()

    original = ["evaluate", "geneval-original", "--output", str(trained), "--results", str(trained / "results.jsonl")]
    assert main(original) == 0
    rescored = load_evaluation(trained / "original")
    assert rescored.overall == load_evaluation(trained).overall


def test_what_cannot_go_on_says_why(
    tiny_folder: Path, prompt_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def error(*arguments: str) -> str:
        assert main(list(arguments)) == 2
        return capsys.readouterr().err

    asked = _arguments(prompt_file, tiny_folder, tmp_path / "made")
    few = [*asked, "--per_task", "1"]
    assert main(few) == 0
    rows = [json.loads(path.read_text()) for path in sorted((tmp_path / "made" / "prompts").glob("*.json"))]
    assert len({row["metadata"]["tag"] for row in rows}) == len(rows) == 6
    assert "evaluation with other settings (protocol.suite_hash, protocol.images_per_task)" in error(*asked)
    assert "(protocol.seeds, protocol.images_per_task)" in error(*few, "--seeds", "3")
    assert "(model.path, fingerprint)" in error(*few, "--model.path", "shapes-sd3")
    assert "no finished evaluation to compare with" in error(*few, "--against", str(tmp_path / "nowhere"))
    assert "per_task must be at least 1" in error(*asked, "--per_task", "0")
    (tmp_path / "plain.txt").write_text("a bench\n")
    assert "'a bench' has no metadata" in error(*_arguments(tmp_path / "plain.txt", tiny_folder, tmp_path / "x"))
    assert "name the world" in error("evaluate", "genevel")


def _started(arguments: list[str], **variables: str) -> subprocess.Popen[str]:
    environment: Mapping[str, str] = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables}
    command = [sys.executable, "-m", "genalign.cli", *arguments]
    return subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def _all_done(processes: list[subprocess.Popen[str]]) -> list[str]:
    """What each printed, once all have ended well."""
    printed = [process.communicate(timeout=1800)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes)
    return printed


def _wait_for(folder: Path, rows: int) -> None:
    limit = time.monotonic() + 1800
    while len(list(folder.glob("prompts/*.json"))) < rows:
        assert time.monotonic() < limit, "no prompt was finished in time"
        time.sleep(0.01)


@pytest.mark.slow
def test_processes_share_and_go_on_after_a_kill(tiny_folder: Path, prompt_file: Path, tmp_path: Path) -> None:
    """Two processes, one of which is killed, then three for the rest, leave the bytes of one that nobody disturbs."""
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    _all_done([_started(_arguments(prompt_file, tiny_folder, alone, SECONDS))])

    asked = _arguments(prompt_file, tiny_folder, shared, SECONDS)
    killed, other = (_started(asked, RANK=str(rank), WORLD_SIZE="2") for rank in (0, 1))
    _wait_for(shared, 1)
    while not (shared / "prompts" / "00000.json").exists():
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=60)
    _all_done([other])
    kept = {path: path.stat().st_mtime_ns for path in shared.glob("prompts/*.json")}
    assert {int(path.stem) for path in kept} >= {0, *range(1, 12, 2)} and len(kept) < 12
    assert not (shared / "summary.json").exists()

    printed = _all_done([_started(asked, RANK=str(rank), WORLD_SIZE="3") for rank in range(3)])
    made = [line for text in printed for line in text.splitlines() if "/12  " in line]
    assert len(made) == len(set(made)) == 12 - len(kept)
    assert all(path.stat().st_mtime_ns == time_made for path, time_made in kept.items())
    assert any("Overall score" in text for text in printed)
    assert _contents(shared) == _contents(alone)
