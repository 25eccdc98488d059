from __future__ import annotations

from pathlib import Path

import pytest

from genalign.evaluation.geneval.other_benchmarks import read_compbench, read_dpg, read_ocr
from genalign.evaluation.geneval.tifa import questions

HEADER = "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple"
TABLE = """
2,"A dog, barking.",,1,0,entity,whole,entity - whole (dog),Is there a dog?
2,"A dog, barking.",,2,1,action,,action - (dog; bark),Is the dog barking?
10,a red cat on a mat,,1,0,entity,whole,entity - whole (cat),Is there a cat?
10,a red cat on a mat,,4,0,entity,whole,entity - whole (mat),Is there a mat?
10,a red cat on a mat,,3,"1,4",relation,spatial,relation - spatial (cat; mat; on),Is the cat on the mat?
"""


def test_compbench_files_become_tasks(tmp_path: Path) -> None:
    (tmp_path / "color_val.txt").write_text("a red bench and a blue bowl\n\na blue bench and a red bowl\n")
    (tmp_path / "3d_spatial_val.txt").write_text("a cat in front of a dog\n")
    (tmp_path / "color_val_seen.txt").write_text("a green cup\n")
    paths = [tmp_path / f"{name}.txt" for name in ("color_val", "3d_spatial_val", "color_val_seen")]
    assert [(prompt.task, prompt.text) for prompt in read_compbench(*paths).prompts] == [
        ("color", "a red bench and a blue bowl"),
        ("color", "a blue bench and a red bowl"),
        ("3d_spatial", "a cat in front of a dog"),
        ("color", "a green cup"),
    ]
    with pytest.raises(FileNotFoundError, match="no prompt file"):
        read_compbench(tmp_path / "shape_val.txt")


@pytest.fixture
def dpg(tmp_path: Path) -> Path:
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "2.txt").write_text("A dog, barking.\n")
    (tmp_path / "prompts" / "10.txt").write_text("a red cat on a mat")
    (tmp_path / "table.csv").write_text(f"{HEADER},question_natural_language{TABLE}")
    return tmp_path


def test_dpg_prompts_have_their_questions(dpg: Path) -> None:
    plain = read_dpg(dpg / "prompts")
    assert {prompt.text for prompt in plain.prompts} == {"A dog, barking.", "a red cat on a mat"}
    cat, dog = read_dpg(dpg / "prompts", dpg / "table.csv").prompts
    assert dog.metadata["questions"] == ["Is there a dog?", "Is the dog barking?"]
    assert dog.metadata["categories"] == ["entity", "action"]
    assert [(question.text, question.parents) for question in questions(cat)] == [
        ("Is there a cat?", ()),
        ("Is there a mat?", ()),
        ("Is the cat on the mat?", (0, 1)),
    ]


def test_invalid_dpg_files_are_refused(dpg: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no \.txt files"):
        read_dpg(dpg)
    (dpg / "prompts" / "11.txt").write_text("a bird")
    with pytest.raises(ValueError, match="has no questions for 11"):
        read_dpg(dpg / "prompts", dpg / "table.csv")
    (dpg / "table.csv").write_text("item,text\n1,a\n")
    with pytest.raises(ValueError, match="is not DPG-Bench's table"):
        read_dpg(dpg / "prompts", dpg / "table.csv")


def test_ocr_prompts_have_the_quoted_text(tmp_path: Path) -> None:
    path = tmp_path / "signs.txt"
    path.write_text('A shop with the sign "Open Late" above "Closed"\nA wall that says “Hello”\n', encoding="utf-8")
    signs = read_ocr(path)
    assert signs.name == "signs" and signs.prompts[0].task == "ocr"
    assert [prompt.metadata["text"] for prompt in signs.prompts] == ["Open Late", "Hello"]
    path.write_text("a wall\n")
    with pytest.raises(ValueError, match=r"signs\.txt, prompt 1: no text in double quotes"):
        read_ocr(path)
