from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from genalign.evaluation.geneval.metadata import Clause, PromptSpec
from genalign.evaluation.geneval.result_files import (
    ImageResult,
    read_prompts,
    read_results,
    read_samples,
    sample_name,
    summary,
    write_prompts,
    write_results,
    write_samples,
)
from genalign.evaluation.geneval.scoring import Detection
from genalign.runtime.media import read_image
from genalign.types import Prompt, PromptSet

BENCH = PromptSpec("single_object", (Clause("bench"),)).to_prompt()
TWO = PromptSpec("two_object", (Clause("dog"), Clause("cat"))).to_prompt()


def gray(value: float, count: int = 2) -> torch.Tensor:
    return torch.full((count, 3, 4, 6), value)


def test_images_are_written_in_the_layout_of_geneval(tmp_path: Path) -> None:
    names = write_samples(tmp_path, 17, TWO, gray(0.2))
    assert names == ["00017/samples/0000.png", "00017/samples/0001.png"]
    assert json.loads((tmp_path / "00017" / "metadata.jsonl").read_text()) == TWO.metadata
    assert torch.equal(read_image(tmp_path / names[0]), torch.full((3, 4, 6), 51 / 255))
    assert write_samples(tmp_path, 17, TWO, gray(0.4, 1), first=2) == [sample_name(17, 2)]


def test_samples_are_listed_by_number_whatever_its_digits(tmp_path: Path) -> None:
    write_samples(tmp_path, 3, TWO, gray(0.2))
    write_samples(tmp_path, 0, BENCH, gray(0.4, 1))
    samples = tmp_path / "00003" / "samples"
    (samples / "0001.png").rename(samples / "00001.png")
    (samples / "first.png").touch()
    (tmp_path / "00003" / "grid.png").touch()
    (tmp_path / "notes").mkdir()
    listed = [(sample.index, sample.number, sample.path.name) for sample in read_samples(tmp_path)]
    assert listed == [(0, 0, "0000.png"), (3, 0, "0000.png"), (3, 1, "00001.png")]


def test_folders_without_images_or_metadata_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no images at NNNNN/samples/NNNN\.png"):
        read_samples(tmp_path)
    (tmp_path / "00000" / "samples").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"there is no .*00000/metadata\.jsonl: write the prompt's line"):
        read_samples(tmp_path)
    (tmp_path / "00000" / "metadata.jsonl").write_text(json.dumps(BENCH.metadata))
    with pytest.raises(FileNotFoundError, match=r"00000/samples has no images: generate them, or remove"):
        read_samples(tmp_path)
    for name in ("0001.png", "00001.png"):
        (tmp_path / "00000" / "samples" / name).touch()
    with pytest.raises(ValueError, match="are the same image of the same prompt: remove one"):
        read_samples(tmp_path)


def test_metadata_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    line = json.dumps(TWO.metadata)
    (tmp_path / "p.jsonl").write_text(line, encoding="utf-8-sig")
    assert read_prompts(tmp_path / "p.jsonl").prompts[0].metadata == TWO.metadata
    write_samples(tmp_path, 4, TWO, gray(0.2, 1))
    (tmp_path / "00004" / "metadata.jsonl").write_text(line, encoding="utf-8-sig")
    assert read_samples(tmp_path)[0].metadata == TWO.metadata


@pytest.mark.parametrize("text", ["", "{", "[]", '"bench"', "null", '{"tag": "colors", "prompt": "a bench"}'])
def test_damaged_metadata_names_its_file(tmp_path: Path, text: str) -> None:
    write_samples(tmp_path, 4, TWO, gray(0.2))
    (tmp_path / "00004" / "metadata.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r"00004/metadata\.jsonl is not a line of GenEval's prompt file"):
        read_samples(tmp_path)


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    (name,) = write_samples(tmp_path, 4, TWO, torch.rand(1, 3, 32, 32))
    whole = (tmp_path / name).read_bytes()
    for damaged in (b"", b"no image", whole[: len(whole) // 2], whole[:40]):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(ValueError, match=r"0000\.png cannot be read as an image .*: save it again as PNG"):
            read_image(tmp_path / name)


def test_images_are_rotated_by_their_exif_orientation(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGBA", (6, 4)).save(tmp_path / "turned.png", exif=exif)
    assert read_image(tmp_path / "turned.png").shape == (3, 6, 4)


def test_prompts_without_metadata_are_written_as_text(tmp_path: Path) -> None:
    write_prompts(tmp_path / "some.jsonl", PromptSet("some", (Prompt("a bench"), BENCH)))
    rows = [json.loads(line) for line in (tmp_path / "some.jsonl").read_text().splitlines()]
    assert rows == [{"prompt": "a bench"}, BENCH.metadata]


def _result(prompt: Prompt, correct: bool, number: int = 0) -> ImageResult:
    cat = Detection("cat", (1.0, 2.0, 3.5, 4.0), 0.75)
    reason = "" if correct else "expected dog>=1, found 0"
    return ImageResult.from_detections(sample_name(0, number), prompt, correct, reason, [cat])


def test_results_survive_a_round_trip(tmp_path: Path) -> None:
    extended = Prompt(TWO.text, {**(TWO.metadata or {}), "source": "mine"})  # keys of other programs are retained
    results = [_result(TWO, False), _result(BENCH, True), _result(extended, True)]
    write_results(tmp_path / "results.jsonl", results)
    row = json.loads((tmp_path / "results.jsonl").read_text().splitlines()[0])
    assert list(row) == ["filename", "tag", "prompt", "correct", "reason", "metadata", "details"]
    assert row["correct"] is False and row["details"] == '{"cat": [[1.0, 2.0, 3.5, 4.0, 0.75]]}'
    assert json.loads(row["metadata"]) == TWO.metadata
    assert read_results(tmp_path / "results.jsonl") == results


def test_results_written_by_pandas_are_read(tmp_path: Path) -> None:
    """The original's writer escapes slashes and omits spaces."""
    row = json.dumps(_result(TWO, True).as_row(), separators=(",", ":")).replace("/", r"\/")
    (tmp_path / "results.jsonl").write_text(row + "\n")
    assert read_results(tmp_path / "results.jsonl") == [_result(TWO, True)]


@pytest.mark.parametrize(
    "details", ["[]", "{", '{"cat": [[1, 2, 3, 4]]}', '{"cat": 3}', '{"cat": [["a", 1, 2, 3]]}', None]
)
def test_invalid_results_name_their_line(tmp_path: Path, details: str | None) -> None:
    valid, path = _result(TWO, True).as_row(), tmp_path / "results.jsonl"
    invalid = {"filename": "x"} if details is None else valid | {"details": details}
    path.write_text(f"{json.dumps(valid)}\n{json.dumps(invalid)}\n")
    with pytest.raises(ValueError, match=r"results\.jsonl, line 2: not a result of GenEval"):
        read_results(path)
    with pytest.raises(FileNotFoundError, match=r"give the one that GenEval's evaluate_images\.py wrote"):
        read_results(tmp_path / "none.jsonl")


SUMMARY = """
Summary
=======
Total images: 6
Total prompts: 3
% correct images: 50.00%
% correct prompts: 66.67%

Task breakdown
==============
two_object       = 25.00% (1 / 4)
single_object    = 100.00% (2 / 2)

Overall score (avg. over tasks): 0.62500
"""


def test_summary_matches_the_original() -> None:
    results = [_result(TWO, correct, n) for n, correct in enumerate((True, False, False))]
    results += [_result(BENCH, True), _result(BENCH, True, 1)]
    results += [_result(PromptSpec("two_object", (Clause("dog"), Clause("bus"))).to_prompt(), False)]
    assert summary(results) == SUMMARY.strip()
    with pytest.raises(ValueError, match="no results to sum up"):
        summary([])
