"""An output that cannot be a folder is refused in one line by every command that writes one; nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

REWARD = ["--rewards.mine.function", "rewards.jpeg.compressibility", "--model.path", "shapes-sd3"]
SMALL = ["--samples_per_task", "1", "--seeds", "1"]
COMMANDS = {
    "train": ["train", *REWARD, "--prompts", "shapes:val", "--recipe", "genalign.flow_grpo"],
    "steer": ["steer", *REWARD, "--prompts", "shapes:val", "--strategy", "genalign.BestOfN", "--budget.nfe", "40"],
    "evaluate shapes": ["evaluate", "shapes", *SMALL],
    "evaluate prompts": ["evaluate", "prompts", *REWARD, "--prompts", "shapes:val", *SMALL],
}
PLACES = {
    "a file": "file",
    "below a file": "file/below",
    "a name that is too long": "n" * 300,
    "a link to nothing": "link",
    "below a link to nothing": "link/below",
    "the empty path": "",
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("command", COMMANDS)
def test_an_output_that_cannot_be_is_refused_in_one_line(
    command: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Callable[..., str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    Path("link").symlink_to("nowhere/at/all")
    answer = error(*COMMANDS[command], "--output", place)
    lines = [line for line in answer.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in answer and place[:4] in lines[0] and "Errno" not in lines[0]
    if place.startswith("link"):
        assert "link is a link to nowhere/at/all, which does not exist" in lines[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]
    assert Path("file").read_text() == "mine"
