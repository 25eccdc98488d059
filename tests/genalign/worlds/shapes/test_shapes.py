"""The shapes world: grammar, splits, palette, scenes, rendering."""

from itertools import combinations, permutations, product

import numpy as np
import pytest
import torch

from genalign.evaluation.geneval.grammar import (
    color_attr,
    colors,
    counting,
    position,
    single_object,
    two_object,
)
from genalign.evaluation.geneval.scoring import relations
from genalign.evaluation.geneval.vocabulary import RELATIONS
from genalign.types import Metadata, Prompt
from genalign.worlds.shapes.color import palette_lab, srgb_to_lab
from genalign.worlds.shapes.geometry import BACKGROUND, PALETTE, SHAPES, SIZE
from genalign.worlds.shapes.prompts import held_out_triples, is_held_out_pair, prompts
from genalign.worlds.shapes.scenes import OUTLINES, Scene, Shape, coverage, render, sample_scene


def sizes(suite: str) -> dict[str, int]:
    return {task: len(group) for task, group in prompts(suite).by_task().items()}


def scenes_of(suite: str, per_task: int, seed: int) -> list[tuple[Metadata, Scene]]:
    rng = np.random.default_rng(seed)
    drawn = [
        group[index].metadata
        for group in prompts(suite).by_task().values()
        for index in rng.integers(len(group), size=per_task)
    ]
    return [(metadata, sample_scene(metadata, rng, hold_out=suite != "comp")) for metadata in drawn]


def clause(shape: str, count: int = 1, **criteria: object) -> dict[str, object]:
    return {"class": shape, "count": count, **criteria}


LEFT_OF, TWO_COLORS = position("circle", "left of", "square"), color_attr("ring", "red", "moon", "orange")


@pytest.mark.parametrize(
    ("prompt", "tag", "text", "include"),
    [
        (single_object("circle"), "single_object", "a circle", [clause("circle")]),
        (two_object("ring", "moon"), "two_object", "a ring and a moon", [clause("ring"), clause("moon")]),
        (counting("cross", "three"), "counting", "three crosses", [clause("cross", 3)]),
        (colors("square", "orange"), "colors", "an orange square", [clause("square", color="orange")]),
        (
            LEFT_OF,
            "position",
            "a circle left of a square",
            [clause("square"), clause("circle", position=["left of", 0])],
        ),
        (
            TWO_COLORS,
            "color_attr",
            "a red ring and an orange moon",
            [clause("ring", color="red"), clause("moon", color="orange")],
        ),
    ],
)
def test_text_and_metadata_are_as_geneval_writes_them(
    prompt: Prompt, tag: str, text: str, include: list[dict[str, object]]
) -> None:
    exclude = {"exclude": [clause("cross", 4)]} if tag == "counting" else {}
    assert (prompt, prompt.metadata) == (text, {"tag": tag, "include": include, **exclude, "prompt": text})


def test_held_out_compositions() -> None:
    held_out = sizes("comp")
    assert set(held_out) == {"two_object", "counting", "colors", "position", "color_attr"}
    assert (held_out["two_object"], held_out["counting"], held_out["colors"]) == (6, 6, 12)
    assert held_out["position"] == len(held_out_triples())


def test_held_out_pairs_leave_every_shape_and_color_seen() -> None:
    held = {(shape, color) for shape, color in product(SHAPES, PALETTE) if is_held_out_pair(shape, color)}
    assert len(held) == 12
    assert all(sum(shape == name for shape, _ in held) == 2 for name in SHAPES)
    assert all(sum(color == name for _, color in held) < len(SHAPES) for name in PALETTE)


def test_held_out_relations_leave_every_pair_and_relation_seen() -> None:
    held = held_out_triples()
    for first, second in permutations(SHAPES, 2):
        assert any((first, relation, second) not in held for relation in RELATIONS)
    for relation in RELATIONS:
        assert sum((a, relation, b) not in held for a, b in permutations(SHAPES, 2)) >= 15
    assert 0.1 <= len(held) / 120 <= 0.3


def test_colors_are_far_apart() -> None:
    lab = palette_lab()
    pairs = {(a, b): float(np.linalg.norm(lab[i] - lab[k])) for (i, a), (k, b) in combinations(enumerate(PALETTE), 2)}
    assert min(pairs.values()) >= 30, min(pairs, key=lambda pair: pairs[pair])
    background = srgb_to_lab(np.array(BACKGROUND)[:, None])[:, 0]
    assert np.linalg.norm(lab - background, axis=1).min() >= 35


def test_lab_of_known_colors() -> None:
    """Published CIELAB values of the sRGB primaries and white (D65)."""
    rgb = np.array([[255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255], [0, 0, 0]]).T
    expected = [[100, 0, 0], [53.24, 80.09, 67.20], [87.73, -86.18, 83.18], [32.30, 79.19, -107.86], [0, 0, 0]]
    np.testing.assert_allclose(srgb_to_lab(rgb).T, expected, atol=0.05)


@pytest.mark.parametrize("suite", ["iid", "comp", "len"])
def test_scenes_are_true(suite: str) -> None:
    for metadata, scene in scenes_of(suite, 20, seed=1):
        for clause in metadata["include"]:
            items = [item for item in scene.items if item.shape == clause["class"]]
            assert len(items) == clause["count"]
            assert all(item.color == clause.get("color", item.color) for item in items)
            if "position" in clause:
                relation, reference = clause["position"]
                target = metadata["include"][reference]["class"]
                (other,) = (item for item in scene.items if item.shape == target)
                assert relation in relations(items[0].box, other.box, 0.18)
        assert len(scene.items) == sum(clause["count"] for clause in metadata["include"])


def test_scenes_have_room() -> None:
    for _, scene in scenes_of("iid", 20, seed=2):
        for item in scene.items:
            assert min(item.box) >= 1 - 1e-9
            assert max(item.box) <= SIZE - 1 + 1e-9
        for a, b in combinations(scene.items, 2):
            gaps = (a.box[0] - b.box[2], b.box[0] - a.box[2], a.box[1] - b.box[3], b.box[1] - a.box[3])
            assert max(gaps) >= 3


def test_training_scenes_show_no_held_out_pair() -> None:
    drawn = scenes_of("iid", 60, seed=3)
    assert not any(is_held_out_pair(item.shape, item.color) for _, scene in drawn for item in scene.items)


def test_rendering_is_deterministic() -> None:
    first = render([scene for _, scene in scenes_of("iid", 3, seed=4)])
    again = render([scene for _, scene in scenes_of("iid", 3, seed=4)])
    assert torch.equal(first, again)
    assert first.shape == (18, 3, SIZE, SIZE)
    assert torch.equal((first * 255).round() / 255, first)


@pytest.mark.parametrize("shape", list(OUTLINES))
def test_outlines_stay_in_their_box(shape: str) -> None:
    item = Shape(shape, "red", 31.3, 33.8, 12.0, (220.0, 40.0, 40.0))
    mask = coverage(item)
    x1, y1, x2, y2 = item.box
    rows, columns = np.nonzero(mask)
    assert columns.min() >= np.floor(x1) and columns.max() < np.ceil(x2)
    assert rows.min() >= np.floor(y1) and rows.max() < np.ceil(y2)
    assert 0.25 * np.pi * item.r**2 < mask.sum() < 1.25 * np.pi * item.r**2


def test_later_items_cover_earlier_ones() -> None:
    below = Shape("square", "red", 32.0, 32.0, 10.0, (220.0, 40.0, 40.0))
    above = Shape("circle", "blue", 32.0, 32.0, 8.0, (45.0, 85.0, 220.0))
    (image,) = render([Scene((below, above))])
    assert (image[:, 32, 32] * 255).tolist() == pytest.approx([45, 85, 220], abs=1e-3)
    assert (image[:, 24, 24] * 255).tolist() == pytest.approx([220, 40, 40], abs=1e-3)
    assert (image[:, 2, 2] * 255).tolist() == pytest.approx(list(BACKGROUND), abs=1e-3)
