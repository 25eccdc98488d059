from __future__ import annotations

import pytest
import torch
from torch import Tensor

from genalign.cli.config import Train, parse
from genalign.evaluation.geneval.metadata import Clause, Request, written
from genalign.evaluation.geneval.tifa import Question, TifaReward, gated, questions
from genalign.types import Prompt, Reward

PLACE = written(Request("position", (Clause("bench"), Clause("dog", relation="left of", target=0)), (), ""))
SHEEP = written(Request("counting", (Clause("sheep", 3),), (Clause("sheep", 4),), ""))
COLOURS = written(Request("color_attr", (Clause("orange", 1, "blue"), Clause("bus", 1, "red")), (), ""))


def texts(prompt: Prompt) -> list[str]:
    return [question.text for question in questions(prompt)]


def test_questions_follow_from_the_clauses() -> None:
    assert texts(PLACE) == [
        "Is there a bench in the image?",
        "Is there a dog in the image?",
        "Is the dog to the left of the bench?",
    ]
    assert texts(SHEEP) == ["Are there exactly three sheep in the image?"]
    assert texts(COLOURS)[0] == "Is there an orange in the image?"
    assert texts(COLOURS)[2:] == ["Is the orange blue?", "Is the bus red?"]
    assert questions(PLACE)[2].parents == (1, 0) and questions(COLOURS)[3].parents == (1,)
    many = Prompt("", {"tag": "x", "include": [{"class": "knife", "count": 7, "color": "red"}], "prompt": ""})
    assert texts(many) == ["Are there exactly 7 knives in the image?", "Are the knives red?"]
    with pytest.raises(ValueError, match="has no metadata"):
        questions(Prompt("a dog"))


@pytest.mark.parametrize("listed", [[], "Is there a dog?", [3], None, [["Is there a dog?", "yes"]]])
def test_listed_questions_are_texts(listed: object) -> None:
    with pytest.raises(ValueError, match="the questions of 'a dog' must be a list of at least one text"):
        questions(Prompt("a dog", {"questions": listed}))


@pytest.mark.parametrize("parents", [[[]], [[], [2]], [[], [-1]]])
def test_listed_parents_are_places(parents: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="must be a list of places in its 2 questions for each"):
        questions(Prompt("a dog", {"questions": ["Is there a dog?", "Is it red?"], "parents": parents}))


class Brightness:
    """Says how bright an image is, of every question, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, images: Tensor, asked: list[str]) -> Tensor:
        self.asked += asked
        lower = torch.tensor([0.5 if "left" in text else 0.0 for text in asked])
        return images.mean((1, 2, 3)) - lower


IMAGES = torch.tensor([0.9, 0.4, 0.8])[:, None, None, None].expand(3, 3, 2, 2)


def test_scores_are_means_over_the_questions_of_each_image() -> None:
    judge = Brightness()
    reward: Reward = TifaReward(judge)
    scores = reward(IMAGES, [PLACE, SHEEP, COLOURS])
    assert isinstance(reward, Reward)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, torch.tensor([(0.9 + 0.9 + 0.4) / 3, 0.4, 0.8]))
    assert judge.asked == [*texts(PLACE), *texts(SHEEP), *texts(COLOURS)]


def test_the_geometric_mean_wants_them_all() -> None:
    scores = TifaReward(Brightness(), "geometric")(IMAGES, [PLACE, SHEEP, COLOURS])
    torch.testing.assert_close(scores, torch.tensor([(0.9 * 0.9 * 0.4) ** (1 / 3), 0.4, 0.8]))
    nothing = TifaReward(lambda images, asked: torch.zeros(len(asked)), "geometric")
    assert nothing(IMAGES[:1], [PLACE]).tolist() == [0]


def test_answers_that_rest_on_a_no_are_no() -> None:
    asked = [Question("a"), Question("b", (0,)), Question("c", (1,)), Question("d", (0, 1))]
    answers = torch.tensor([0.2, 0.9, 0.8, 0.7])
    torch.testing.assert_close(gated(answers, asked, 0.5), torch.tensor([0.2, 0.0, 0.8, 0.0]))  # b itself was a yes
    scores = TifaReward(lambda images, texts: torch.tensor([0.9, 0.1, 0.8]), gate=0.5)(IMAGES[:1], [PLACE])
    torch.testing.assert_close(scores, torch.tensor([1.0 / 3]))


def test_a_question_without_an_answer_is_nan() -> None:
    scores = TifaReward(lambda images, asked: torch.tensor([0.5, torch.nan]))(IMAGES[:2], [SHEEP, SHEEP])
    assert scores.isnan().tolist() == [False, True]


def test_what_is_no_probability_is_refused() -> None:
    with pytest.raises(ValueError, match="they must be in"):
        TifaReward(lambda images, asked: torch.tensor([1.5]))(IMAGES[:1], [SHEEP])
    with pytest.raises(ValueError, match=r"answered \(2,\) for 1 questions"):
        TifaReward(lambda images, asked: torch.zeros(2))(IMAGES[:1], [SHEEP])


def test_a_configuration_names_reward_and_judge() -> None:
    judge = '{"class_path": "rewards.vqa.YesNoModel", "init_args": {"model": "somewhere"}}'
    reward = f'{{"class_path": "genalign.evaluation.geneval.tifa.TifaReward", "init_args": {{"judge": {judge}}}}}'
    settings, _ = parse(
        Train,
        ["--output", "x", "--recipe", "genalign.algorithms.recipes.flow_grpo", "--rewards.tifa.function", reward],
        "train",
    )
    assert isinstance(settings.rewards["tifa"].function, TifaReward)
