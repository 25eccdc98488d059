"""Rewards that share the answers of one judge."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from genalign.scoring.reward_check import Probe, check
from genalign.types import Prompt, Reward
from rewards.dimensions import DimensionReward
from tests.rewards.gray_images import grays, named, plain


@dataclass
class Grader:
    """Grades of level and its complement; ``asked`` counts samples. Two are equal if their names are."""

    names: tuple[str, ...] = ("light", "dark")
    asked: list[int] = field(default_factory=list, compare=False)

    def dimensions(self, samples: Tensor, prompts: Sequence[Prompt]) -> Mapping[str, Tensor]:
        self.asked.append(len(samples))
        light = samples.flatten(1).mean(1)
        return {"light": light, "dark": (1 - light).masked_fill(light > 0.8, math.nan)}


def test_equal_judges_share_an_answer_in_any_order() -> None:
    judges = Grader(), Grader()
    light, dark = DimensionReward(judges[0], "light"), DimensionReward(judges[1], "dark")
    assert isinstance(light, Reward)
    images, prompts = grays(0.1, 0.9), named(2)
    assert plain(dark(images, prompts)) == [0.9, -1]
    assert plain(light(images, prompts)) == [0.1, 0.9]
    assert [judge.asked for judge in judges] == [[], [2]]
    halves = [light(part, prompts[row : row + 1]) for row, part in enumerate(images.split(1))]
    assert plain(torch.cat(halves)) == [0.1, 0.9]
    assert [plain(dark(part, prompts[row : row + 1])) for row, part in enumerate(images.split(1))] == [[0.9], [-1]]
    assert [judge.asked for judge in judges] == [[1, 1], [2]]


def test_other_prompts_samples_and_judges_are_asked_about() -> None:
    judge = Grader(("light", "dark", "other"))
    judge.dimensions = lambda samples, prompts: (
        judge.asked.append(len(samples)) or dict.fromkeys(judge.names, torch.zeros(len(samples)))
    )
    light, dark = DimensionReward(judge, "light"), DimensionReward(judge, "dark")
    image, prompt = grays(0.1), Prompt("a", {"index": 1})
    light(image, [prompt])
    dark(image, [Prompt("a", {"index": 2})])
    dark(image, [Prompt("b", {"index": 1})])
    assert judge.asked == [1] * 3
    dark(image, [prompt])
    assert judge.asked == [1] * 3
    dark(grays(0.2), [prompt])
    assert judge.asked == [1] * 4


def test_the_contract_of_rewards_holds() -> None:
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.8
    checks = list(check(DimensionReward(Grader(), "light"), Probe(images, named(4))))
    assert [result for result in checks if result.passed is False] == []


def test_an_unknown_dimension_is_refused() -> None:
    with pytest.raises(ValueError, match="no 'style': choose from light, dark"):
        DimensionReward(Grader(), "style")(grays(0.1), named(1))
    with pytest.raises(ValueError, match="one prompt per sample"):
        DimensionReward(Grader(), "light")(grays(0.1), named(2))
