"""Mixtures of ideal points on planted tastes: seen users, new users from few comparisons, and what is refused."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

from genalign.reward_learning.ideal_points import (
    Comparisons,
    IdealPointModel,
    IdealPointSettings,
    PreferenceFit,
    Score,
    accuracies,
    fit,
    new_model,
    with_new_users,
)

TASTES = {"left": (1.0, 0.0), "right": (-1.0, 0.0), "up": (0.0, 1.0), "down": (0.0, -1.0)}
FIT = PreferenceFit(steps=150, learning_rate=2e-2)


def _comparisons(users: dict[str, tuple[float, float]], count: int, seed: int) -> Comparisons:
    """Each user prefers the sample that lies further in the direction of the user's taste; prompts say nothing."""
    generator = torch.Generator().manual_seed(seed)
    names = [user for user in users for _ in range(count)]
    tastes = torch.tensor([users[user] for user in names])
    pairs = torch.randn(2, len(names), 2, generator=generator)
    values = (pairs * tastes).sum(-1)
    first = values[0] > values[1]
    preferred = torch.where(first[:, None], pairs[0], pairs[1])
    rejected = torch.where(first[:, None], pairs[1], pairs[0])
    return Comparisons(preferred, rejected, torch.zeros(len(names), 3), tuple(names))


def _fitted(score: Score, users: dict[str, tuple[float, float]] = TASTES) -> IdealPointModel:
    model = new_model(IdealPointSettings(2, 3, prototypes=4, dimensions=4, hidden=32, score=score), tuple(users), 0)
    losses = list(fit(model, _comparisons(users, 200, 0), FIT))
    assert losses[-1] < 0.5 * losses[0]
    return model


@pytest.mark.parametrize("score", get_args(Score))
def test_opposite_tastes_are_learned_side_by_side(score: Score) -> None:
    model, held_out = _fitted(score), _comparisons(TASTES, 100, 1)
    assert min(accuracies(model, held_out).values()) > 0.9
    weights = model.weights_of([*({user: 1.0} for user in TASTES), {}, {"left": 1.0, "up": 3.0}])
    torch.testing.assert_close(weights.sum(1), torch.ones(6))
    torch.testing.assert_close(weights[4], weights[:4].mean(0))
    torch.testing.assert_close(weights[5], 0.25 * weights[0] + 0.75 * weights[2])
    everyone = Comparisons(held_out.preferred, held_out.rejected, held_out.prompts, ("left",) * len(held_out))
    assert 0.4 < accuracies(model, everyone)["left"] < 0.6  # opposite and orthogonal tastes cancel


def test_a_new_user_is_fitted_from_few_comparisons_with_all_else_frozen() -> None:
    model = _fitted("angle")
    # between two users, where no user was
    diagonal = {"new": (0.7, 0.7)}
    larger = with_new_users(model, _comparisons(diagonal, 10, 2), PreferenceFit(steps=200, learning_rate=3e-2))
    assert larger.users == (*TASTES, "new")
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(
            larger.state_dict()[name][: len(tensor)] if name == "mixture" else larger.state_dict()[name],
            tensor,
            rtol=0,
            atol=0,
        )
    assert accuracies(larger, _comparisons(diagonal, 200, 3))["new"] > 0.85
    again = with_new_users(larger, _comparisons({"new": (-1.0, 0.0)}, 40, 4), PreferenceFit(steps=200))
    assert again.users == larger.users and torch.equal(again.mixture[:4], larger.mixture[:4])
    assert accuracies(again, _comparisons({"new": (-1.0, 0.0)}, 200, 5))["new"] > 0.85


def test_scores_of_both_kinds_by_hand() -> None:
    samples, prompts = torch.tensor([[3.0, 4.0]]), torch.zeros(1, 1)
    near = IdealPointModel(IdealPointSettings(2, 1, prototypes=2, dimensions=2, score="distance"), ("a",))
    angle = IdealPointModel(IdealPointSettings(2, 1, prototypes=2, dimensions=2, score="angle"), ("a",))
    weights = torch.tensor([[0.25, 0.75]])
    near.of_samples, angle.of_samples = torch.nn.Identity(), torch.nn.Identity()  # type: ignore[assignment]
    near.points.data = torch.tensor([[3.0, 0.0], [3.0, 4.0]])  # the mixture is (3, 3)
    assert float(near(samples, prompts, weights).detach()) == pytest.approx(-1.0 * float(near.log_scale.detach().exp()))
    for of_prompts, point in zip(angle.of_prompts, ((4.0, 0.0), (0.0, 4.0)), strict=True):
        of_prompts[2].weight.data.zero_()
        of_prompts[2].bias.data = torch.tensor(point)  # the mixture is (1, 3)
    expected = (3.0 * 1 + 4.0 * 3) / (5 * 10**0.5)
    assert float(angle(samples, prompts, weights).detach()) == pytest.approx(
        expected * float(angle.log_scale.detach().exp())
    )


def test_a_restored_model_scores_alike_and_each_user_has_held_out_comparisons() -> None:
    model = _fitted("distance", {"left": TASTES["left"], "up": TASTES["up"]})
    restored = IdealPointModel.restore(*model.state())
    comparisons = _comparisons({"left": TASTES["left"], "up": TASTES["up"]}, 10, 6)
    torch.testing.assert_close(restored.margins(comparisons), model.margins(comparisons))
    rest, held_out = comparisons.split(0.2, seed=0)
    assert (len(rest), len(held_out)) == (16, 4) and sorted(held_out.annotators) == ["left", "left", "up", "up"]
    together: Tensor = torch.cat([rest.preferred, held_out.preferred])
    assert sorted(together[:, 0].tolist()) == sorted(comparisons.preferred[:, 0].tolist())


def test_what_cannot_be_learned_is_refused() -> None:
    model = new_model(IdealPointSettings(2, 3), ("ada",), 0)
    with pytest.raises(ValueError, match=r"user 'bob' is not known \(1 others are\): fit a few comparisons"):
        model.weights_of([{"bob": 1.0}])
    empty = Comparisons(torch.zeros(0, 2), torch.zeros(0, 2), torch.zeros(0, 3), ())
    with pytest.raises(ValueError, match="there is no comparison to learn from"):
        list(fit(model, empty, FIT))
    with pytest.raises(ValueError, match="one preferred sample, rejected sample, prompt and annotator each"):
        Comparisons(torch.zeros(1, 2), torch.zeros(2, 2), torch.zeros(1, 3), ("a",))
    with pytest.raises(ValueError, match="score must be one of angle, distance"):
        IdealPointSettings(2, 3, score="dot")  # type: ignore[arg-type]
