"""The official rules: numbers worked by hand, and the shapes world's verifier as a second implementation."""

from __future__ import annotations

import random

import pytest

from genalign.evaluation.geneval.boxes import relations
from genalign.evaluation.geneval.metadata import Clause, Request
from genalign.evaluation.geneval.scoring import Detection, Thresholds, kept, overlap, upstream_partial, verdict
from genalign.worlds.shapes.detection import ShapeDetection
from genalign.worlds.shapes.prompts import prompts
from genalign.worlds.shapes.verifier import verify_detections

LEFT, RIGHT, MIDDLE = (0.0, 0.0, 10.0, 10.0), (20.0, 0.0, 30.0, 10.0), (1.0, 1.0, 11.0, 11.0)


def item(name: str, box: tuple[float, float, float, float] = LEFT, color: str | None = None, score: float = 0.8):
    return Detection(name, box, score, color)


def ask(*include: Clause, exclude: tuple[Clause, ...] = ()) -> Request:
    return Request("made up", include, exclude, "made up")


CAT_ABOVE = ask(Clause("dog"), Clause("cat", relation="left of", target=0))


# --- boxes ------------------------------------------------------------------------------------------------------------


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
def test_positions_are_the_officials(a, b, expected) -> None:
    assert relations(a, b) == expected


def test_the_position_threshold_is_an_argument() -> None:
    touching = (0.0, 0.0, 10.0, 10.0), (6.0, 0.0, 16.0, 10.0)
    request = ask(Clause("dog"), Clause("cat", relation="left of", target=0))
    found = [item("cat", touching[0]), item("dog", touching[1])]
    assert verdict(found, request, 0.1).relaxed and not verdict(found, request, 0.2).relaxed


def test_overlap_holds_the_last_pixel() -> None:
    assert overlap(LEFT, LEFT) == 1
    assert overlap((0, 0, 9, 9), (10, 0, 19, 9)) == 0
    assert overlap((0, 0, 9, 9), (9, 0, 18, 9)) == pytest.approx(10 / 190)
    assert overlap((5, 5, 3, 3), (5, 5, 3, 3)) == 0


# --- which detections count -------------------------------------------------------------------------------------------


def test_scores_must_exceed_the_threshold_and_come_best_first() -> None:
    scores = [0.3, 0.95, 0.31, 0.9, 0.91]
    found = [item("cat", score=score) for score in scores] + [item("dog", score=0.5)]
    assert kept(found, "two_object", Thresholds()) == [1, 4, 3, 2, 5]
    assert kept(found, "counting", Thresholds()) == [1, 4]


def test_at_most_sixteen_of_a_class() -> None:
    found = [item("cat", score=0.5 + i / 100) for i in range(20)] + [item("dog")]
    assert kept(found, "colors", Thresholds()) == [*range(19, 3, -1), 20]


def test_overlapping_boxes_are_dropped_only_where_it_is_asked_for() -> None:
    found = [item("cat", score=0.6), item("cat", MIDDLE, score=0.7), item("cat", RIGHT, score=0.5), item("dog", MIDDLE)]
    assert kept(found, "colors", Thresholds()) == [1, 0, 2, 3]
    assert kept(found, "colors", Thresholds(max_overlap=0.5)) == [1, 2, 3]
    exact = overlap(LEFT, MIDDLE)
    assert kept(found[:2], "colors", Thresholds(max_overlap=exact)) == [1]
    assert kept(found[:2], "colors", Thresholds(max_overlap=exact + 1e-9)) == [1, 0]


def test_a_dropped_box_drops_no_other() -> None:
    row = [item("cat", (4.0 * i, 0.0, 4.0 * i + 9, 9.0), score=0.9 - i / 10) for i in range(3)]
    assert kept(row, "colors", Thresholds(max_overlap=0.4)) == [0, 2]


# --- verdicts by hand -------------------------------------------------------------------------------------------------


def test_surplus_objects_are_overlooked_by_the_official_rule_alone() -> None:
    found = verdict([item("cat"), item("cat", RIGHT), item("cat", MIDDLE)], ask(Clause("cat", 2)))
    assert (found.relaxed, found.strict, found.partial, found.reason) == (True, False, 0.5, "")


def test_excluded_counts_are_not_overlooked() -> None:
    request = ask(Clause("cat", 2), exclude=(Clause("cat", 3),))
    found = verdict([item("cat")] * 3, request)
    assert (found.relaxed, found.reason) == (False, "expected cat<3, found 3")
    assert verdict([item("cat")] * 2, request).strict
    no_dogs = ask(Clause("cat"), exclude=(Clause("dog", 1),))
    assert not verdict([item("cat"), item("dog")], no_dogs).strict


def test_colour_is_asked_of_the_most_certain() -> None:
    request = ask(Clause("car", 1, "red"))
    sure_red = [item("car", color="blue", score=0.5), item("car", color="red", score=0.9)]
    sure_blue = [item("car", color="blue", score=0.9), item("car", color="red", score=0.5)]
    assert verdict(sure_red, request).relaxed
    found = verdict(sure_blue, request)
    assert found.reason == "expected red car>=1, found 0 red; and 1 blue"
    assert verdict(sure_red, request).partial == 0  # one car too many: neither count nor colour


def test_reasons_name_all_colours_in_their_order() -> None:
    cars = [item("car", color=color) for color in ("white", "blue", "white")]
    assert verdict(cars, ask(Clause("car", 3, "red"))).reason == (
        "expected red car>=3, found 0 red; and 1 blue, 2 white"
    )


def test_position_needs_its_target() -> None:
    found = verdict([item("cat")], CAT_ABOVE)
    assert found.reason == "expected dog>=1, found 0\nno target for cat to be left of"
    assert verdict([item("cat"), item("dog", RIGHT)], CAT_ABOVE).strict
    wrong = verdict([item("cat", RIGHT), item("dog")], CAT_ABOVE)
    assert wrong.reason == "expected cat left of target, found right of target"
    nowhere = verdict([item("cat", MIDDLE), item("dog")], CAT_ABOVE)
    assert nowhere.reason == "expected cat left of target, found  target"  # GenEval's own gap


def test_every_pair_must_be_in_the_relation() -> None:
    request = ask(Clause("dog", 2), Clause("cat", relation="left of", target=0))
    dogs = [item("dog", RIGHT), item("dog", (-20.0, 0.0, -10.0, 10.0))]
    found = verdict([item("cat"), *dogs], request)
    assert not found.relaxed
    assert found.criteria == (("count", 1), ("count", 1), ("position", 0.5))


@pytest.mark.parametrize(("shown", "partial"), [(0, 0), (1, 1 / 3), (2, 2 / 3), (3, 1), (4, 2 / 3), (9, 0)])
def test_partial_credit_for_counts_is_clamped(shown: int, partial: float) -> None:
    request = ask(Clause("cat", 3))
    assert verdict([item("cat")] * shown, request).partial == pytest.approx(partial)


def test_partial_credit_without_the_upstream_faults() -> None:
    right, wrong = [item("cat"), item("dog", RIGHT)], [item("cat", RIGHT), item("dog")]
    assert verdict(right, CAT_ABOVE).partial == 1 == upstream_partial(right, CAT_ABOVE)
    assert verdict(wrong, CAT_ABOVE).partial == pytest.approx(2 / 3)
    assert upstream_partial(wrong, CAT_ABOVE) == 0.75
    assert upstream_partial([item("cat")] * 3, ask(Clause("cat"))) == -1
    assert upstream_partial([item("cat")] * 16, ask(Clause("cat"))) == -14


def test_upstream_partial_has_its_entries() -> None:
    two_cars = ask(Clause("car", 2, "red"))
    assert upstream_partial([item("car", color="red"), item("car", color="blue")], two_cars) == pytest.approx(0.75)
    assert upstream_partial([item("car")], two_cars) == pytest.approx((0.5 + 0) / 2)
    both = ask(Clause("dog", color="red"), Clause("cat", 1, "blue", "left of", 0))
    blue_dog = [item("dog", RIGHT, "blue"), item("cat", LEFT, "blue")]
    assert upstream_partial(blue_dog, both) == pytest.approx((1 + 0 + 1 + 1 + 0) / 5)  # the target is not matched
    red_cat = [item("dog", RIGHT, "red"), item("cat", LEFT, "red")]
    assert upstream_partial(red_cat, both) == pytest.approx((1 + 1 + 1 + 0) / 4)  # nothing is said of the position
    no_cat = [item("dog", RIGHT, "red")]
    assert upstream_partial(no_cat, both) == pytest.approx((1 + 1 + 0 + 0) / 4)


def test_a_colour_that_matters_must_be_known() -> None:
    with pytest.raises(ValueError, match="the colour of the car at"):
        verdict([item("car")], ask(Clause("car", 1, "red")))
    assert not verdict([], ask(Clause("car", 1, "red"))).relaxed


# --- against the shapes world's own verifier --------------------------------------------------------------------------


def _scattered(rng: random.Random, metadata) -> list[ShapeDetection]:
    """Objects near what is asked for: right, missing, doubled, of another colour, in other places."""
    found = []
    for clause in metadata["include"]:
        for _ in range(max(0, clause["count"] + rng.choice((-1, 0, 0, 0, 1)))):
            x, y = rng.uniform(0, 40), rng.uniform(0, 40)
            color = clause.get("color", "red") if rng.random() < 0.8 else "blue"
            box = (x, y, x + rng.uniform(8, 24), y + rng.uniform(8, 24))
            found.append(ShapeDetection(clause["class"], color, box, rng.random(), 0.0, 100.0))
    return found


def test_the_verifier_of_the_shapes_world_agrees() -> None:
    rng = random.Random(0)
    verdicts = []
    for prompt in rng.sample(prompts("iid").prompts, 400) * 3:
        shapes = _scattered(rng, prompt.metadata)
        ours = verdict([Detection(s.shape, s.box, s.iou, s.color) for s in shapes], Request.of(prompt))
        theirs = verify_detections(shapes, prompt.metadata)
        assert ours.relaxed == theirs.relaxed
        assert sorted(ours.criteria) == sorted(theirs.criteria[:-1])  # the last is "clean", which GenEval lacks
        verdicts.append((ours.strict, ours.relaxed))
    assert {(True, True), (False, True), (False, False)} == set(verdicts)
