"""Consistency of the samples of a prompt and of the panels of an image, by hand and by features."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from genalign.types import Prompt
from rewards.consistency import FeatureCosine, GroupConsistencyReward, PanelConsistencyReward


def means(samples: Tensor) -> Tensor:
    return samples.flatten(2).mean(2)


def _colors(*colors: tuple[float, float, float]) -> Tensor:
    return torch.tensor(colors)[:, :, None, None].expand(-1, -1, 4, 4)


def _closeness(left: Tensor, right: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return 1 - (means(left) - means(right)).abs().sum(1)


def test_a_sample_is_compared_with_the_others_of_its_prompt() -> None:
    cat, dog = Prompt("a cat"), Prompt("a dog")
    samples = _colors((1, 0, 0), (0.5, 0, 0), (0, 0, 0), (0, 1, 0), (0, 0.5, 0), (0, 0, 1))
    prompts = [cat, cat, cat, dog, dog, Prompt("a cat")]  # the last is another prompt of the same text
    scores = GroupConsistencyReward(_closeness)(samples, prompts)
    torch.testing.assert_close(scores[:5], torch.tensor([0.25, 0.5, 0.25, 0.5, 0.5]))
    assert bool(scores[5].isnan())
    equal = GroupConsistencyReward(FeatureCosine(means))(samples[:1].expand(3, -1, -1, -1), [cat] * 3)
    torch.testing.assert_close(equal, torch.ones(3))
    with pytest.raises(ValueError, match="each of these prompts has one, such as 'a cat': raise group_size"):
        GroupConsistencyReward(_closeness)(samples[:2], [cat, dog])


def test_a_comparison_without_an_answer_does_not_count() -> None:
    def undecided(left: Tensor, right: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return torch.tensor([torch.nan, 0.2, 0.6])  # pairs (0, 1), (0, 2), (1, 2)

    prompt = Prompt("a")
    scores = GroupConsistencyReward(undecided)(_colors(*[(0, 0, 0)] * 3), [prompt] * 3)
    torch.testing.assert_close(scores, torch.tensor([0.2, 0.6, 0.4]))


def test_panels_of_a_grid_are_compared_in_pairs() -> None:
    values = iter([0.9, 0.8, 0.7, 0.95, 0.6, 0.85])  # of the specification: their mean is 0.8

    def compare(left: Tensor, right: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        assert left.shape == right.shape == (1, 3, 2, 2)
        return torch.full((1,), next(values))

    image = torch.rand(1, 3, 4, 4)
    assert float(PanelConsistencyReward(compare)(image, [Prompt("a")])) == pytest.approx(0.8)
    seen = list[tuple[Tensor, Tensor]]()

    def record(left: Tensor, right: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        seen.append((left, right))
        return torch.zeros(1)

    PanelConsistencyReward(record, rows=1, columns=2)(image, [Prompt("a")])
    assert torch.equal(seen[0][0], image[..., :2]) and torch.equal(seen[0][1], image[..., 2:])
    with pytest.raises(ValueError, match="do not divide into 3 x 2 panels"):
        PanelConsistencyReward(compare, rows=3)(image, [Prompt("a")])
    with pytest.raises(ValueError, match="two panels or more, not 1 x 1"):
        PanelConsistencyReward(compare, rows=1, columns=1)


def test_the_reward_has_a_gradient() -> None:
    samples, prompt = torch.rand(3, 3, 4, 4).requires_grad_(), Prompt("a")
    (gradient,) = torch.autograd.grad(
        GroupConsistencyReward(FeatureCosine(means))(samples, [prompt] * 3).sum(), samples
    )
    assert bool((gradient.flatten(1).abs().amax(1) > 0).all())
