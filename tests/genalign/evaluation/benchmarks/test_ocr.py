from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from genalign.evaluation.benchmarks import Judges
from genalign.evaluation.benchmarks.ocr import OCR, edit_similarity, read_ocr
from tests.genalign.evaluation.benchmarks.table_judges import gray_images, score_images


@pytest.mark.parametrize(
    ("text", "requested", "score"),
    [
        ("hello", "hello", 1.0),  # exact
        ("HE\nLLO", "h ello", 1.0),  # neither case nor white space counts
        ("say hello twice", "hello", 1.0),  # a part of what is written
        ("hell", "hello", 0.8),
        ("hallo", "hello", 0.8),
        ("ehllo", "hello", 0.6),
        ("", "hello", 0.0),
        ("something quite different", "hello", 0.0),  # no less than 0
    ],
)
def test_the_similarity_of_texts(text: str, requested: str, score: float) -> None:
    assert edit_similarity(text, requested) == pytest.approx(score)


def test_an_empty_request_is_refused() -> None:
    with pytest.raises(ValueError, match="the requested text is empty"):
        edit_similarity("hello", "  ")


def test_prompts_have_the_quoted_text(tmp_path: Path) -> None:
    path = tmp_path / "signs.txt"
    path.write_text('A shop with the sign "Open Late" above "Closed"\nA wall that says “Hello”\n', encoding="utf-8")
    signs = read_ocr([path])
    assert signs.name == "signs" and signs.prompts[0].task == "ocr"
    assert [prompt.metadata["text"] for prompt in signs.prompts] == ["Open Late", "Hello"]
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a mug with a name", "text": "Ann"}\n')
    assert read_ocr([path, tmp_path / "rows.jsonl"]).prompts[2].metadata["text"] == "Ann"
    for text in ("a wall", 'a wall with ""'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"signs\.txt, prompt 1: no text in double quotes"):
            read_ocr([path])


def test_scores_worked_by_hand(tmp_path: Path) -> None:
    """Open: whole, then half of its letters, so 3/4. Hello: four of five letters, then an image that cannot be read."""
    (tmp_path / "signs.txt").write_text('a door, "Open"\na wall, "Hello"\n')
    prompts = read_ocr([tmp_path / "signs.txt"])
    texts = {0: "we are o p e n", 1: "opxx", 2: "hallo"}

    def reader(picture: Image.Image) -> str:
        return texts[round(picture.getpixel((0, 0))[0] / 2.55)]

    images = gray_images(4)
    images[3, 0, 0, 0] = torch.nan
    records, numbers = score_images(OCR, prompts, Judges(reader=reader), 2, images)
    scores = [record.scores["ocr"] for record in records]
    assert scores[:3] == pytest.approx([1, 0.5, 0.8]) and math.isnan(scores[3])
    assert [record.details["ocr"]["text"] for record in records] == [*texts.values(), None]
    assert numbers == pytest.approx(
        {"ocr": 100 * (3 / 4 + 4 / 5) / 2, "whole text": 25.0, "missing answers": 1, "images left out": 1}
    )
    with pytest.raises(ValueError, match=r"needs judges\.reader"):
        OCR.scorers(Judges())
