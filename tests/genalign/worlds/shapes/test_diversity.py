"""Diversity of scenes whose distribution is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from genalign.types import Prompt
from genalign.worlds import shapes
from genalign.worlds.shapes.diversity import diversity


def _scenes(prompt: Prompt, count: int) -> tuple[object, list[Prompt]]:
    rng = np.random.default_rng(0)
    assert prompt.metadata is not None
    return shapes.render([shapes.sample_scene(prompt.metadata, rng) for _ in range(count)]), [prompt] * count


def _prompt(task: str) -> Prompt:
    return shapes.prompts("iid").by_task()[task][0]


def test_random_scenes_are_varied_in_what_is_open() -> None:
    images, prompts = _scenes(_prompt("single_object"), 200)
    made = diversity(images, prompts)
    assert made.color > 0.85 and made.cell > 0.8  # two of ten colors of this shape are held out


def test_copies_are_not() -> None:
    images, prompts = _scenes(_prompt("single_object"), 1)
    made = diversity(images.expand(50, -1, -1, -1), prompts * 50)
    assert made.color == pytest.approx(0) and made.cell == pytest.approx(0)


def test_what_the_prompt_names_does_not_count() -> None:
    images, prompts = _scenes(_prompt("colors"), 50)
    assert math.isnan(diversity(images, prompts).color)
