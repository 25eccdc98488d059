"""The grammars and splits of both worlds."""

import hashlib

import pytest

from genalign.worlds.grammar import SUITES, vocabulary
from genalign.worlds.registry import WORLDS

TASKS = {
    "shapes": {"single_object": 6, "two_object": 30, "counting": 18, "colors": 60, "position": 120, "color_attr": 2700},
    "tones": {
        "single_tone": 5,
        "two_tone": 20,
        "counting": 20,
        "pitch": 40,
        "relation": 24,
        "attribution": 1080,
        "loudness": 40,
    },
}


def texts(world: str, suite: str) -> set[str]:
    return {prompt.text for prompt in WORLDS[world].prompts(suite).prompts}


def sizes(world: str, suite: str) -> dict[str, int]:
    return {task: len(group) for task, group in WORLDS[world].prompts(suite).by_task().items()}


@pytest.mark.parametrize("world", WORLDS)
def test_every_prompt_is_in_one_place(world: str) -> None:
    seen, held_out = sizes(world, "iid"), sizes(world, "comp")
    total = {task: count + held_out.get(task, 0) for task, count in seen.items()}
    assert total == TASKS[world]
    every = texts(world, "iid") | texts(world, "comp") | texts(world, "len")
    assert len(every) == sum(total.values()) + len(texts(world, "len"))
    assert len(vocabulary(WORLDS[world].prompts)) <= 40


@pytest.mark.parametrize("world", WORLDS)
def test_train_and_val_part_the_seen_prompts(world: str) -> None:
    assert texts(world, "train") | texts(world, "val") == texts(world, "iid")
    assert not texts(world, "train") & texts(world, "val")
    assert sizes(world, "val") == {task: -(-count // 10) for task, count in sizes(world, "iid").items()}


@pytest.mark.parametrize(("world", "expected"), [("shapes", "a2be5a7481854aea"), ("tones", "e50ec31951cdbd87")])
def test_the_splits_do_not_drift(world: str, expected: str) -> None:
    """A new value would make checkpoints and results those of another benchmark."""
    lines = [f"{suite}\t{prompt.text}" for suite in SUITES for prompt in WORLDS[world].prompts(suite).prompts]
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] == expected


@pytest.mark.parametrize("world", WORLDS)
def test_unknown_suite(world: str) -> None:
    with pytest.raises(ValueError, match="choose one of train"):
        WORLDS[world].prompts("test")
