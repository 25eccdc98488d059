from __future__ import annotations

import json
from pathlib import Path

import pytest

from genalign.evaluation.geneval.metadata import Clause, Request, written
from genalign.evaluation.geneval.result_files import read_prompts, write_prompts
from genalign.evaluation.geneval.training_prompts import composition_hash, official
from genalign.evaluation.geneval.vocabulary import COLORS, OBJECTS, TASKS, several
from genalign.types import Prompt
from tests.packages import ROOT

DATA = ROOT.parent / "shared" / "data" / "geneval"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="GenEval's prompts are not beside the repository")
BENCH = {"tag": "colors", "include": [{"class": "bench", "count": 1, "color": "red"}], "prompt": "a red bench"}


@needs_data
def test_the_official_prompts_are_read_written_and_made_again(tmp_path: Path) -> None:
    source = DATA / "evaluation_metadata.jsonl"
    prompts = read_prompts(source)
    sizes = {task: len(group) for task, group in prompts.by_task().items()}
    assert sizes == dict(zip(TASKS, (80, 99, 80, 94, 100, 100), strict=True))
    for prompt in prompts.prompts:
        request = Request.of(prompt)
        assert request.metadata() == prompt.metadata and written(request) == prompt
    write_prompts(tmp_path / "again.jsonl", prompts)
    assert (tmp_path / "again.jsonl").read_bytes() == source.read_bytes()


@needs_data
def test_the_official_classes_and_compositions_are_known() -> None:
    assert (DATA / "object_names.txt").read_text().splitlines() == list(OBJECTS)
    requests = [Request.of(prompt) for prompt in read_prompts(DATA / "evaluation_metadata.jsonl").prompts]
    assert {composition_hash(request) for request in requests} == official()
    assert {clause.color for request in requests for clause in request.include} == {None, *COLORS}


def test_a_request_is_a_record() -> None:
    metadata = {
        "tag": "position",
        "include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["above", 0]}],
        "exclude": [{"class": "cat", "count": 2}],
        "prompt": "a photo of a cat above a dog",
    }
    request = Request.parse(metadata)
    assert request.include[1] == Clause("cat", 1, None, "above", 0)
    assert request.names == ("dog", "cat")
    assert json.dumps(request.metadata()) == json.dumps(metadata)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"include": None}, "lacks 'include'"),
        ({"include": []}, "include must have a clause"),
        ({"tag": 3}, "lacks 'tag'"),
        ({"include": "bench"}, "lacks 'include'"),
        ({"include": {"class": "bench"}}, "lacks 'include'"),
        ({"include": [None]}, "must be an object with a class and a count"),
        ({"include": ["bench"]}, "must be an object with a class and a count"),
        ({"exclude": None}, "has an exclude that is no list"),
        ({"exclude": [7]}, "must be an object with a class and a count"),
        ({"include": [{"class": "bench"}]}, "a count of at least 1"),
        ({"include": [{"class": ["bench"], "count": 1}]}, "it needs a class"),
        ({"include": [{"class": "bench", "count": True}]}, "a count of at least 1"),
        ({"include": [{"class": "bench", "count": 1.0}]}, "a count of at least 1"),
        ({"include": [{"class": "bench", "count": 1, "color": ["red"]}]}, "the color must be one of red, orange"),
        ({"include": [{"class": "bench", "count": 1, "position": [["above"], -1]}]}, "the number of an earlier clause"),
        ({"prompt": None}, "lacks 'prompt'"),
        ({"include": [{"class": "bench", "count": 0}]}, "a count of at least 1"),
        ({"include": [{"class": "bench", "count": 1, "color": "beige"}]}, "the color must be one of red, orange"),
        ({"include": [{"class": "bench", "count": 1, "size": "big"}]}, "there is no size in GenEval"),
        ({"include": [{"class": "bench", "count": 1, "position": ["above", 0]}]}, "the number of an earlier clause"),
        ({"include": [{"class": "bench", "count": 1, "position": "above"}]}, "the number of an earlier clause"),
    ],
)
def test_what_is_not_geneval_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Request.parse({**BENCH, **change})


def test_a_prompt_without_metadata_is_refused() -> None:
    with pytest.raises(ValueError, match="'a red bench' has no metadata: GenEval needs its tag"):
        Request.of(Prompt("a red bench"))


def test_the_grammar_writes_each_task_after_any_opening() -> None:
    assert written(Request.parse(BENCH), "a picture of").text == "a picture of a red bench"
    orange = Request("two_object", (Clause("orange"), Clause("bus")), (), "")
    assert written(orange).text == "a photo of an orange and a bus"
    buses = Request("counting", (Clause("bus", 3),), (Clause("bus", 4),), "")
    assert written(buses).text == "a photo of three buses"
    assert written(buses).metadata == buses.metadata() | {"prompt": "a photo of three buses"}


@pytest.mark.parametrize(
    "request_",
    [
        Request("colors", (Clause("bench"),), (), ""),
        Request("counting", (Clause("bench", 9),), (), ""),
        Request("two_object", (Clause("bench"),), (), ""),
        Request("sizes", (Clause("bench"),), (), ""),
        Request("single_object", (Clause("bench", 2),), (), ""),
    ],
)
def test_clauses_of_another_task_have_no_prompt(request_: Request) -> None:
    with pytest.raises(ValueError, match=f"are not those of the task {request_.tag}"):
        written(request_)


def test_a_damaged_prompt_file_names_the_prompt(tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    path.write_text(json.dumps(BENCH) + "\n" + json.dumps({"prompt": "a bench"}) + "\n")
    with pytest.raises(ValueError, match=r"some\.jsonl, prompt 2: the metadata of 'a bench' lacks 'tag'"):
        read_prompts(path)


def test_plurals_for_readers() -> None:
    assert [several(name) for name in ("bench", "sheep", "knife", "bus", "tv remote", "person")] == [
        "benches",
        "sheep",
        "knives",
        "buses",
        "tv remotes",
        "people",
    ]
