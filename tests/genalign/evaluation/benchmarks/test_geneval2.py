from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from genalign.evaluation.benchmarks import Judges
from genalign.evaluation.benchmarks.geneval2 import GENEVAL2, read_geneval2
from tests.genalign.evaluation.benchmarks.table_judges import TableJudge, image_numbers, score_images

ROWS = [
    {
        "prompt": "two red kettles",
        "atom_count": 3,
        "vqa_list": [["How many kettles are there?", "two"], ["Are the kettles red?", "Yes"]],
        "skills": ["count", "attribute"],
    },
    {
        "prompt": "a spoon under a green lamp",
        "atom_count": 10,
        "vqa_list": [["Is there a spoon?", "Yes"], ["Is the lamp green?", "Yes"]],
        "skills": ["object", "attribute"],
    },
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "data.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    return tmp_path / "data.jsonl"


class AnswerTable:
    """Probabilities of answers by (image, question); the right answers are checked too."""

    def __init__(self, table: dict[tuple[int, str], float]) -> None:
        self.judge, self.answers = TableJudge(table), set[tuple[str, str]]()

    def __call__(self, images: Tensor, questions: Sequence[str], answers: Sequence[str]) -> Tensor:
        assert len(image_numbers(images)) == len(questions)
        self.answers |= set(zip(questions, answers, strict=True))
        return self.judge(images, questions)


def test_rows_are_tasks_by_their_number_of_atoms(path: Path) -> None:
    prompts = read_geneval2([path])
    assert [(prompt.task, prompt.text) for prompt in prompts.prompts] == [
        ("3 atoms", "two red kettles"),
        ("10 atoms", "a spoon under a green lamp"),
    ]
    assert prompts.prompts[0].metadata["vqa_list"] == ROWS[0]["vqa_list"]


@pytest.mark.parametrize(
    "change", [{"vqa_list": []}, {"vqa_list": [["Is there a lamp?"]]}, {"skills": ["count"]}, {"atom_count": None}]
)
def test_invalid_rows_are_refused(path: Path, change: dict[str, object]) -> None:
    path.write_text(json.dumps({**ROWS[0], **change}))
    with pytest.raises(ValueError, match=r"data\.jsonl, prompt 1: a row of GenEval 2 has atom_count"):
        read_geneval2([path])


def test_a_repeated_text_counts_once(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert len(read_geneval2([path, path])) == 2
    assert "2 rows of geneval-2 repeat the text of another row" in caplog.text
    with pytest.raises(ValueError, match="no prompts of geneval-2"):
        read_geneval2([])


def test_scores_worked_by_hand(path: Path) -> None:
    """Kettles: GM of .9 and .4 is .6, AM .65. Spoon: .5 and 0 give GM 0, AM .25."""
    prompts = read_geneval2([path])
    table = {
        (0, "How many kettles are there?"): 0.9,
        (0, "Are the kettles red?"): 0.4,
        (1, "Is there a spoon?"): 0.5,
        (1, "Is the lamp green?"): 0.0,
    }
    judge = AnswerTable(table)
    records, numbers = score_images(GENEVAL2, prompts, Judges(answers=judge))
    assert [record.scores["geneval2"] for record in records] == pytest.approx([0.6, 0.0])
    assert next(iter(numbers)) == "soft-tifa gm"
    assert numbers == pytest.approx(
        {
            "soft-tifa gm": 100 * (0.6 + 0) / 2,
            "soft-tifa am": 100 * (0.65 + 0.25) / 2,
            "gm, 3 atoms": 60.0,
            "gm, 10 atoms": 0.0,
            "am, attribute": 100 * (0.4 + 0.0) / 2,
            "am, count": 90.0,
            "am, object": 50.0,
            "missing answers": 0,
            "images left out": 0,
        }
    )
    assert list(numbers)[2:4] == ["gm, 3 atoms", "gm, 10 atoms"]  # by number
    assert ("How many kettles are there?", "two") in judge.answers and ("Is there a spoon?", "Yes") in judge.answers


def test_a_missing_answer_is_not_a_wrong_one(path: Path) -> None:
    prompts = read_geneval2([path])
    table = {(0, "How many kettles are there?"): 0.9, (1, "Is there a spoon?"): 0.5, (1, "Is the lamp green?"): 0.5}
    records, numbers = score_images(GENEVAL2, prompts, Judges(answers=AnswerTable(table)))
    assert math.isnan(records[0].scores["geneval2"])
    assert numbers["soft-tifa gm"] == pytest.approx(50) and numbers["soft-tifa am"] == pytest.approx(50)
    assert numbers["am, count"] == pytest.approx(90) and numbers["am, attribute"] == pytest.approx(50)
    assert (numbers["missing answers"], numbers["images left out"]) == (1, 1) and math.isnan(numbers["gm, 3 atoms"])


def test_a_prompt_of_few_images_counts_as_much_as_another(path: Path) -> None:
    """Kettles: 1 on the first image, no answers on the second. Lamp: 1/4 on both. The mean over images is 1/2."""
    table = {(0, question): 1.0 for question, _ in ROWS[0]["vqa_list"]}
    table |= {(image, question): 0.25 for image in (2, 3) for question, _ in ROWS[1]["vqa_list"]}
    _, numbers = score_images(GENEVAL2, read_geneval2([path]), Judges(answers=AnswerTable(table)), per_prompt=2)
    assert numbers["soft-tifa gm"] == pytest.approx(100 * (1 + 0.25) / 2)


def test_answers_must_be_probabilities(path: Path) -> None:
    scorer = GENEVAL2.scorers(Judges(answers=lambda images, questions, answers: torch.full((len(images),), 1.5)))
    with pytest.raises(ValueError, match="not probabilities"):
        scorer["geneval2"](torch.zeros(1, 3, 2, 2), read_geneval2([path]).prompts[:1])
