from __future__ import annotations

from pathlib import Path

import pytest

from genalign.evaluation.geneval.metadata import Clause, Request, written
from genalign.evaluation.geneval.result_files import read_prompts, write_prompts
from genalign.evaluation.geneval.training_prompts import (
    OPENINGS,
    TASKS,
    composition,
    composition_hash,
    official,
    training_prompts,
)
from genalign.evaluation.geneval.vocabulary import COLORS, OBJECTS
from genalign.types import PromptSet
from tests.packages import ROOT

DATA = ROOT.parent / "shared" / "data" / "geneval" / "evaluation_metadata.jsonl"


@pytest.fixture(scope="module")
def made() -> PromptSet:
    return training_prompts(150, seed=1)


def test_every_task_has_its_prompts(made: PromptSet) -> None:
    assert {task: len(prompts) for task, prompts in made.by_task().items()} == dict.fromkeys(TASKS, 150)
    assert len({prompt.text for prompt in made.prompts}) == len(made)
    assert {prompt.text.split(" a")[0] for prompt in made.prompts} >= {"a snapshot of", "a picture of"}
    assert all(prompt.text.startswith(OPENINGS) for prompt in made.prompts)


def test_prompts_say_what_their_metadata_asks_for(made: PromptSet) -> None:
    for prompt in made.prompts:
        opening = next(opening for opening in OPENINGS if prompt.text.startswith(opening))
        assert written(Request.of(prompt), opening) == prompt


def test_no_composition_is_one_of_the_officials(made: PromptSet) -> None:
    found = [composition_hash(Request.of(prompt)) for prompt in made.prompts]
    assert len(set(found)) == len(found) and not set(found) & official()
    assert len(official()) == 552  # of 553 prompts: one relation is asked for from either side


@pytest.mark.skipif(not DATA.is_file(), reason="GenEval's prompts are not beside the repository")
def test_no_composition_is_asked_for_by_geneval() -> None:
    theirs = {composition(Request.of(prompt)) for prompt in read_prompts(DATA).prompts}
    ours = {composition(Request.of(prompt)) for prompt in training_prompts(4000).prompts}
    assert len(ours) > 10_000 and not ours & theirs


def test_people_have_no_colour_and_all_else_is_drawn() -> None:
    clauses = [clause for prompt in training_prompts(2000).prompts for clause in Request.of(prompt).include]
    assert not [clause for clause in clauses if clause.name == "person" and clause.color]
    assert {clause.name for clause in clauses} == set(OBJECTS)
    assert {clause.color for clause in clauses} == {None, *COLORS}
    assert {clause.count for clause in clauses} == {1, 2, 3, 4}


def test_the_seed_decides(made: PromptSet) -> None:
    assert training_prompts(150, seed=1) == made
    assert not {p.text for p in training_prompts({"position": 9}, seed=2).prompts} & {p.text for p in made.prompts[:9]}


def test_all_there_are_where_there_are_no_more() -> None:
    counting = training_prompts({"counting": 1000}).prompts
    assert len(counting) == 80 * 3 - 80  # a third of them are GenEval's


def test_objects_colours_and_prompts_can_be_left_out(made: PromptSet) -> None:
    few = training_prompts({"color_attr": 100}, objects=("dog", "cat", "bus"), colors=("red", "blue"))
    assert len(few) <= 3 * 2  # pairs of things that each have one of two colours
    held_out = training_prompts({"colors": 5}).prompts
    without = training_prompts({"colors": 1000}, held_out=held_out)
    compositions = {composition(Request.of(prompt)) for prompt in without.prompts}
    assert not compositions & {composition(Request.of(prompt)) for prompt in held_out}


def test_compositions_do_not_depend_on_words_or_sides() -> None:
    def of(tag: str, *include: Clause) -> str:
        return composition(Request(tag, include, (), ""))

    assert of("two_object", Clause("dog"), Clause("cat")) == of("two_object", Clause("cat"), Clause("dog"))
    left = of("position", Clause("cat"), Clause("dog", relation="left of", target=0))
    assert left == of("position", Clause("dog"), Clause("cat", relation="right of", target=0))
    assert left != of("position", Clause("dog"), Clause("cat", relation="left of", target=0))
    assert left != of("position", Clause("dog"), Clause("cat", relation="below", target=0))
    assert of("colors", Clause("dog", 1, "red")) != of("colors", Clause("dog", 1, "blue"))


def test_what_cannot_be_made_is_refused() -> None:
    with pytest.raises(ValueError, match="no task single_object to train on: choose from two_object"):
        training_prompts({"single_object": 4})
    with pytest.raises(ValueError, match="ask for at least 1 prompt of position, or leave the task out"):
        training_prompts({"colors": 4, "position": 0})
    with pytest.raises(ValueError, match="'beige' is not a colour of GenEval: choose from red, orange"):
        training_prompts({"colors": 4}, colors=("red", "beige"))
    with pytest.raises(ValueError, match="no colors composition to train on"):
        training_prompts({"colors": 4}, objects=("person",))


def test_prompts_can_be_written_for_training(made: PromptSet, tmp_path: Path) -> None:
    write_prompts(tmp_path / "train.jsonl", made)
    assert read_prompts(tmp_path / "train.jsonl").prompts == made.prompts
