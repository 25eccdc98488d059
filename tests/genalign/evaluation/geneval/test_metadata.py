from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from genalign.evaluation.geneval.metadata import Clause, PromptSpec
from genalign.evaluation.geneval.result_files import read_prompts, write_prompts
from genalign.evaluation.geneval.training_prompts import composition_hash, official_compositions
from genalign.evaluation.geneval.vocabulary import COLORS, OBJECTS, TASKS, natural_plural
from tests.packages import ROOT

DATA = ROOT.parent / "shared" / "data" / "geneval"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="GenEval's prompts are not beside the repository")
BENCH = {"tag": "colors", "include": [{"class": "bench", "count": 1, "color": "red"}], "prompt": "a red bench"}


@needs_data
def test_official_prompts_survive_a_round_trip(tmp_path: Path) -> None:
    source = DATA / "evaluation_metadata.jsonl"
    prompts = read_prompts(source)
    sizes = {task: len(group) for task, group in prompts.by_task().items()}
    assert sizes == dict(zip(TASKS, (80, 99, 80, 94, 100, 100), strict=True))
    for prompt in prompts.prompts:
        assert PromptSpec.from_prompt(prompt).to_prompt() == prompt
    write_prompts(tmp_path / "again.jsonl", prompts)
    assert (tmp_path / "again.jsonl").read_bytes() == source.read_bytes()


@needs_data
def test_vocabulary_and_compositions_match_the_official_prompts() -> None:
    assert (DATA / "object_names.txt").read_text().splitlines() == list(OBJECTS)
    specs = [PromptSpec.from_prompt(prompt) for prompt in read_prompts(DATA / "evaluation_metadata.jsonl").prompts]
    assert {composition_hash(spec) for spec in specs} == official_compositions()
    assert {clause.color for spec in specs for clause in spec.include} == {None, *COLORS}


def test_metadata_is_parsed_into_clauses() -> None:
    metadata = {
        "tag": "position",
        "include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["above", 0]}],
        "exclude": [{"class": "cat", "count": 2}],
        "prompt": "a photo of a cat above a dog",
    }
    spec = PromptSpec.from_metadata(metadata)
    assert spec.include[1] == Clause("cat", 1, None, "above", 0)
    assert spec.classes == ("dog", "cat") and spec.exclude == (Clause("cat", 2),)


def test_rows_of_tables_may_have_nulls_and_decimals() -> None:
    dog = {"class": "dog", "count": 1.0, "color": None, "position": None}
    cat = {"class": "cat", "count": 2.0, "color": "red", "position": ["above", 0.0]}
    spec = PromptSpec.from_metadata({"tag": "x", "include": [dog, cat], "exclude": None, "prompt": "p"})
    assert spec.include == (Clause("dog"), Clause("cat", 2, "red", "above", 0)) and spec.exclude == ()


def bench(**fields: object) -> dict[str, object]:
    return {"include": [{"class": "bench", "count": 1, **fields}]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tag": 3}, "lacks 'tag'"),
        ({"prompt": None}, "lacks 'prompt'"),
        *(({"include": include}, "lacks 'include'") for include in (None, "bench", {"class": "bench"})),
        ({"include": []}, "has an empty include"),
        ({"include": ["bench"]}, "must be an object with a class and a count"),
        ({"exclude": "dog"}, "has an exclude that is no list"),
        ({"exclude": [7]}, "must be an object with a class and a count"),
        (bench(**{"class": ["bench"]}), "it needs a class"),
        *((bench(count=count), "a count of at least 1") for count in (True, 1.5, 0, None)),
        *((bench(color=color), "the color must be one of red, orange") for color in (["red"], "beige")),
        (bench(size="big"), "there is no size in GenEval"),
        *((bench(position=p), "the number of an earlier clause") for p in ([["above"], -1], ["above", 0], "above")),
    ],
)
def test_invalid_metadata_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PromptSpec.from_metadata({**BENCH, **change})


def test_prompts_are_spelled_after_any_opening() -> None:
    assert PromptSpec.from_metadata(BENCH).to_prompt("a picture of").text == "a picture of a red bench"
    orange = PromptSpec("two_object", (Clause("orange"), Clause("bus")))
    assert orange.to_prompt().text == "a photo of an orange and a bus"
    buses = PromptSpec("counting", (Clause("bus", 3),), (Clause("bus", 4),))
    assert buses.to_prompt().text == "a photo of three buses"
    assert PromptSpec.from_prompt(buses.to_prompt()) == replace(buses, prompt="a photo of three buses")


@pytest.mark.parametrize(
    ("task", "count"), [("colors", 1), ("counting", 9), ("two_object", 1), ("sizes", 1), ("single_object", 2)]
)
def test_clauses_that_do_not_fit_the_task_have_no_prompt(task: str, count: int) -> None:
    with pytest.raises(ValueError, match=f"do not fit the task {task}"):
        PromptSpec(task, (Clause("bench", count),)).to_prompt()


def test_an_invalid_prompt_file_names_the_prompt(tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    path.write_text(json.dumps(BENCH) + "\n" + json.dumps({"prompt": "a bench"}) + "\n")
    with pytest.raises(ValueError, match=r"some\.jsonl, prompt 2: the metadata of 'a bench' lacks 'tag'"):
        read_prompts(path)


def test_natural_plurals() -> None:
    plurals = [natural_plural(name) for name in ("bench", "sheep", "knife", "bus", "tv remote", "person")]
    assert plurals == ["benches", "sheep", "knives", "buses", "tv remotes", "people"]
