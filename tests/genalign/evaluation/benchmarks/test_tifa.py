from __future__ import annotations

import pytest
import torch
from torch import Tensor

from genalign.cli.parsing import parse
from genalign.cli.train_settings import Train
from genalign.evaluation.benchmarks.tifa import TifaReward, questions
from genalign.evaluation.geneval.metadata import Clause, PromptSpec
from genalign.types import Prompt, Reward

PLACE = PromptSpec("position", (Clause("bench"), Clause("dog", relation="left of", target=0))).to_prompt()
SHEEP = PromptSpec("counting", (Clause("sheep", 3),), (Clause("sheep", 4),)).to_prompt()
COLORS = PromptSpec("color_attr", (Clause("orange", 1, "blue"), Clause("bus", 1, "red"))).to_prompt()


def texts(prompt: Prompt) -> list[str]:
    return [question.text for question in questions(prompt)]


def test_clauses_become_questions() -> None:
    assert texts(PLACE)[:2] == ["Is there a bench in the image?", "Is there a dog in the image?"]
    assert texts(PLACE)[2:] == ["Is the dog to the left of the bench?"]
    assert texts(SHEEP) == ["Are there exactly three sheep in the image?"]
    assert texts(COLORS)[0] == "Is there an orange in the image?"
    assert texts(COLORS)[2:] == ["Is the orange blue?", "Is the bus red?"]
    assert questions(PLACE)[2].parents == (1, 0) and questions(COLORS)[3].parents == (1,)
    many = Prompt("", {"tag": "x", "include": [{"class": "knife", "count": 7, "color": "red"}], "prompt": ""})
    assert texts(many) == ["Are there exactly 7 knives in the image?", "Are the knives red?"]
    with pytest.raises(ValueError, match="has no metadata"):
        questions(Prompt("a dog"))


def test_invalid_questions_in_metadata_are_refused() -> None:
    for texts in ([], "Is there a dog?", [3], None, [["Is there a dog?", "yes"]]):
        with pytest.raises(ValueError, match="the questions of 'a dog' must be a list of at least one text"):
            questions(Prompt("a dog", {"questions": texts}))
    for parents in ([[]], [[], [2]], [[], [-1]]):
        with pytest.raises(ValueError, match="must be a list with one entry for each of its 2 questions"):
            questions(Prompt("a dog", {"questions": ["Is there a dog?", "Is it red?"], "parents": parents}))


class Brightness:
    """A judge that answers every question with the brightness of the image, and records the questions."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def __call__(self, images: Tensor, texts: list[str]) -> Tensor:
        self.texts += texts
        lower = torch.tensor([0.5 if "left" in text else 0.0 for text in texts])
        return images.mean((1, 2, 3)) - lower


IMAGES = torch.tensor([0.9, 0.4, 0.8])[:, None, None, None].expand(3, 3, 2, 2)


def test_scores_are_means_over_the_questions_of_each_prompt() -> None:
    judge = Brightness()
    reward: Reward = TifaReward(judge)
    scores = reward(IMAGES, [PLACE, SHEEP, COLORS])
    assert isinstance(reward, Reward)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, torch.tensor([(0.9 + 0.9 + 0.4) / 3, 0.4, 0.8]))
    assert judge.texts == [*texts(PLACE), *texts(SHEEP), *texts(COLORS)]


def test_the_geometric_mean_is_zero_after_one_no() -> None:
    scores = TifaReward(Brightness(), "geometric")(IMAGES, [PLACE, SHEEP, COLORS])
    torch.testing.assert_close(scores, torch.tensor([(0.9 * 0.9 * 0.4) ** (1 / 3), 0.4, 0.8]))
    nothing = TifaReward(lambda images, texts: torch.zeros(len(texts)), "geometric")
    assert nothing(IMAGES[:1], [PLACE]).tolist() == [0]


def test_each_part_is_a_score_and_shares_the_answers() -> None:
    judge = Brightness()
    images, prompts = IMAGES.clone(), [PLACE, SHEEP, COLORS]
    expected = {"count": [0.9, 0.4, 0.8], "color": [1.0, 1.0, 0.8], "position": [0.4, 1.0, 1.0]}
    for part, values in expected.items():
        assert TifaReward(judge, part=part)(images, prompts).tolist() == pytest.approx(values)
    assert len(judge.texts) == sum(len(texts(prompt)) for prompt in prompts)  # each question once
    gated = TifaReward(lambda images, texts: torch.tensor([0.2, 0.9, 0.8]), gate=0.5, part="position")
    assert gated(images[:1].clone(), [PLACE]).tolist() == [0]  # by the answers of other parts


def test_the_parts_of_a_benchmark_are_its_categories() -> None:
    metadata = {"questions": ["a", "b", "c"], "categories": ["entity - whole", "attribute - color", "entity - part"]}
    prompt = Prompt("", metadata)
    answers = {"entity": (0.2 + 0.8) / 2, "attribute": 0.6, "relation": 1.0}
    for part, value in answers.items():
        reward = TifaReward(lambda images, texts: torch.tensor([0.2, 0.6, 0.8]), part=part)
        assert reward(IMAGES[:1], [prompt]).tolist() == pytest.approx([value])
    with pytest.raises(ValueError, match="the questions of 'a dog' have no categories, so 'entity' selects none"):
        TifaReward(Brightness(), part="entity")(IMAGES[:1], [Prompt("a dog", {"questions": ["Is there a dog?"]})])
    with pytest.raises(ValueError, match="the categories of 'a dog' must be a list with one for each of its 2"):
        questions(Prompt("a dog", {"questions": ["a", "b"], "categories": ["entity"]}))


def test_gate_zeroes_answers_whose_parent_is_no() -> None:
    prompt = Prompt("", {"questions": ["a", "b", "c", "d"], "parents": [[], [0], [1], [0, 1]]})
    reward = TifaReward(lambda images, texts: torch.tensor([0.2, 0.9, 0.8, 0.7]), gate=0.5)
    # c counts, since the answer to b was a yes before gating
    torch.testing.assert_close(reward(IMAGES[:1], [prompt]), torch.tensor([(0.2 + 0.0 + 0.8 + 0.0) / 4]))


def test_answers_are_probabilities_or_nan() -> None:
    scores = TifaReward(lambda images, texts: torch.tensor([0.5, torch.nan]))(IMAGES[:2], [SHEEP, SHEEP])
    assert scores.isnan().tolist() == [False, True]
    with pytest.raises(ValueError, match="they must be in"):
        TifaReward(lambda images, texts: torch.tensor([1.5]))(IMAGES[:1], [SHEEP])
    with pytest.raises(ValueError, match=r"answered \(2,\) for 1 questions"):
        TifaReward(lambda images, texts: torch.zeros(2))(IMAGES[:1], [SHEEP])


def test_reward_and_judge_are_configurable() -> None:
    judge = '{"class_path": "rewards.vqa.YesNoModel", "init_args": {"model": "somewhere"}}'
    reward = f'{{"class_path": "genalign.evaluation.benchmarks.tifa.TifaReward", "init_args": {{"judge": {judge}}}}}'
    required = ["--output", "x", "--model.path", "shapes-sd3", "--prompts", "prompts.txt"]
    arguments = [*required, "--recipe", "genalign.flow_grpo", "--rewards.tifa.function", reward]
    settings, _ = parse(Train, arguments, "train")
    assert isinstance(settings.rewards["tifa"].function, TifaReward)
