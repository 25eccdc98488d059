from __future__ import annotations

import logging
import math
from dataclasses import replace
from pathlib import Path

import pytest

from genalign.evaluation.benchmarks import BENCHMARKS, Judges
from genalign.evaluation.benchmarks.dpg import DPG, read_dpg
from genalign.evaluation.benchmarks.tifa import questions
from rewards.remote.vlm_judges import Endpoint, YesNoJudge
from tests.genalign.evaluation.benchmarks.table_judges import TableJudge, score_images

HEADER = "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple"
TABLE = """
2,"A dog, barking.",,1,0,entity,whole,entity - whole (dog),Is there a dog?
2,"A dog, barking.",,2,1,action,,action - (dog; bark),Is the dog barking?
10,a red cat on a mat,,1,0,entity,whole,entity - whole (cat),Is there a cat?
10,a red cat on a mat,,4,0,entity,whole,entity - whole (mat),Is there a mat?
10,a red cat on a mat,,3,"1,4",relation,spatial,relation - spatial (cat; mat; on),Is the cat on the mat?
10,a red cat on a mat,,5,3,relation,spatial,relation - spatial (cat; mat; lie),Does the cat lie on it?
"""
DOG, BARK, CAT, MAT, ON, LIE = [line.rsplit(",", 1)[1] for line in TABLE.strip().splitlines()]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "2.txt").write_text("A dog, barking.\n")
    (tmp_path / "prompts" / "10.txt").write_text("a red cat on a mat")
    (tmp_path / "table.csv").write_text(f"{HEADER},question_natural_language{TABLE}")
    return tmp_path


def test_prompts_have_their_questions(files: Path) -> None:
    alone = read_dpg([files / "table.csv"])
    dog, cat = alone.prompts
    assert alone.name == "dpg-bench" and dog.text == "A dog, barking." and cat.text == "a red cat on a mat"
    assert dog.metadata["questions"] == [DOG, BARK]
    assert dog.metadata["categories"] == ["entity - whole", "action"]
    assert [(question.text, question.parents) for question in questions(cat)] == [
        (CAT, ()),
        (MAT, ()),
        (ON, (0, 1)),
        (LIE, (2,)),
    ]
    (files / "prompts" / "10.txt").write_text("a red cat on a thick mat")  # the files are what models were given
    both = read_dpg([files / "prompts", files / "table.csv"])
    assert [(prompt.text, prompt.metadata["item"]) for prompt in both.prompts] == [
        ("a red cat on a thick mat", "10"),
        ("A dog, barking.", "2"),
    ]
    assert both.prompts[0].metadata["questions"] == cat.metadata["questions"]


def test_a_dependency_on_no_question_is_ignored(files: Path, caplog: pytest.LogCaptureFixture) -> None:
    table = (files / "table.csv").read_text().replace('"1,4"', '"1,9"')
    (files / "table.csv").write_text(table)
    with caplog.at_level(logging.WARNING):
        cat = read_dpg([files / "table.csv"]).prompts[1]
    assert cat.metadata["parents"][2] == [0] and "are ignored: 1 in" in caplog.text


def test_invalid_files_are_refused(files: Path) -> None:
    (files / "empty").mkdir()
    for paths in ([files / "prompts"], [], [files / "table.csv"] * 2):
        with pytest.raises(ValueError, match=r"give DPG-Bench's table dpg_bench\.csv"):
            read_dpg(paths)
    with pytest.raises(FileNotFoundError, match=r"has no \.txt files"):
        read_dpg([files / "empty", files / "table.csv"])
    (files / "prompts" / "11.txt").write_text("a bird")
    with pytest.raises(ValueError, match="has no questions for 11 and 0 others"):
        read_dpg([files / "prompts", files / "table.csv"])
    (files / "table.csv").write_text("item,text\n1,a\n")
    with pytest.raises(ValueError, match="is not DPG-Bench's table"):
        read_dpg([files / "table.csv"])


def test_scores_worked_by_hand(files: Path) -> None:
    """Dog: 1 and 1/2, so 3/4. Cat: without the mat ON is zeroed, and LIE after it: 1/4; all yes: 1; so 5/8."""
    prompts = read_dpg([files / "table.csv"])
    table = {
        **{(0, DOG): 0.9, (0, BARK): 0.5},
        **{(1, DOG): 1.0, (1, BARK): 0.4},
        **{(2, CAT): 0.8, (2, MAT): 0.1, (2, ON): 0.9, (2, LIE): 0.9},
        **{(3, CAT): 0.6, (3, MAT): 0.7, (3, ON): 0.8, (3, LIE): 0.9},
    }
    records, numbers = score_images(DPG, prompts, Judges(questions=TableJudge(table)), per_prompt=2)
    assert [record.scores["dpg"] for record in records] == [1, 0.5, 0.25, 1]
    assert records[2].details == {"dpg": pytest.approx([0.8, 0.1, 0.9, 0.9])}
    assert next(iter(numbers)) == "dpg"
    assert numbers == pytest.approx(
        {
            "dpg": 100 * (3 / 4 + 5 / 8) / 2,
            "action": 100 * 1 / 2,
            "entity": 100 * 5 / 6,
            "relation": 100.0,  # before gating, as the original
            "entity - whole": 100 * 5 / 6,
            "relation - spatial": 100.0,
            "missing answers": 0,
            "images left out": 0,
        }
    )


def test_a_prompt_of_few_images_counts_as_much_as_another(files: Path) -> None:
    """Dog: 1 and 1/2, so 3/4. Cat: 1/4 of its only image. The mean over the three images would be 7/12."""
    prompts = read_dpg([files / "table.csv"])
    table = {
        **{(0, DOG): 0.9, (0, BARK): 0.5, (1, DOG): 1.0, (1, BARK): 0.4},
        **{(2, CAT): 0.8, (2, MAT): 0.1, (2, ON): 0.9, (2, LIE): 0.9},
    }
    records, _ = score_images(DPG, prompts, Judges(questions=TableJudge(table)), per_prompt=2)
    assert DPG.aggregate(records[:3], prompts)["dpg"] == pytest.approx(50)


def test_a_missing_answer_is_not_a_wrong_one(files: Path) -> None:
    prompts = read_dpg([files / "table.csv"])
    table = {(0, DOG): 0.9, (1, DOG): 1.0, (1, BARK): 0.0}
    records, numbers = score_images(DPG, prompts, Judges(questions=TableJudge(table)), per_prompt=2)
    assert math.isnan(records[0].scores["dpg"]) and records[0].details == {"dpg": [pytest.approx(0.9), None]}
    assert (numbers["dpg"], numbers["entity"], numbers["action"]) == (50, 100, 0)
    assert (numbers["missing answers"], numbers["images left out"]) == (1 + 8, 3)
    assert math.isnan(numbers["relation"])
    failed = [replace(record, details={}) for record in records]  # the judge raised
    assert DPG.aggregate(failed, prompts)["missing answers"] == 2 * 2 + 2 * 4


def test_the_protocol_names_rules_and_judges(files: Path) -> None:
    prompts = read_dpg([files / "table.csv"])
    verifier = DPG.verifier(prompts, Judges(questions=TableJudge({})))
    assert verifier.startswith("dpg-1: ") and '"class": "TableJudge"' in verifier
    assert '"builtins.len"' in DPG.verifier(prompts, Judges(questions=len))
    servers = [YesNoJudge(Endpoint(f"http://127.0.0.1:{port}/v1", "judge")) for port in (1, 2)]
    first, second = (DPG.verifier(prompts, Judges(questions=server)) for server in servers)
    assert first == second and '"model": "judge"' in first  # wherever the server is
    with pytest.raises(
        ValueError, match=r"needs judges\.questions: name one, as in --judges\.questions rewards\.blip_vqa"
    ):
        DPG.verifier(prompts, Judges())
    assert BENCHMARKS["dpg"] is DPG
