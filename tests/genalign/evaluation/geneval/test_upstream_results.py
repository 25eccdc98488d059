from __future__ import annotations

import random
from dataclasses import replace

import pytest

from genalign.evaluation.geneval.metadata import Clause, Request, written
from genalign.evaluation.geneval.result_files import Result, sample_name
from genalign.evaluation.geneval.scoring import Detection, verdict
from genalign.evaluation.geneval.upstream_results import by_sample, detections_of, verdict_of
from genalign.evaluation.geneval.vocabulary import COLORS
from genalign.types import Prompt

RED_CAR = written(Request("colors", (Clause("car", 1, "red"),), (), ""))
PAIR = written(Request("color_attr", (Clause("car", 1, "red"), Clause("dog", 1, "blue")), (), ""))
PLACE = written(Request("position", (Clause("car"), Clause("dog", relation="above", target=0)), (), ""))


def judged(prompt: Prompt, detections: list[Detection]) -> tuple[Result, object]:
    """What the original would write of them, and the verdict that all colours allow."""
    found = verdict(detections, Request.of(prompt))
    return Result.of(sample_name(0, 0), prompt, found.relaxed, found.reason, detections), found


def test_verdicts_follow_from_the_results_alone() -> None:
    """Boxes, and colours by what the reasons say, give every score of the detections that they came from."""
    rng = random.Random(0)
    seen = set()
    for prompt in (RED_CAR, PAIR, PLACE) * 200:
        boxes = [(x := rng.uniform(0, 50), y := rng.uniform(0, 50), x + 20, y + 20) for _ in range(3)]
        names = rng.choices(("car", "dog"), k=rng.randrange(4))
        found = [
            Detection(name, box, rng.random(), rng.choice(("red", "blue", "white")))
            for name, box in zip(names, boxes, strict=False)
        ]
        found.sort(key=lambda item: -item.score)
        result, expected = judged(prompt, found)
        assert verdict_of(result) == expected
        seen.add((expected.relaxed, expected.strict, expected.partial))
    assert len(seen) >= 6


def test_colours_that_nobody_looked_at_are_unknown() -> None:
    cars = [Detection("car", (0, 0, 9, 9), score, "white") for score in (0.9, 0.8)]
    result, _ = judged(RED_CAR, cars)
    assert result.reason == "expected red car>=1, found 0 red; and 1 white"
    assert [item.color for item in detections_of(result)] == ["white", None]
    assert [item.color for item in detections_of(judged(PLACE, cars)[0])] == [None, None]


def test_several_colours_are_counted() -> None:
    prompt = Prompt("cars", {"tag": "colors", "include": [{"class": "car", "count": 3, "color": "red"}], "prompt": ""})
    cars = [Detection("car", (0, 0, 9, 9), 0.9 - i / 10, color) for i, color in enumerate(("white", "red", "white"))]
    assert sorted(str(item.color) for item in detections_of(judged(prompt, cars)[0])) == ["red", "white", "white"]
    assert set(COLORS) > {"red", "white"}


def test_results_that_contradict_their_boxes_are_refused() -> None:
    result, _ = judged(PLACE, [Detection("car", (0, 0, 9, 9), 0.9)])
    with pytest.raises(ValueError, match="is correct by the results and wrong by its boxes: were they made with other"):
        verdict_of(replace(result, correct=True, reason=""))
    unreadable = replace(judged(RED_CAR, [Detection("car", (0, 0, 9, 9), 0.9, "blue")])[0])
    with pytest.raises(ValueError, match="does not count 1 colours: is it GenEval's"):
        detections_of(replace(unreadable, reason="expected red car>=1, found 0 red"))


def test_one_class_in_two_colours_cannot_be_told_apart() -> None:
    prompt = Prompt(
        "two cars",
        {"tag": "color_attr", "include": [{"class": "car", "count": 1, "color": c} for c in ("red", "blue")]}
        | {"prompt": "two cars"},
    )
    with pytest.raises(ValueError, match="asks for car in two colours"):
        detections_of(Result(sample_name(0, 0), "color_attr", "two cars", False, "", prompt.metadata, {"car": []}))


def test_results_by_prompt_and_image() -> None:
    result, _ = judged(RED_CAR, [])
    named = [replace(result, filename=name) for name in ("runs/a/00003/samples/00002.png", "00003/samples/0001.png")]
    assert list(by_sample(named)) == [(3, 2), (3, 1)]
    with pytest.raises(ValueError, match="two results for 00003/samples/0001"):
        by_sample([named[1], named[1]])
    with pytest.raises(ValueError, match="is no image of GenEval's layout"):
        by_sample([replace(result, filename="cat.png")])
