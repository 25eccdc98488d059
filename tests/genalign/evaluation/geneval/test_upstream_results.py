from __future__ import annotations

import random
from dataclasses import replace

import pytest

from genalign.evaluation.geneval.metadata import Clause, PromptSpec
from genalign.evaluation.geneval.result_files import ImageResult, sample_name
from genalign.evaluation.geneval.scoring import Detection, score_detections
from genalign.evaluation.geneval.upstream_results import result_detections, result_score, results_by_image
from genalign.types import Prompt

RED_CAR = PromptSpec("colors", (Clause("car", 1, "red"),)).to_prompt()
PAIR = PromptSpec("color_attr", (Clause("car", 1, "red"), Clause("dog", 1, "blue"))).to_prompt()
PLACE = PromptSpec("position", (Clause("car"), Clause("dog", relation="above", target=0))).to_prompt()


def upstream_result(prompt: Prompt, *detections: Detection) -> ImageResult:
    """Build the result that the original would write for these detections."""
    score = score_detections(detections, PromptSpec.from_prompt(prompt))
    return ImageResult.from_detections(sample_name(0, 0), prompt, score.relaxed, score.reason, detections)


def test_scores_follow_from_boxes_and_reasons_alone() -> None:
    rng, outcomes = random.Random(0), set()
    for prompt in (RED_CAR, PAIR, PLACE) * 200:
        boxes = [(x := rng.uniform(0, 50), y := rng.uniform(0, 50), x + 20, y + 20) for _ in range(3)]
        names = rng.choices(("car", "dog"), k=rng.randrange(4))
        detections = [
            Detection(name, box, rng.random(), rng.choice(("red", "blue", "white")))
            for name, box in zip(names, boxes, strict=False)
        ]
        detections.sort(key=lambda item: -item.score)
        expected = score_detections(detections, PromptSpec.from_prompt(prompt))
        assert result_score(upstream_result(prompt, *detections)) == expected
        outcomes.add((expected.relaxed, expected.strict, expected.partial))
    assert len(outcomes) >= 6


def test_colors_follow_from_reasons_and_are_none_where_no_rule_checked() -> None:
    cars = [Detection("car", (0, 0, 9, 9), score, "white") for score in (0.9, 0.8)]
    result = upstream_result(RED_CAR, *cars)
    assert result.reason == "expected red car>=1, found 0 red; and 1 white"
    assert [item.color for item in result_detections(result)] == ["white", None]
    assert [item.color for item in result_detections(upstream_result(PLACE, *cars))] == [None, None]

    prompt = Prompt("cars", {"tag": "colors", "include": [{"class": "car", "count": 3, "color": "red"}], "prompt": ""})
    cars = [Detection("car", (0, 0, 9, 9), 0.9 - i / 10, color) for i, color in enumerate(("white", "red", "white"))]
    colors = [str(item.color) for item in result_detections(upstream_result(prompt, *cars))]
    assert sorted(colors) == ["red", "white", "white"]


def test_results_that_contradict_their_boxes_are_refused() -> None:
    result = upstream_result(PLACE, Detection("car", (0, 0, 9, 9), 0.9))
    with pytest.raises(ValueError, match="is correct by the results and wrong by its boxes: were they made with other"):
        result_score(replace(result, correct=True, reason=""))
    result = upstream_result(RED_CAR, Detection("car", (0, 0, 9, 9), 0.9, "blue"))
    with pytest.raises(ValueError, match="does not count 1 colors: is it GenEval's"):
        result_detections(replace(result, reason="expected red car>=1, found 0 red"))
    include = [{"class": "car", "count": 1, "color": color} for color in ("red", "blue")]
    with pytest.raises(ValueError, match="asks for car in two colors"):
        result_detections(replace(result, metadata={"tag": "color_attr", "include": include, "prompt": "two cars"}))


def test_results_are_indexed_by_prompt_and_image() -> None:
    result = upstream_result(RED_CAR)
    named = [replace(result, filename=name) for name in ("runs/a/00003/samples/00002.png", "00003/samples/0001.png")]
    assert list(results_by_image(named)) == [(3, 2), (3, 1)]
    with pytest.raises(ValueError, match="two results for 00003/samples/0001"):
        results_by_image([named[1], named[1]])
    with pytest.raises(ValueError, match="is no image of GenEval's layout"):
        results_by_image([replace(result, filename="cat.png")])
