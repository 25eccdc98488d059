from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from genalign.evaluation.benchmarks import Judges
from genalign.evaluation.benchmarks.unigenbench import UNIGENBENCH, read_unigenbench
from genalign.types import Prompt
from tests.genalign.evaluation.benchmarks.table_judges import TableJudge, image_numbers, score_images

KETTLE = {
    "Subjects": "Object",
    "Testpoints": ["Style", "Attribute - Color", "Attribute - Size"],
    "Testpoint Description": ["ink drawing", "green kettle", "a tiny kettle"],
}
LAMP = {"Testpoints": ["Style"], "Testpoint Description": ["woodcut"]}


def write(path: Path, header: str, rows: Sequence[tuple[str, object]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header.split(","))
        writer.writerows([i, text, json.dumps(cell, ensure_ascii=False)] for i, (text, cell) in enumerate(rows))
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    rows = [("an ink drawing of a tiny, green kettle", KETTLE), ("a woodcut of a lamp", LAMP)]
    return write(tmp_path / "test_prompts_en.csv", "index,prompt_en,sub_dims_en", rows)


def test_prompts_have_their_test_points(path: Path) -> None:
    kettle, lamp = read_unigenbench([path]).prompts
    assert kettle.text == "an ink drawing of a tiny, green kettle"
    assert kettle.metadata["testpoints"] == KETTLE["Testpoints"] and lamp.metadata["descriptions"] == ["woodcut"]
    rows = [("一个水壶", {"考点": ["属性-颜色"], "考点对应描述": ["绿色"]})]
    chinese = write(path.with_name("test_prompts_zh.csv"), "index,prompt_zh,sub_dims_zh", rows)
    assert read_unigenbench([chinese]).prompts[0].metadata["testpoints"] == ["属性-颜色"]


def test_invalid_tables_are_refused(path: Path) -> None:
    for cell in ({}, {"Testpoints": ["Style"]}, {"Testpoints": ["Style"], "Testpoint Description": []}, []):
        write(path, "index,prompt_en,sub_dims_en", [("a kettle", cell)])
        with pytest.raises(ValueError, match="line 2: these are no test points of UniGenBench"):
            read_unigenbench([path])
    write(path, "index,prompt_en,other", [("a kettle", KETTLE)])
    with pytest.raises(ValueError, match="is not a table of UniGenBench"):
        read_unigenbench([path])


class MarkTable:
    """Marks by (image, description); an image without an entry has no marks."""

    def __init__(self, table: dict[int, list[float]]) -> None:
        self.table = table
        self.points: list[Sequence[str]] = []

    def __call__(self, images: Tensor, prompts: Sequence[Prompt], points: Sequence[Sequence[str]]) -> list[Tensor]:
        self.points += points
        numbers = image_numbers(images)
        return [
            torch.tensor(self.table.get(n, [math.nan] * len(group))) for n, group in zip(numbers, points, strict=True)
        ]


def test_scores_worked_by_hand(path: Path) -> None:
    """Style 2 of 4, color 1 of 2, size 1 of 2: style 1/2, attribute 2/4; the headline is their mean."""
    judge = MarkTable({0: [1, 1, 0], 1: [1, 0, 1], 2: [0], 3: [0]})
    records, numbers = score_images(UNIGENBENCH, read_unigenbench([path]), Judges(checklist=judge), per_prompt=2)
    assert [record.scores["unigenbench"] for record in records] == pytest.approx([2 / 3, 2 / 3, 0, 0])
    assert judge.points[0] == [
        "Style: ink drawing",
        "Attribute - Color: green kettle",
        "Attribute - Size: a tiny kettle",
    ]
    assert numbers == pytest.approx(
        {
            "unigenbench": 50.0,
            "Attribute": 50.0,
            "Style": 50.0,
            "Attribute - Color": 50.0,
            "Attribute - Size": 50.0,
            "missing answers": 0,
            "images left out": 0,
        }
    )


def test_dimensions_weigh_equally_and_missing_marks_are_no_zeros(path: Path) -> None:
    judge = MarkTable({0: [1, 0, math.nan], 2: [1]})
    records, numbers = score_images(UNIGENBENCH, read_unigenbench([path]), Judges(checklist=judge), per_prompt=2)
    assert math.isnan(records[0].scores["unigenbench"])
    assert numbers["Style"] == 100 and numbers["Attribute"] == 0 and numbers["unigenbench"] == 50
    assert math.isnan(numbers["Attribute - Size"])
    assert (numbers["missing answers"], numbers["images left out"]) == (1 + 3 + 1, 3)


def test_a_point_is_met_from_one_half(path: Path) -> None:
    judge = MarkTable({0: [0.5, 0.49, 0.9], 1: [0.1]})
    records, _ = score_images(UNIGENBENCH, read_unigenbench([path]), Judges(checklist=judge))
    assert [record.scores["unigenbench"] for record in records] == pytest.approx([2 / 3, 0])


def test_a_judge_of_questions_stands_in(path: Path) -> None:
    judge, prompts = TableJudge({}), read_unigenbench([path])
    score_images(UNIGENBENCH, prompts, Judges(questions=judge))
    assert judge.questions[-1] == (
        'The image should show: "a woodcut of a lamp". Is this requirement met: Style: woodcut?'
    )
    assert '"questions"' in UNIGENBENCH.verifier(prompts, Judges(questions=judge))
    both = Judges(questions=judge, checklist=MarkTable({}))
    assert '"checklist"' in UNIGENBENCH.verifier(prompts, both)
    with pytest.raises(ValueError, match=r"needs judges\.checklist"):
        UNIGENBENCH.verifier(prompts, Judges())


def test_marks_are_checked(path: Path) -> None:
    judge = MarkTable({0: [1, 1]})
    with pytest.raises(ValueError, match=r"answered \(2,\) for 3 questions"):
        score_images(UNIGENBENCH, read_unigenbench([path]), Judges(checklist=judge))
