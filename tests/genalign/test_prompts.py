"""The order in which prompts are trained."""

from __future__ import annotations

import copy
import json
from collections import Counter
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from genalign.prompts import PromptSampler, drawn_in_turn, split_held_out
from genalign.types import Prompt, PromptSet
from genalign.worlds import shapes


def test_tasks_are_met_in_turn() -> None:
    rounds = list(islice(PromptSampler(shapes.prompts("train"), 12, seed=0).rounds(), 10))
    assert all(len({prompt.text for prompt in chosen}) == 12 for chosen in rounds)
    tasks = Counter(prompt.task for chosen in rounds for prompt in chosen)
    assert set(tasks.values()) == {20}


@given(st.integers(-(2**70), 2**70))
def test_any_seed_draws_distinct_prompts(seed: int) -> None:
    prompts = PromptSet.of(list("abcdef"))
    drawn = drawn_in_turn(prompts, 4, seed)
    assert len({prompt.text for prompt in drawn}) == 4 and drawn == drawn_in_turn(prompts, 4, seed)


def test_every_prompt_is_met_before_any_again() -> None:
    prompts = PromptSet("p", tuple(Prompt(str(i)) for i in range(10)))
    rounds = list(islice(PromptSampler(prompts, 5, seed=3).rounds(), 2))
    assert len({prompt.text for chosen in rounds for prompt in chosen}) == 10
    assert rounds == list(islice(PromptSampler(prompts, 5, seed=3).rounds(), 2))
    assert rounds != list(islice(PromptSampler(prompts, 5, seed=4).rounds(), 2))


@given(
    st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from("xyz")), min_size=1, max_size=20),
    st.integers(1, 6),
)
def test_rounds_of_any_set_end(rows: list[tuple[str, str]], count: int) -> None:
    """Texts may come twice, in one task or in two."""
    prompts = PromptSet("p", tuple(Prompt(text, {"tag": tag}) for text, tag in rows))
    distinct = len({text for text, _ in rows})
    if count > distinct:
        return
    rounds = list(islice(PromptSampler(prompts, count, seed=0).rounds(), 2 * distinct))
    assert all(len(set(chosen)) == count for chosen in rounds)


def test_more_prompts_than_there_are() -> None:
    twice = PromptSet("p", (Prompt("a"), Prompt("b"), Prompt("a")))
    with pytest.raises(ValueError, match="prompts_per_round is 3, but the prompt set 'p' has 2 different prompts"):
        PromptSampler(twice, 3, 0)
    assert len(next(PromptSampler(twice, 2, 0).rounds())) == 2


def test_a_held_out_split_is_fixed_proportional_and_disjoint() -> None:
    tasks = {"counting": 40, "colors": 20, "two": 5}
    prompts = PromptSet("p", tuple(Prompt(f"{tag} {i}", {"tag": tag}) for tag, n in tasks.items() for i in range(n)))
    training, held_out = split_held_out(prompts, 0.2)
    assert {task: len(group) for task, group in held_out.by_task().items()} == {"counting": 8, "colors": 4, "two": 1}
    assert set(training.prompts) | set(held_out.prompts) == set(prompts.prompts)
    assert not set(training.prompts) & set(held_out.prompts)
    backwards = PromptSet("p", prompts.prompts[::-1])
    assert set(split_held_out(backwards, 0.2)[1].prompts) == set(held_out.prompts)


@pytest.mark.parametrize(("count", "held_out"), [(2, 1), (3, 1), (4, 2), (5, 2), (10, 2), (11, 3)])
def test_a_small_set_is_split(count: int, held_out: int) -> None:
    twice = PromptSet.of([f"{number} cats" for number in range(count)] * 2)
    training, rest = split_held_out(twice, 0.2)
    assert (len(training), len(rest)) == (2 * (count - held_out), 2 * held_out)  # both times of a text on one side
    assert rest.name == "prompts (held out)"


def test_one_prompt_is_not_split() -> None:
    with pytest.raises(ValueError, match="'prompts' has 1 prompts, of which none is left to train on"):
        split_held_out(PromptSet.of(["a cat"]), 0.2)


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
