import numpy as np
import pytest
import torch

from genalign.types import Prompt, Reward
from genalign.worlds.shapes.prompts import color_attr, counting, single_object
from genalign.worlds.shapes.scenes import render, sample_scene
from rewards.shapes import ShapesReward

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
    shown = images[[1, 0, 0]]
    assert ShapesReward("strict")(shown, PROMPTS).tolist() == [0, 0, 0]
    assert (ShapesReward()(shown, PROMPTS) < 0.5).all()


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
