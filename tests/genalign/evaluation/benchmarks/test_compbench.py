from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from genalign.evaluation.benchmarks import BENCHMARKS, Judges
from genalign.evaluation.benchmarks.compbench import COMPBENCH, depth_score, relation_score, without_duplicates
from genalign.evaluation.geneval.scoring import Detection, Thresholds
from genalign.types import Prompt, PromptSet
from rewards.backbones.detectors import Instance
from tests.genalign.evaluation.benchmarks.table_judges import TableJudge, gray_images, image_numbers, score_images


@dataclass(frozen=True)
class TableDetector:
    """The objects of each image by its number; it knows any name unless ``classes`` are given."""

    table: Mapping[int, Sequence[Detection]]
    classes: Sequence[str] | None = None
    thresholds: Thresholds = field(default_factory=Thresholds)

    def __call__(self, images: Tensor, names: Sequence[Sequence[str]]) -> list[list[Instance]]:
        return [[Instance(item) for item in self.table.get(n, ())] for n in image_numbers(images)]


def prompt(category: str, text: str = "x", **metadata: Any) -> Prompt:
    return Prompt(text, {"tag": category, "prompt": text, **metadata})


def test_attributes_are_products_of_answers() -> None:
    """.8 times .5 is .4; then 1 times .9. A missing answer leaves the image out."""
    prompts = PromptSet(
        "c", (prompt("color", "a", phrases=["a red cup", "a tall mug"]), prompt("shape", "b", phrases=["a box"]))
    )
    table = {
        (0, "a red cup?"): 0.8,
        (0, "a tall mug?"): 0.5,
        (1, "a red cup?"): 0.0,
        (2, "a box?"): 1.0,
        (3, "a box?"): 0.9,
    }
    records, numbers = score_images(COMPBENCH, prompts, Judges(questions=TableJudge(table)), per_prompt=2)
    assert [record.scores["compbench"] for record in records] == pytest.approx([0.4, math.nan, 1, 0.9], nan_ok=True)
    assert records[0].details["compbench"] == {"phrases": pytest.approx([0.8, 0.5])}
    assert numbers == pytest.approx(
        {
            "mean over categories": (0.4 + 0.95) / 2,
            "color": 0.4,
            "shape": 0.95,
            "missing answers": 1,
            "images left out": 1,
        }
    )


def test_every_category_counts_as_much_as_another() -> None:
    """Color: 1 and 0, so 1/2. Shape: 1. The mean over the three prompts would be 2/3."""
    colors = (prompt("color", text, phrases=["a red cup"]) for text in ("a", "b"))
    prompts = PromptSet("c", (*colors, prompt("shape", "c", phrases=["a box"])))
    table = {(0, "a red cup?"): 1.0, (1, "a red cup?"): 0.0, (2, "a box?"): 1.0}
    _, numbers = score_images(COMPBENCH, prompts, Judges(questions=TableJudge(table)))
    assert numbers["mean over categories"] == pytest.approx(3 / 4)


@pytest.mark.parametrize(
    ("relation", "a", "b", "score"),
    [
        ("on the left of", (0, 0, 10, 10), (20, 4, 30, 14), 1),
        ("on the right of", (0, 0, 10, 10), (20, 4, 30, 14), 0),
        ("on the right of", (20, 4, 30, 14), (0, 0, 10, 10), 1),
        ("on the left of", (0, 0, 10, 10), (20, 20, 30, 30), 0),  # as far down as to the right
        ("on the top of", (0, 0, 10, 10), (4, 20, 14, 30), 1),
        ("on the bottom of", (4, 20, 14, 30), (0, 0, 10, 10), 1),
        ("on the left of", (0, 0, 10, 10), (5, 0, 15, 10), 0.1 / (1 / 3)),  # they overlap by a third
        ("next to", (0, 0, 10, 10), (1000, 149, 1010, 159), 1),  # near along one axis
        ("near", (0, 0, 10, 10), (300, 200, 310, 210), 0.5),
        ("on side of", (0, 0, 10, 10), (150, 600, 160, 610), 0.25),
    ],
)
def test_relations_by_hand(relation: str, a: Any, b: Any, score: float) -> None:
    assert relation_score(relation, a, b) == pytest.approx(score)


def test_places_worked_by_hand() -> None:
    """Both objects and the relation: .25 * .8 + .25 * .6 + .5. Without the relation, or an object: below .5, so 0."""
    cup, mug = Detection("cup", (0, 0, 10, 10), 0.8), Detection("mug", (20, 0, 30, 10), 0.6)
    wrong, unsure = Detection("mug", (0, 20, 10, 30), 0.9), Detection("mug", (100, 0, 110, 10), 0.31)
    detector = TableDetector({0: [unsure, mug, cup], 1: [cup, wrong], 2: [cup], 3: []})
    prompts = PromptSet("c", (prompt("spatial", objects=["cup", "mug"], relation="on the left of"),))
    images = gray_images(5)
    images[4, 0, 0, 0] = torch.nan
    records, numbers = score_images(COMPBENCH, prompts, Judges(detector=detector), 5, images)
    assert [row.scores["compbench"] for row in records] == pytest.approx([0.85, 0, 0, 0, math.nan], nan_ok=True)
    assert records[1].details["compbench"] == {"places": [["cup", 0, 0, 10, 10, 0.8], ["mug", 0, 20, 10, 30, 0.9]]}
    assert numbers["spatial"] == pytest.approx(0.85 / 4)
    assert (numbers["missing answers"], numbers["images left out"]) == (1, 1)


def test_places_in_depth_worked_by_hand() -> None:
    near = torch.zeros(40, 40)
    near[:, :15] = 1  # the left is near
    a, b = (0, 0, 15, 10), (5, 0, 20, 10)  # they overlap by a half
    assert depth_score("in front of", a, b, near) == 1 and depth_score("behind", b, a, near) == 1
    assert depth_score("hidden by", a, b, near) == 0
    assert depth_score("in front of", a, (10, 0, 25, 10), near) == pytest.approx((50 / 250) / 0.5)
    assert depth_score("in front of", a, (30, 0, 40, 10), near) == 0  # apart
    assert depth_score("in front of", (0, 20, 15, 30), (5, 20, 20, 30), near.T) == 0  # rows are y

    boxes = [Detection("cup", a, 0.8), Detection("person", b, 0.4)]
    prompts = PromptSet("c", (prompt("3d_spatial", objects=["cup", "girl"], relation="in front of"),))
    judges = Judges(
        detector=TableDetector({0: boxes, 1: boxes[:1]}), depth=lambda images: near.expand(len(images), 40, 40)
    )
    _, numbers = score_images(COMPBENCH, prompts, judges, per_prompt=2)
    assert numbers["3d_spatial"] == pytest.approx((0.2 + 0.1 + 0.5 + 0.2) / 2)  # no lowest score here
    with pytest.raises(ValueError, match=r"needs judges\.depth"):
        COMPBENCH.verifier(prompts, Judges(detector=judges.detector))


def test_numbers_worked_by_hand() -> None:
    """Two cups and a man. Image 0 has two cups, one detected twice, and a person: 1. Image 1 has one cup: 1/4."""
    cups = [Detection("cup", box, 0.9) for box in ((0, 0, 10, 10), (30, 0, 40, 10), (30, 0, 40, 10))]
    inside = Detection("cup", (32, 2, 38, 8), 0.8)
    person = Detection("person", (0, 0, 50, 50), 0.9)
    detector = TableDetector({0: [*cups, inside, person], 1: cups[:1]})
    prompts = PromptSet("c", (prompt("numeracy", counts=[["cup", 2], ["man", 1]]),))
    records, numbers = score_images(COMPBENCH, prompts, Judges(detector=detector), per_prompt=2)
    assert [row.scores["compbench"] for row in records] == [1, 0.25] and numbers["numeracy"] == 0.625
    assert without_duplicates([*cups, inside]) == cups[:2]
    apart = [Detection("cup", (0, 0, 10, 10), 0.9), Detection("mug", (0, 0, 10, 10), 0.9)]
    assert without_duplicates(apart) == apart


def test_complex_prompts_are_means_of_their_parts() -> None:
    """Phrases .6, places .25 * .8 + .25 * .4 + .5 = .8, cosine .3, by kind."""
    table = {(n, "a cup?"): 0.6 for n in range(3)}
    boxes = [Detection("cup", (0, 0, 10, 10), 0.8), Detection("mug", (20, 0, 30, 10), 0.4)]
    texts: list[str] = []

    def similarity(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        texts.extend(prompt.text for prompt in prompts)
        return torch.full((len(images),), 0.3)

    judges = Judges(
        questions=TableJudge(table), detector=TableDetector(dict.fromkeys(range(3), boxes)), similarity=similarity
    )
    parsed = {"phrases": ["a cup"], "objects": ["cup", "mug"], "relation": "near", "text_without_adjectives": "cup"}
    kinds = [prompt("complex", kind, kind=kind, **parsed) for kind in ("spatial", "action", "both")]
    records, numbers = score_images(COMPBENCH, PromptSet("c", tuple(kinds)), judges)
    assert [row.scores["compbench"] for row in records] == pytest.approx([0.7, 0.45, (0.6 + 0.8 + 0.3) / 3])
    assert texts == ["cup", "cup"] and set(records[1].details["compbench"]) == {"phrases", "text"}
    assert numbers["complex"] == pytest.approx((0.7 + 0.45 + 1.7 / 3) / 3)
    plain = PromptSet("c", (prompt("non_spatial", "a cook fills a cup"),))
    assert score_images(COMPBENCH, plain, judges)[1]["non_spatial"] == pytest.approx(0.3)
    assert texts[-1] == "a cook fills a cup"


def test_a_missing_cosine_is_not_a_low_one() -> None:
    def similarity(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return torch.tensor([0.3, math.nan])

    prompts = PromptSet("c", (prompt("non_spatial", "a"), prompt("non_spatial", "b")))
    records, numbers = score_images(COMPBENCH, prompts, Judges(similarity=similarity))
    assert [row.scores["compbench"] for row in records] == pytest.approx([0.3, math.nan], nan_ok=True)
    assert numbers["non_spatial"] == pytest.approx(0.3)
    assert numbers["missing answers"] == 1 and numbers["images left out"] == 1


def test_judges_are_needed_by_category() -> None:
    place = PromptSet("c", (prompt("spatial", objects=["cup", "zebra crossing"], relation="near"),))
    with pytest.raises(ValueError, match=r"needs judges\.detector"):
        COMPBENCH.verifier(place, Judges(questions=len))
    with pytest.raises(ValueError, match="'zebra crossing' and 0 others are none of the 1 classes"):
        COMPBENCH.verifier(place, Judges(detector=TableDetector({}, classes=("cup",))))
    assert "TableDetector" in COMPBENCH.verifier(place, Judges(detector=TableDetector({})))
    with pytest.raises(ValueError, match="no category of T2I-CompBench"):
        COMPBENCH.verifier(PromptSet("c", (Prompt("a cup"),)), Judges())
    assert BENCHMARKS["compbench"] is COMPBENCH
