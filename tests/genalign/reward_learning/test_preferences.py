"""Judgments that say too little or contradict themselves, the format on disk, and files left incomplete."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from genalign.reward_learning.examples import examples
from genalign.reward_learning.preferences import (
    COMPARISONS,
    PREFERENCES,
    JudgedSample,
    Judgment,
    append_judgments,
    mend,
    read_judgments,
)
from genalign.runtime.media import save_images
from genalign.types import Prompt

LINE = {"prompt": "a dot", "samples": ["0.png", "1.png"], "scores": [1, 0]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images 0.png and 1.png, and 2.png, a copy of 1.png."""
    save_images(torch.rand(2, 3, 4, 4), [tmp_path / "0.png", tmp_path / "1.png"])
    (tmp_path / "2.png").write_bytes((tmp_path / "1.png").read_bytes())
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": None}, "line 1 is no judgment: it has no prompt"),
        ({"prompt": " "}, "line 1 is no judgment: it has no prompt"),
        ({"samples": ["0.png"], "scores": [1]}, "it has 1 samples: a pair is of two samples"),
        ({"samples": ["0.png"], "scores": [1], "kind": "ranking"}, "a ranking is of two or more samples"),
        ({"scores": [1, 1]}, r"its scores of 'overall' are \[1.0, 1.0\], so the winner is unknown"),
        ({"scores": [0, 0]}, "so the winner is unknown"),
        ({"scores": [1]}, "it has 2 samples and 1 scores of 'overall'"),
        ({"scores": {"style": [1, 0.5]}}, "its scores of 'style' are"),
        ({"scores": [float("nan"), 1]}, "leave out what was not judged"),
        ({"kind": "best"}, "its kind is 'best': give one of pair, ranking, rating, label"),
        ({"kind": "label", "scores": [1, 3]}, "its labels of 'overall' are"),
        ({"samples": ["../0.png", "1.png"]}, "leads out of"),
        ({"samples": [{}, "1.png"]}, "names no file"),
        ({"samples": ["0.png", "9.png"]}, r"there is no .*9\.png, which .*1 of its 2 files are missing"),
    ],
)
def test_lines_that_cannot_be_used_are_named(folder: Path, changes: dict[str, object], message: str) -> None:
    (folder / PREFERENCES).write_text(json.dumps(LINE | changes) + "\n")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_judgments(folder)


def test_equal_files_and_mixed_kinds_are_refused(folder: Path) -> None:
    zero, one, copy = (JudgedSample(folder / f"{number}.png") for number in range(3))
    same = Judgment(Prompt("a dot"), (one, copy), scores={"overall": (1, 0)})
    with pytest.raises(ValueError, match="the samples of a judgment of 'a dot' have equal files"):
        examples([same])
    with pytest.raises(ValueError, match="a judgment of 'a dot' has no scores: judge it first"):
        examples([Judgment(Prompt("a dot"), (zero, one)), Judgment(Prompt("b"), (zero, one), scores={"x": (1, 0)})])
    rating, label = (Judgment(Prompt("a"), (zero,), kind, {"overall": (1,)}) for kind in ("rating", "label"))
    with pytest.raises(ValueError, match="the judgments mix ratings, on a scale, with labels"):
        examples([rating, label])


def test_the_scores_of_a_judgment_without_named_dimensions(folder: Path) -> None:
    samples = (JudgedSample(folder / "0.png"), JudgedSample(folder / "1.png"))
    one = Judgment(Prompt("a"), samples, scores={"style": (0, 1)})
    both = Judgment(Prompt("a"), samples, scores={"style": (0, 1), "overall": (1, 0)})
    assert (one.overall(), both.overall()) == ((0, 1), (1, 0))
    with pytest.raises(ValueError, match="has no dimension 'overall', but style, light: add it"):
        Judgment(Prompt("a"), samples, scores={"style": (0, 1), "light": (0, 1)}).overall()


def test_what_a_killed_process_left_incomplete_is_removed(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    samples = (JudgedSample(folder / "0.png", "one", 7), JudgedSample(folder / "1.png"))
    judgment = Judgment(
        Prompt("a é", {"tag": "dots"}), samples, scores={"overall": (1, 0)}, annotator="ada", reason="x"
    )
    mend(folder / PREFERENCES)  # of nothing
    append_judgments(folder, [judgment])
    file = folder / PREFERENCES
    whole = file.read_bytes()
    file.write_bytes(whole + whole[:20])
    with pytest.raises(ValueError, match="line 2: not JSON"):
        read_judgments(folder)
    mend(file)
    assert file.read_bytes() == whole and "is incomplete, and is removed" in caplog.text
    file.write_bytes(whole + '{"prompt": "é'.encode()[:-1])  # within a character
    mend(file)
    assert file.read_bytes() == whole
    file.write_bytes(whole + whole.rstrip(b"\n"))  # as editors leave it
    mend(file)
    append_judgments(folder, [judgment])
    assert read_judgments(folder) == [judgment] * 3 and read_judgments(folder)[0].prompt.metadata == {"tag": "dots"}
    append_judgments(folder, [Judgment(Prompt("a"), samples)], COMPARISONS)
    assert not read_judgments(folder / COMPARISONS)[0].scores


@pytest.mark.parametrize("shown", [(), (1, 0), None])
def test_the_order_that_was_shown_is_restored_also_where_it_is_unknown(
    folder: Path, shown: tuple[int, ...] | None
) -> None:
    samples = (JudgedSample(folder / "0.png"), JudgedSample(folder / "1.png"))
    judgment = Judgment(Prompt("a"), samples, scores={"overall": (1, 0)}, shown=shown)
    append_judgments(folder, [judgment])
    assert read_judgments(folder) == [judgment]
    in_order = judgment.in_shown_order()
    assert in_order.overall() == ((0, 1) if shown else (1, 0)) and in_order.shown == (None if shown is None else ())


def test_samples_are_copied_as_they_are_with_the_suffix_of_their_format(folder: Path) -> None:
    sample = JudgedSample(folder / "0.png")
    assert sample.copy_to(folder / "copies", "a").read_bytes() == (folder / "0.png").read_bytes()
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "JPEG")
    path = JudgedSample(buffer.getvalue()).copy_to(folder / "copies", "b")
    assert path == folder / "copies" / "b.jpeg" and path.read_bytes() == buffer.getvalue()
