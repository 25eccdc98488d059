from __future__ import annotations

import re
from pathlib import Path

import pytest

from genalign.evaluation.geneval.metadata import Clause, PromptSpec
from genalign.evaluation.geneval.result_files import read_prompts, write_prompts
from genalign.evaluation.geneval.training_prompts import (
    OPENINGS,
    TASKS,
    composition,
    composition_hash,
    official_compositions,
    training_prompts,
)
from genalign.evaluation.geneval.vocabulary import COLORS, OBJECTS
from genalign.types import PromptSet
from tests.packages import ROOT

DATA = ROOT.parent / "shared" / "data" / "geneval" / "evaluation_metadata.jsonl"


@pytest.fixture(scope="module")
def drawn() -> PromptSet:
    return training_prompts(150, seed=1)


def compositions(prompts: PromptSet) -> set[str]:
    return {composition(PromptSpec.from_prompt(prompt)) for prompt in prompts.prompts}


def test_every_task_has_its_prompts(drawn: PromptSet) -> None:
    assert {task: len(prompts) for task, prompts in drawn.by_task().items()} == dict.fromkeys(TASKS, 150)
    assert len({prompt.text for prompt in drawn.prompts}) == len(drawn)
    assert {prompt.text.split(" a")[0] for prompt in drawn.prompts} >= {"a snapshot of", "a picture of"}
    for prompt in drawn.prompts:
        opening = next(opening for opening in OPENINGS if prompt.text.startswith(opening))
        assert PromptSpec.from_prompt(prompt).to_prompt(opening) == prompt


def test_no_composition_is_an_official_one(drawn: PromptSet) -> None:
    hashes = {composition_hash(PromptSpec.from_prompt(prompt)) for prompt in drawn.prompts}
    assert len(hashes) == len(drawn) and not hashes & official_compositions()
    assert len(official_compositions()) == 552  # of 553 prompts: two spell one relation from either side


@pytest.mark.skipif(not DATA.is_file(), reason="GenEval's prompts are not beside the repository")
def test_no_composition_is_in_the_official_prompts() -> None:
    ours = compositions(training_prompts(4000))
    assert len(ours) > 10_000 and not ours & compositions(read_prompts(DATA))


def test_people_have_no_color_and_everything_else_is_drawn() -> None:
    clauses = [clause for prompt in training_prompts(2000).prompts for clause in PromptSpec.from_prompt(prompt).include]
    assert not [clause for clause in clauses if clause.name == "person" and clause.color]
    assert {clause.name for clause in clauses} == set(OBJECTS)
    assert {clause.color for clause in clauses} == {None, *COLORS}
    assert {clause.count for clause in clauses} == {1, 2, 3, 4}


def test_the_seed_determines_the_prompts(drawn: PromptSet, tmp_path: Path) -> None:
    write_prompts(tmp_path / "train.jsonl", training_prompts(150, seed=1))
    again = read_prompts(tmp_path / "train.jsonl").prompts
    assert [(p, p.metadata) for p in again] == [(p, p.metadata) for p in drawn.prompts]
    other = training_prompts({"position": 9}, seed=2).prompts
    assert not {prompt.text for prompt in other} & {prompt.text for prompt in drawn.by_task()["position"][:9]}


def test_a_task_returns_all_its_compositions_if_fewer_than_requested() -> None:
    assert len(training_prompts({"counting": 1000})) == 80 * 3 - 80  # a third of them are GenEval's
    assert 0 < len(training_prompts({"two_object": 100}, objects=("dog", "cat", "bus"))) <= 3


def test_held_out_compositions_are_left_out() -> None:
    held_out = training_prompts({"colors": 5})
    without = training_prompts({"colors": 1000}, held_out=held_out.prompts)
    assert not compositions(without) & compositions(held_out)


def test_compositions_do_not_depend_on_wording() -> None:
    def of(tag: str, *include: Clause) -> str:
        return composition(PromptSpec(tag, include))

    assert of("two_object", Clause("dog"), Clause("cat")) == of("two_object", Clause("cat"), Clause("dog"))
    left = of("position", Clause("cat"), Clause("dog", relation="left of", target=0))
    assert left == of("position", Clause("dog"), Clause("cat", relation="right of", target=0))
    assert left != of("position", Clause("dog"), Clause("cat", relation="left of", target=0))
    assert left != of("position", Clause("dog"), Clause("cat", relation="below", target=0))
    assert of("colors", Clause("dog", 1, "red")) != of("colors", Clause("dog", 1, "blue"))


def test_the_example_of_the_documentation_writes_its_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "geneval.md").read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(block, {})
    counts = {task: len(prompts) for task, prompts in read_prompts(tmp_path / "train.jsonl").by_task().items()}
    assert counts == {"position": 2000, "counting": 160, "color_attr": 1500, "colors": 400, "two_object": 400}


def test_invalid_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="no task single_object to train on: choose from two_object"):
        training_prompts({"single_object": 4})
    with pytest.raises(ValueError, match="ask for at least 1 prompt of position, or leave the task out"):
        training_prompts({"colors": 4, "position": 0})
    with pytest.raises(ValueError, match="no colors composition to train on"):
        training_prompts({"colors": 4}, objects=("person",))
