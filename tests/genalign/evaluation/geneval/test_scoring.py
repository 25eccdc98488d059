"""GenEval's rules: numbers worked by hand, and the shapes world's verifier as a second implementation."""

from __future__ import annotations

import random

import numpy as np
import pytest

from genalign.evaluation.geneval.metadata import Clause, PromptSpec
from genalign.evaluation.geneval.scoring import (
    Detection,
    Thresholds,
    filter_detections,
    overlap,
    relations,
    score_detections,
    upstream_partial,
)
from genalign.worlds.shapes.detection import ShapeDetection
from genalign.worlds.shapes.prompts import prompts
from genalign.worlds.shapes.verifier import verify_detections

LEFT, RIGHT, MIDDLE = (0.0, 0.0, 10.0, 10.0), (20.0, 0.0, 30.0, 10.0), (1.0, 1.0, 11.0, 11.0)


def item(name: str, box: tuple[float, float, float, float] = LEFT, color: str | None = None, score: float = 0.8):
    return Detection(name, box, score, color)


def spec(*include: Clause, exclude: tuple[Clause, ...] = ()) -> PromptSpec:
    return PromptSpec("any", include, exclude, "any")


CAT_LEFT_OF_DOG = spec(Clause("dog"), Clause("cat", relation="left of", target=0))
RED_CAR = spec(Clause("car", 1, "red"))


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (LEFT, RIGHT, {"left of"}),
        (LEFT, (12, 12, 22, 22), {"left of", "above"}),
        (LEFT, MIDDLE, set()),
        ((10, 4, 20, 14), RIGHT, {"left of"}),
        (LEFT, LEFT, set()),
        (RIGHT, LEFT, {"right of"}),
        ((0, 20, 10, 30), LEFT, {"below"}),
    ],
)
def test_relations_match_geneval(a, b, expected) -> None:
    assert relations(a, b) == expected


def test_position_threshold_changes_the_score() -> None:
    overlapping = [item("cat", (0.0, 0.0, 10.0, 10.0)), item("dog", (6.0, 0.0, 16.0, 10.0))]
    assert score_detections(overlapping, CAT_LEFT_OF_DOG, 0.1).relaxed
    assert not score_detections(overlapping, CAT_LEFT_OF_DOG, 0.2).relaxed


def test_overlap_includes_the_last_pixel() -> None:
    assert overlap(LEFT, LEFT) == 1
    assert overlap((0, 0, 9, 9), (10, 0, 19, 9)) == 0
    assert overlap((0, 0, 9, 9), (9, 0, 18, 9)) == pytest.approx(10 / 190)
    assert overlap((5, 5, 3, 3), (5, 5, 3, 3)) == 0


def test_detections_above_the_threshold_are_sorted_by_class_and_score() -> None:
    cats = [item("cat", score=score) for score in (0.3, 0.95, 0.31, 0.9, 0.91)]
    detections = [*cats, item("dog", score=0.5)]
    assert filter_detections(detections, "two_object", Thresholds()) == [1, 4, 3, 2, 5]
    assert filter_detections(detections, "counting", Thresholds()) == [1, 4]
    many = [item("cat", score=0.5 + i / 100) for i in range(20)] + [item("dog")]
    assert filter_detections(many, "colors", Thresholds()) == [*range(19, 3, -1), 20]  # 16 of a class at most


def test_thresholds_are_compared_in_float32_and_ties_go_to_the_last() -> None:
    """GenEval's scores are float32, sorted by argsort and reversed."""
    least = {tag: [float(np.float32(value)), value + 1e-6] for tag, value in (("colors", 0.3), ("counting", 0.9))}
    for tag, scores in least.items():
        assert filter_detections([item("cat", score=score) for score in scores], tag, Thresholds()) == [1]
    scores = np.array([0.5, 0.8, 0.5, 0.9, 0.8], dtype=np.float32)
    ours = filter_detections([item("cat", score=float(score)) for score in scores], "colors", Thresholds())
    assert ours == np.argsort(scores)[::-1].tolist() == [3, 4, 1, 2, 0]


def test_max_overlap_drops_boxes_that_overlap_a_better_one() -> None:
    cats = [item("cat", score=0.6), item("cat", MIDDLE, score=0.7), item("cat", RIGHT, score=0.5)]
    detections = [*cats, item("dog", MIDDLE)]
    assert filter_detections(detections, "colors", Thresholds()) == [1, 0, 2, 3]
    assert filter_detections(detections, "colors", Thresholds(max_overlap=0.5)) == [1, 2, 3]
    exact = overlap(LEFT, MIDDLE)
    assert filter_detections(cats[:2], "colors", Thresholds(max_overlap=exact)) == [1]
    assert filter_detections(cats[:2], "colors", Thresholds(max_overlap=exact + 1e-9)) == [1, 0]
    row = [item("cat", (4.0 * i, 0.0, 4.0 * i + 9, 9.0), score=0.9 - i / 10) for i in range(3)]
    assert filter_detections(row, "colors", Thresholds(max_overlap=0.4)) == [0, 2]  # a dropped box drops no other


def test_relaxed_ignores_surplus_objects_unless_a_clause_excludes_them() -> None:
    score = score_detections([item("cat"), item("cat", RIGHT), item("cat", MIDDLE)], spec(Clause("cat", 2)))
    assert (score.relaxed, score.strict, score.partial, score.reason) == (True, False, 0.5, "")
    two_cats = spec(Clause("cat", 2), exclude=(Clause("cat", 3),))
    score = score_detections([item("cat")] * 3, two_cats)
    assert (score.relaxed, score.reason) == (False, "expected cat<3, found 3")
    assert score_detections([item("cat")] * 2, two_cats).strict
    no_dogs = spec(Clause("cat"), exclude=(Clause("dog", 1),))
    assert not score_detections([item("cat"), item("dog")], no_dogs).strict


def test_color_is_checked_on_the_most_confident_object() -> None:
    red_first = [item("car", color="blue", score=0.5), item("car", color="red", score=0.9)]
    blue_first = [item("car", color="blue", score=0.9), item("car", color="red", score=0.5)]
    assert score_detections(red_first, RED_CAR).relaxed
    assert score_detections(blue_first, RED_CAR).reason == "expected red car>=1, found 0 red; and 1 blue"
    assert score_detections(red_first, RED_CAR).partial == 0  # one car too many: neither count nor color
    cars = [item("car", color=color) for color in ("white", "blue", "white")]
    reason = score_detections(cars, spec(Clause("car", 3, "red"))).reason
    assert reason == "expected red car>=3, found 0 red; and 1 blue, 2 white"
    with pytest.raises(ValueError, match=r"the color of the car at .* is unknown: classify its crop first"):
        score_detections([item("car")], RED_CAR)
    assert not score_detections([], RED_CAR).relaxed


def test_position_needs_its_target() -> None:
    def reason(*objects: Detection) -> str:
        return score_detections(objects, CAT_LEFT_OF_DOG).reason

    assert reason(item("cat")) == "expected dog>=1, found 0\nno target for cat to be left of"
    assert score_detections([item("cat"), item("dog", RIGHT)], CAT_LEFT_OF_DOG).strict
    assert reason(item("cat", RIGHT), item("dog")) == "expected cat left of target, found right of target"
    assert reason(item("cat", MIDDLE), item("dog")) == "expected cat left of target, found  target"  # GenEval's gap


def test_every_pair_must_be_in_the_relation() -> None:
    dogs = [item("dog", RIGHT), item("dog", (-20.0, 0.0, -10.0, 10.0))]
    two_dogs = spec(Clause("dog", 2), Clause("cat", relation="left of", target=0))
    score = score_detections([item("cat"), *dogs], two_dogs)
    assert not score.relaxed
    assert score.criteria == (("count", 1), ("count", 1), ("position", 0.5))


@pytest.mark.parametrize(("count", "partial"), [(0, 0), (1, 1 / 3), (2, 2 / 3), (3, 1), (4, 2 / 3), (9, 0)])
def test_partial_credit_for_counts_is_clamped(count: int, partial: float) -> None:
    assert score_detections([item("cat")] * count, spec(Clause("cat", 3))).partial == pytest.approx(partial)


def test_partial_credit_has_no_upstream_faults() -> None:
    right, wrong = [item("cat"), item("dog", RIGHT)], [item("cat", RIGHT), item("dog")]
    assert score_detections(right, CAT_LEFT_OF_DOG).partial == 1 == upstream_partial(right, CAT_LEFT_OF_DOG)
    assert score_detections(wrong, CAT_LEFT_OF_DOG).partial == pytest.approx(2 / 3)
    assert upstream_partial(wrong, CAT_LEFT_OF_DOG) == 0.75
    assert upstream_partial([item("cat")] * 3, spec(Clause("cat"))) == -1
    assert upstream_partial([item("cat")] * 16, spec(Clause("cat"))) == -14


def test_upstream_partial_averages_its_entries() -> None:
    two_cars = spec(Clause("car", 2, "red"))
    assert upstream_partial([item("car", color="red"), item("car", color="blue")], two_cars) == pytest.approx(0.75)
    assert upstream_partial([item("car")], two_cars) == pytest.approx((0.5 + 0) / 2)
    both = spec(Clause("dog", color="red"), Clause("cat", 1, "blue", "left of", 0))
    blue_dog = [item("dog", RIGHT, "blue"), item("cat", LEFT, "blue")]
    assert upstream_partial(blue_dog, both) == pytest.approx((1 + 0 + 1 + 1 + 0) / 5)  # the target is not matched
    red_cat = [item("dog", RIGHT, "red"), item("cat", LEFT, "red")]
    assert upstream_partial(red_cat, both) == pytest.approx((1 + 1 + 1 + 0) / 4)  # no entry for the position
    assert upstream_partial([item("dog", RIGHT, "red")], both) == pytest.approx((1 + 1 + 0 + 0) / 4)


def _scattered(rng: random.Random, metadata) -> list[ShapeDetection]:
    """Draw objects that match the metadata, or are missing, doubled, of another color or in another place."""
    shapes = []
    for clause in metadata["include"]:
        for _ in range(max(0, clause["count"] + rng.choice((-1, 0, 0, 0, 1)))):
            x, y = rng.uniform(0, 40), rng.uniform(0, 40)
            color = clause.get("color", "red") if rng.random() < 0.8 else "blue"
            box = (x, y, x + rng.uniform(8, 24), y + rng.uniform(8, 24))
            shapes.append(ShapeDetection(clause["class"], color, box, rng.random(), 0.0, 100.0))
    return shapes


def test_scores_agree_with_the_verifier_of_the_shapes_world() -> None:
    rng, outcomes = random.Random(0), set()
    for prompt in rng.sample(prompts("iid").prompts, 400) * 3:
        shapes = _scattered(rng, prompt.metadata)
        objects = [Detection(s.shape, s.box, s.iou, s.color) for s in shapes]
        ours = score_detections(objects, PromptSpec.from_prompt(prompt))
        theirs = verify_detections(shapes, prompt.metadata)
        assert ours.relaxed == theirs.relaxed
        assert sorted(ours.criteria) == sorted(theirs.criteria[:-1])  # the last is "clean", which GenEval lacks
        outcomes.add((ours.strict, ours.relaxed))
    assert outcomes == {(True, True), (False, True), (False, False)}
