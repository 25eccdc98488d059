from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from genalign.evaluation.benchmarks import BENCHMARKS, Judges
from genalign.evaluation.benchmarks.divgenbench import (
    DIVGENBENCH,
    layout_similarity,
    mean_cosine,
    read_divgenbench,
    retrieval_score,
    tones,
)
from genalign.evaluation.geneval.scoring import Detection
from genalign.types import Prompt, PromptSet
from tests.genalign.evaluation.benchmarks.table_judges import image_numbers, score_images
from tests.genalign.evaluation.benchmarks.test_compbench import TableDetector


def one(dimension: str, **metadata: object) -> PromptSet:
    return PromptSet("d", (Prompt("x", {"tag": dimension, "prompt": "x", **metadata}),))


def test_dimensions_come_from_files_or_columns(tmp_path: Path) -> None:
    (tmp_path / "Layout.txt").write_text("four cups on a table\ntwo pairs of scissors\n")
    rows = [
        {"prompt": "a face", "dimension": "ID"},
        {"prompt": "three kettles", "dimension": "layout", "object": "kettle"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    cups, scissors, face, kettles = read_divgenbench([tmp_path / "Layout.txt", tmp_path / "rows.jsonl"]).prompts
    assert [p.task for p in (cups, scissors, face, kettles)] == ["layout", "layout", "id", "layout"]
    assert [p.metadata["object"] for p in (cups, scissors, kettles)] == ["cup", "scissors", "kettle"]
    (tmp_path / "layout.jsonl").write_text('{"prompt": "three kettles"}')
    with pytest.raises(ValueError, match=r"layout\.jsonl, prompt 1: give the object of 'three kettles'"):
        read_divgenbench([tmp_path / "layout.jsonl"])
    (tmp_path / "other.txt").write_text("a face")
    with pytest.raises(ValueError, match="'other' is no dimension: id, style, layout, tonal"):
        read_divgenbench([tmp_path / "other.txt"])


def test_faces_worked_by_hand() -> None:
    """Features at 0, 0 and 90 degrees: pairs of cosine 1, 0 and 0, so 1/3. One image without a face is left out."""
    table = {0: [2.0, 0.0], 1: [1.0, 0.0], 2: [0.0, 3.0], 3: [math.nan, 0.0]}

    def faces(images: Tensor) -> Tensor:
        return torch.tensor([table[n] for n in image_numbers(images)])

    records, numbers = score_images(DIVGENBENCH, one("id"), Judges(faces=faces), per_prompt=4)
    assert records[0].details["measured"] == [2, 0] and math.isnan(records[3].scores["measured"])
    assert numbers == pytest.approx({"ids": 1 / 3, "missing answers": 1, "images left out": 1})
    assert math.isnan(mean_cosine([[1.0]]))


def test_similarity_of_layouts_by_hand() -> None:
    a, b, far = (0, 0, 10, 10), (5, 0, 15, 10), (50, 50, 60, 60)
    assert layout_similarity([a, far], [far, a]) == 1
    assert layout_similarity([a], [b]) == pytest.approx(1 / 3)
    assert layout_similarity([a, far], [b]) == pytest.approx((1 / 3) / 2)  # over the larger number
    # the best pair alone, 8 / 12, would leave 0; the best match is 4 / 16 and 6 / 14
    ours, theirs = [(0, 0, 10, 10), (6, 0, 16, 10)], [(-6, 0, 4, 10), (2, 0, 12, 10)]
    assert layout_similarity(ours, theirs) == pytest.approx((4 / 16 + 6 / 14) / 2)
    assert layout_similarity([], [a]) == 0 and math.isnan(layout_similarity([], []))


def test_layouts_worked_by_hand() -> None:
    """Images 0 and 1 are alike, 2 differs, 3 and 4 are empty: pairs 1, 0, ...; the pair of empty ones says nothing."""
    left, right = Detection("cup", (0, 0, 1, 2), 0.9), Detection("cup", (1, 0, 2, 2), 0.9)
    other = Detection("plate", (0, 0, 1, 2), 0.9)
    detector = TableDetector({0: [left, other], 1: [left], 2: [right]})
    records, numbers = score_images(DIVGENBENCH, one("layout", object="cup"), Judges(detector=detector), per_prompt=5)
    assert records[0].details["measured"] == [[0, 0, 0.5, 1]]  # relative to the image, the prompt's object alone
    assert numbers == pytest.approx(
        {"sdi": 1 - 1 / 9, "pairs without objects": 1, "missing answers": 0, "images left out": 0}
    )


def test_tones_worked_by_hand() -> None:
    """Black and white stripes: saturation 0, value 1/2, contrast 1/2. Red: 1, 1, 0. Their deviations: 1/2, 1/4, 1/4."""
    stripes, red, broken = torch.zeros(3, 2, 2), torch.zeros(3, 2, 2), torch.full((3, 2, 2), torch.nan)
    stripes[:, 0] = 1
    red[0] = 1
    torch.testing.assert_close(tones(torch.stack([stripes, red])), torch.tensor([[0, 0.5, 0.5], [1.0, 1, 0]]))
    images = torch.stack([stripes, red, broken])
    _, numbers = score_images(DIVGENBENCH, one("tonal"), Judges(), 3, images)
    assert numbers == pytest.approx({"pvs": 1.0, "missing answers": 1, "images left out": 1})


def test_retrieval_scores_are_those_of_greatest_likelihood() -> None:
    """Two distinct in three draws of s images have probability 3 (s - 1) / s**2, greatest for s = 2."""
    assert retrieval_score([4, 4, 7], 10) == 0.2
    assert retrieval_score([4, 5, 7], 10) == 1
    assert retrieval_score([3, None], 10) == 1 and math.isnan(retrieval_score([None], 10))
    drawn = np.random.default_rng(0).integers(0, 60, 400).tolist()  # a model that draws from 60 of 100 images
    assert retrieval_score(drawn, 100) == pytest.approx(0.6, abs=0.02)


def grays(folder: Path, values: Sequence[int]) -> Path:
    folder.mkdir()
    for n, value in enumerate(values):
        Image.new("RGB", (4, 4 + n), (value, value, value)).save(folder / f"{n}.png")
    return folder


def test_styles_worked_by_hand(tmp_path: Path) -> None:
    """Of four train images the samples meet one in two draws, so s = 1; the test images meet both of two, so s = 4."""

    def encoder(images: Tensor) -> Tensor:
        gray = images.mean((1, 2, 3)) * math.pi / 2
        return torch.stack([gray.cos(), gray.sin()], dim=1)

    train, test = grays(tmp_path / "train", [0, 80, 160, 240]), grays(tmp_path / "test", [70, 250])
    judges = Judges(style=encoder, style_train=train, style_test=test)
    records, numbers = score_images(DIVGENBENCH, one("style"), judges, per_prompt=2)
    assert [record.details["measured"]["nearest"] for record in records] == [0, 0]
    assert numbers == pytest.approx({"asc": 0.25 / 1, "missing answers": 0, "images left out": 0})
    narrow = Judges(style=encoder, style_train=train, style_test=grays(tmp_path / "narrow", [0, 10]))
    assert score_images(DIVGENBENCH, one("style"), narrow, per_prompt=2)[1]["asc"] == pytest.approx(0.25 / 0.25)
    verifier = DIVGENBENCH.verifier(one("style"), judges)
    assert '"images": 4' in verifier and str(tmp_path) not in verifier
    with pytest.raises(FileNotFoundError, match="there are no images in"):
        (tmp_path / "none").mkdir()
        DIVGENBENCH.verifier(one("style"), Judges(style=encoder, style_train=tmp_path / "none", style_test=test))


def test_dimensions_need_their_judges() -> None:
    assert DIVGENBENCH.needs(one("tonal"), Judges()) == ()
    for dimension, name in (("id", "faces"), ("style", "style"), ("layout", "detector")):
        with pytest.raises(ValueError, match=rf"needs judges\.{name}"):
            DIVGENBENCH.verifier(one(dimension, object="cup"), Judges())
    with pytest.raises(ValueError, match="'cup' and 0 others are none of the 1 classes"):
        DIVGENBENCH.verifier(one("layout", object="cup"), Judges(detector=TableDetector({}, classes=("dog",))))
    assert BENCHMARKS["divgenbench"] is DIVGENBENCH
