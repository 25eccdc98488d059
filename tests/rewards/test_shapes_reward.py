import numpy as np
import pytest
import torch

from genalign.evaluation.benchmarks.tifa import QuestionJudge
from genalign.evaluation.geneval.grammar import color_attr, counting, single_object
from genalign.scoring.score import NamedReward, score
from genalign.types import Prompt, Reward
from genalign.worlds.shapes import verifier
from genalign.worlds.shapes.detection import detect
from genalign.worlds.shapes.prompts import prompts
from genalign.worlds.shapes.scenes import render, sample_scene
from rewards.shapes import ShapesQuestions, ShapesReward, ShapesScore, recolored, rendered

PROMPTS = [single_object("circle"), counting("square", "two"), color_attr("ring", "red", "cross", "blue")]


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    rng = np.random.default_rng(5)
    return render([sample_scene(prompt.metadata, rng) for prompt in PROMPTS])


@pytest.mark.parametrize("score", ["partial", "strict", "relaxed"])
def test_truth_scores_one(images: torch.Tensor, score: str) -> None:
    reward: Reward = ShapesReward(score)
    scores = reward(images, PROMPTS)
    assert isinstance(reward, Reward)
    assert scores.dtype == torch.float32
    assert scores.tolist() == [1, 1, 1]


def test_wrong_pictures_score_less(images: torch.Tensor) -> None:
    wrong = images[[1, 0, 0]]
    assert ShapesReward("strict")(wrong, PROMPTS).tolist() == [0, 0, 0]
    assert (ShapesReward()(wrong, PROMPTS) < 0.5).all()


def test_surplus_is_relaxed_but_not_strict(images: torch.Tensor) -> None:
    prompts = [single_object("square")]
    assert ShapesReward("relaxed")(images[1:2], prompts).tolist() == [1]
    assert ShapesReward("strict")(images[1:2], prompts).tolist() == [0]


def test_failed_samples_are_nan(images: torch.Tensor) -> None:
    broken = images.clone()
    broken[1, 0, 0, 0] = torch.nan
    assert ShapesReward()(broken, PROMPTS).isnan().tolist() == [False, True, False]


def test_metadata_is_needed(images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"'a red dog' has no metadata: this reward needs GenEval metadata"):
        ShapesReward()(images[:1], [Prompt("a red dog")])


@pytest.mark.parametrize(
    ("score", "expected"),
    [  # a ring for a circle, one square for two, and the wrong colors; the first two prompts name no color
        ("count", [0.0, 0.5, 1.0]),
        ("color", [1.0, 1.0, 0.0]),
        ("position", [1.0, 1.0, 1.0]),
        ("clean", [0.0, 1.0, 1.0]),
    ],
)
def test_each_criterion_is_a_score(score: ShapesScore, expected: list[float]) -> None:
    shown = [single_object("ring"), single_object("square"), color_attr("ring", "blue", "cross", "red")]
    rng = np.random.default_rng(5)
    wrong = render([sample_scene(prompt.metadata, rng) for prompt in shown])
    assert ShapesReward(score)(wrong, PROMPTS).tolist() == pytest.approx(expected)
    wrong[0, 0, 0, 0] = torch.nan
    assert ShapesReward(score)(wrong, PROMPTS).isnan().tolist() == [True, False, False]


def test_the_criteria_of_a_batch_are_verified_once(images: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = []
    detected = verifier.detect

    def counting_detect(samples: torch.Tensor) -> list[list[verifier.ShapeDetection]]:
        batches.append(len(samples))
        return detected(samples)

    monkeypatch.setattr(verifier, "detect", counting_detect)
    names: tuple[ShapesScore, ...] = ("count", "color", "position", "strict")
    parts = [NamedReward(name, ShapesReward(name), score_batch=2) for name in names]
    together = score(parts, images, PROMPTS)
    assert batches == [2, 1]
    alone = [ShapesReward(name)(images.clone(), PROMPTS) for name in names]
    assert torch.equal(together, torch.stack(alone, 1))


def test_rendered_references_are_right() -> None:
    references = rendered("val", per_prompt=2)
    asked = prompts("val").prompts
    assert len(references.images) == 2 * len(asked)
    drawn = references.images.load(references.choose(asked, torch.Generator().manual_seed(0)))
    assert ShapesReward("strict")(drawn, asked).mean() == 1.0


def test_recoloured_references_have_the_style_alone() -> None:
    found = detect(recolored(("red", "yellow"), count=48).load(range(48)))
    assert {item.color for items in found for item in items} == {"red", "yellow"}
    assert len({item.shape for items in found for item in items}) == 6
    with pytest.raises(ValueError, match="no color mauve in the palette: choose from red, orange"):
        recolored(("mauve",))


def test_restyled_references_may_be_small() -> None:
    for items in detect(recolored(("purple",), count=24, radius=(5.5, 6.5)).load(range(24))):
        assert items and all(max(item.box[2] - item.box[0], item.box[3] - item.box[1]) <= 17 for item in items)


def test_questions_are_answered_by_the_verifier(images: torch.Tensor) -> None:
    judge: QuestionJudge = ShapesQuestions()
    asked = [
        (0, "Is there a circle in the image?", 1),
        (0, "Is there a square in the image?", 0),
        (1, "Are there exactly two squares in the image?", 1),
        (1, "Is there a square in the image?", 0),  # two are not one
        (1, "Is there nothing but two squares in the image?", 1),
        (1, "Is there nothing but a square in the image?", 0.5),
        (2, "Is the ring red?", 1),
        (2, "Is the ring blue?", 0),
        (2, "Is there nothing but a ring and a cross in the image?", 1),
        (2, "Is it art?", None),
    ]
    rows, texts, expected = zip(*asked, strict=True)
    answers = judge(images[list(rows)], texts).tolist()
    assert answers == pytest.approx([torch.nan if value is None else value for value in expected], nan_ok=True)
    left, right = (judge(images[[2]], [f"Is the ring to the {side} of the cross?"]) for side in ("left", "right"))
    above, below = (judge(images[[2]], [f"Is the ring {side} the cross?"]) for side in ("above", "below"))
    assert 1 <= float(left + right + above + below) <= 2 and float(left * right) == float(above * below) == 0
    broken = images.clone()
    broken[0, 0, 0, 0] = torch.nan
    assert judge(broken[:1], texts[:1]).isnan().all()
