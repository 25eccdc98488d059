"""The grammars and splits of both worlds."""

import contextlib
import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
    assert sizes(world, "val") == {task: max(2, -(-count // 10)) for task, count in sizes(world, "iid").items()}


@pytest.mark.parametrize(("world", "expected"), [("shapes", "c0bcca97f99a9d24"), ("tones", "095b3055e1d9c274")])
def test_the_splits_do_not_drift(world: str, expected: str) -> None:
    """A new value would make checkpoints and results those of another benchmark."""
    lines = [f"{suite}\t{prompt.text}" for suite in SUITES for prompt in WORLDS[world].prompts(suite).prompts]
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] == expected


@pytest.mark.parametrize("world", WORLDS)
def test_unknown_suite(world: str) -> None:
    with pytest.raises(ValueError, match="choose one of train"):
        WORLDS[world].prompts("test")


def _impossible(world: str) -> list[dict[str, object]]:
    if world == "shapes":
        square, left = {"class": "square", "count": 1}, {"class": "circle", "count": 2, "position": ["left of", 0]}
        return [{"include": [{"class": "circle", "count": 7}]}, {"include": []}, {"include": [square, left]}]
    low, high = ({"class": "sine", "count": 1, "pitch": note} for note in ("C4", "A5"))
    return [
        {"events": [{"class": "sine", "count": 8}]},
        {"events": []},
        {"events": [high, low], "relation": "higher"},
        {"events": [low, low], "relation": "lower"},
        {"events": [low], "loudness": "louder"},
    ]


@pytest.mark.parametrize(
    ("world", "metadata"), [(world, metadata) for world in WORLDS for metadata in _impossible(world)]
)
def test_drawing_ends_for_metadata_that_nothing_fulfills(world: str, metadata: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"no scene|no clip|draws gave no"):
        WORLDS[world].render([metadata], np.random.default_rng(0))


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_drawing_ends_for_any_metadata(data: st.DataObject) -> None:
    """Any counts, classes, colors and relations: a sample, or one line."""
    clause = st.fixed_dictionaries(
        {"class": st.sampled_from(["circle", "moon"]), "count": st.integers(0, 9)},
        optional={"color": st.sampled_from(["red", "blue"]), "position": st.just(["above", 0])},
    )
    metadata = {"include": data.draw(st.lists(clause, max_size=3))}
    with contextlib.suppress(ValueError):
        assert WORLDS["shapes"].render([metadata], np.random.default_rng(0)).shape == (1, 3, 64, 64)
