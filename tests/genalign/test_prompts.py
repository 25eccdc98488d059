"""The order in which prompts are trained."""

from __future__ import annotations

import copy
import json
from collections import Counter
from itertools import islice

import pytest

from genalign.prompts import PromptSampler
from genalign.types import Prompt, PromptSet
from genalign.worlds import shapes


def test_tasks_are_met_in_turn() -> None:
    rounds = list(islice(PromptSampler(shapes.prompts("train"), 12, seed=0).rounds(), 10))
    assert all(len({prompt.text for prompt in chosen}) == 12 for chosen in rounds)
    tasks = Counter(prompt.task for chosen in rounds for prompt in chosen)
    assert set(tasks.values()) == {20}


def test_every_prompt_is_met_before_any_again() -> None:
    prompts = PromptSet("p", tuple(Prompt(str(i)) for i in range(10)))
    rounds = list(islice(PromptSampler(prompts, 5, seed=3).rounds(), 2))
    assert len({prompt.text for chosen in rounds for prompt in chosen}) == 10
    assert rounds == list(islice(PromptSampler(prompts, 5, seed=3).rounds(), 2))
    assert rounds != list(islice(PromptSampler(prompts, 5, seed=4).rounds(), 2))


def test_more_prompts_than_there_are() -> None:
    twice = PromptSet("p", (Prompt("a"), Prompt("b"), Prompt("a")))
    with pytest.raises(ValueError, match="prompts_per_round is 3, but the prompt set 'p' has 2 different prompts"):
        PromptSampler(twice, 3, 0)
    assert len(next(PromptSampler(twice, 2, 0).rounds())) == 2


def test_a_prompt_is_its_text() -> None:
    prompt = Prompt("Two red cats", {"tag": "counting"})
    assert (
        prompt.lower().split()[0] == "two"
        and prompt in {"Two red cats"}
        and json.loads(json.dumps([prompt])) == [prompt]
    )
    assert type(prompt.text) is str and prompt.task == "counting" and Prompt("a dog").task == "all"
    assert Prompt(prompt).metadata == copy.deepcopy(prompt).metadata == {"tag": "counting"}
    assert Prompt(prompt, {"tag": "colors"}).task == "colors"


def test_texts_and_prompts_become_a_set() -> None:
    prompt = Prompt("a dog", {"tag": "animals"})
    assert [p.task for p in PromptSet.of(["a cat", prompt]).prompts] == ["all", "animals"]
    assert PromptSet.of("a cat").prompts == ("a cat",)
