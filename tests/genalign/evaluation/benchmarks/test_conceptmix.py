from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from genalign.evaluation.benchmarks import Judges
from genalign.evaluation.benchmarks.conceptmix import CONCEPTMIX, read_conceptmix
from tests.genalign.evaluation.benchmarks.table_judges import TableJudge, score_images

ONE = {"index": 1, "sentence": "A tiny kettle.", "question": ["Is there a kettle?", "Is the kettle tiny?", "  "]}
TWO = {
    "index": 1,
    "sentence": "Two blue lamps in a row.",
    "question": ["Are there lamps? ", "Are there two?", "Are they blue?"],
}


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    for k, row in ((1, ONE), (2, TWO)):
        (tmp_path / f"sentences_k={k}.json").write_text(json.dumps([row]))
    return sorted(tmp_path.glob("*.json"))


def test_prompts_are_tasks_by_k(paths: list[Path]) -> None:
    one, two = read_conceptmix(paths).prompts
    assert (one.task, two.task) == ("k=1", "k=2")
    assert one.metadata["questions"] == ["Is there a kettle?", "Is the kettle tiny?"]
    assert two.metadata["questions"][0] == "Are there lamps?"
    more = paths[0].with_name("sentences_k=5.json")
    more.write_text(json.dumps([{**ONE, "sentence": "A tiny old kettle."}]))  # with fewer questions than k + 1
    unnamed = paths[0].rename(paths[0].with_name("sentences.json"))
    assert [prompt.task for prompt in read_conceptmix([more, unnamed]).prompts] == ["k=5", "k=1"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "is not a list"),
        ('[{"sentence": "A kettle."}]', "item 1: a row of ConceptMix has a sentence"),
        ('["A kettle."]', "item 1: a row of ConceptMix has a sentence"),
        ('[{"sentence": "A kettle.", "question": [" "]}]', "item 1: there is no question about 'A kettle.'"),
        ("[]", "no prompts of conceptmix"),
    ],
)
def test_invalid_files_are_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "k.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_conceptmix([tmp_path / "k.json"])


def test_scores_worked_by_hand(paths: list[Path]) -> None:
    """k=1: one of two images is whole, 3 of 4 answers yes. k=2: none is whole, 4 of 6. Then the mean over k."""
    table = {
        **{(0, "Is there a kettle?"): 1.0, (0, "Is the kettle tiny?"): 0.5},
        **{(1, "Is there a kettle?"): 0.9, (1, "Is the kettle tiny?"): 0.2},
        **{(2, "Are there lamps?"): 0.9, (2, "Are there two?"): 0.1, (2, "Are they blue?"): 0.9},
        **{(3, "Are there lamps?"): 0.9, (3, "Are there two?"): 0.8, (3, "Are they blue?"): 0.4},
    }
    records, numbers = score_images(CONCEPTMIX, read_conceptmix(paths), Judges(questions=TableJudge(table)), 2)
    assert [record.scores["conceptmix"] for record in records] == [1, 0, 0, 0]
    assert numbers == pytest.approx(
        {
            "full mark": 25.0,
            "concept fraction": 100 * (3 / 4 + 4 / 6) / 2,
            "full mark, k=1": 50.0,
            "full mark, k=2": 0.0,
            "concept fraction, k=1": 75.0,
            "concept fraction, k=2": 100 * 4 / 6,
            "missing answers": 0,
            "images left out": 0,
        }
    )


def test_every_k_counts_as_much_as_another(paths: list[Path]) -> None:
    """k=1: one of two prompts is whole. k=2: its only prompt is. The mean over the three prompts would be 2/3."""
    paths[0].write_text(json.dumps([ONE, {**ONE, "sentence": "A tiny old kettle."}]))
    table = {
        **{(0, "Is there a kettle?"): 0.9, (0, "Is the kettle tiny?"): 0.9},
        **{(1, "Is there a kettle?"): 0.1, (1, "Is the kettle tiny?"): 0.1},
        **{(2, "Are there lamps?"): 0.9, (2, "Are there two?"): 0.9, (2, "Are they blue?"): 0.9},
    }
    _, numbers = score_images(CONCEPTMIX, read_conceptmix(paths), Judges(questions=TableJudge(table)))
    assert numbers["full mark"] == numbers["concept fraction"] == pytest.approx(75)


def test_a_missing_answer_is_not_a_wrong_one(paths: list[Path]) -> None:
    table = {(0, "Is there a kettle?"): 1.0, (1, "Are there lamps?"): 0.9, (1, "Are there two?"): 0.1}
    records, numbers = score_images(CONCEPTMIX, read_conceptmix(paths), Judges(questions=TableJudge(table)))
    assert all(math.isnan(record.scores["conceptmix"]) for record in records) and math.isnan(numbers["full mark"])
    assert numbers["concept fraction, k=1"] == 100 and numbers["concept fraction, k=2"] == 50
    assert (numbers["missing answers"], numbers["images left out"]) == (2, 2)
