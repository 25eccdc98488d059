"""Training with balanced rewards on the tiny pipeline."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from genalign.algorithms.credit import GroupRelative
from genalign.algorithms.gradient_balance import GradientBalance
from genalign.algorithms.interfaces import RoundScores
from genalign.algorithms.multi_reward_credit import Decorrelated
from genalign.algorithms.recipe import Recipe
from genalign.algorithms.recipe_changes import with_gradient_balance
from genalign.algorithms.recipes import dense_grpo, dragon, flow_grpo, nft
from genalign.diffusion.policy import Lora, Policy
from genalign.scoring.score import NamedReward
from genalign.training.balanced_gradients import BalancedGradients, credit_by_reward
from genalign.training.settings import TrainerSettings
from genalign.training.trainer import Trainer
from genalign.types import Prompt
from pipelines import SD3
from tests.genalign.training.toy_runs import PROMPTS, SAMPLING, SETTINGS, redness, weights

ONE_UPDATE = replace(SETTINGS, updates_per_round=1, batch_size=8)


def greenness(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return samples[:, 1].flatten(1).mean(1)


def _trainer(
    tiny: SD3, recipe: Recipe, settings: TrainerSettings = ONE_UPDATE, rewards: Sequence[NamedReward] | None = None
) -> Trainer:
    rewards = rewards or [NamedReward("red", redness, 100.0), NamedReward("green", greenness, 0.01)]
    tiny = copy.deepcopy(tiny)
    return Trainer(tiny, Policy(tiny.denoiser, Lora(rank=4, alpha=8)), rewards, PROMPTS, recipe, settings, SAMPLING)


@pytest.mark.parametrize(
    "recipe", [flow_grpo(window=2), dense_grpo(window=2), nft()], ids=["flow_grpo", "dense_grpo", "nft"]
)
def test_rewards_of_any_scale_get_weights_and_few_more_backward_passes(tiny: SD3, recipe: Recipe) -> None:
    first, second = _trainer(tiny, with_gradient_balance(recipe, every=2, decay=0.5)).rounds()
    for result in (first, second):
        shares = [result.metrics[f"balance/{name}"] for name in ("red", "green")]
        assert sum(shares) == pytest.approx(1) and min(shares) > 0
        assert -1 <= result.metrics["balance/least_cosine"] <= 1
    before = second.calls["nfe backward"] - first.calls["nfe backward"]
    assert first.calls["nfe backward"] == 3 * before  # a pass for each of two rewards, and the update's own


def test_the_step_is_the_balanced_sum_of_the_rewards_own_gradients(tiny: SD3) -> None:
    recipe = with_gradient_balance(flow_grpo(window=2, shared_noise=False))
    trainer = _trainer(tiny, recipe, replace(ONE_UPDATE, max_grad_norm=1e9))
    own: list[list[Tensor]] = []
    steps: list[Tensor] = []
    balance = trainer.learner.balance
    assert balance is not None
    solve = balance.solve

    def flat(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([tensor.flatten() for tensor in tensors]).double()

    def recorded(gradients: Sequence[Sequence[Tensor]]) -> Tensor:
        own.append([flat(one) for one in gradients])
        return solve(gradients)

    balance.solve = recorded  # type: ignore[method-assign]
    parameters = trainer.policy.parameters
    trainer.learner.optimizer.register_step_pre_hook(
        lambda *_: steps.append(flat([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]))
    )
    next(trainer.rounds())
    (alone,), (step,) = own, steps
    norms = [one.norm() for one in alone]
    expected = (alone[0] / norms[0] + alone[1] / norms[1]) / 2 * (norms[0] + norms[1]) / 2  # two share equally
    torch.testing.assert_close(step, expected, rtol=1e-3, atol=1e-6 * float(expected.abs().max()))


def blueness(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return samples[:, 2].flatten(1).mean(1)


def test_a_reward_of_weight_zero_and_scales_change_nothing(tiny_folder: Path) -> None:
    recipe, ends = with_gradient_balance(flow_grpo(window=1)), []
    for scale, reported in ((1.0, []), (7.0, [NamedReward("blue", blueness, 0.0)])):
        rewards = [NamedReward("red", redness, scale), *reported, NamedReward("green", greenness, 2 * scale)]
        trainer = _trainer(SD3.load(tiny_folder), recipe, rewards=rewards)
        next(trainer.rounds())
        ends.append(weights(trainer))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_each_reward_alone_is_credited_with_its_sign() -> None:
    scores = torch.tensor([[1.0, 9.0, 1.0], [2.0, 9.0, 2.0], [4.0, 9.0, 4.0]])
    credit = credit_by_reward(GroupRelative(), RoundScores(scores, (3.0, 0.0, -2.0), torch.zeros(3).long()))
    torch.testing.assert_close(credit[:, 0], -credit[:, 1])
    assert credit.shape == (3, 2) and float(credit[2, 0]) > 0
    named = RoundScores(scores, (3.0, 0.0, -2.0), torch.zeros(3).long(), names=("red", "size", "blue"))
    message = "by each reward separately, which Decorrelated refuses .*names the reward 'size', but the rewards are red"
    with pytest.raises(ValueError, match=message):
        credit_by_reward(Decorrelated(GroupRelative(), ["size"]), named)


def test_recipes_and_rewards_that_cannot_be_balanced_are_named(tiny: SD3) -> None:
    with pytest.raises(ValueError, match="needs 2 to 8 of non-zero weight, not 1"):
        _trainer(tiny, with_gradient_balance(flow_grpo()), rewards=[NamedReward("red", redness)])
    with pytest.raises(ValueError, match="loss over a whole group does not allow: choose a recipe such as flow_grpo"):
        _trainer(tiny, with_gradient_balance(dragon()))
    policy = SimpleNamespace(sharded=True)
    rewards = [NamedReward("a", redness), NamedReward("b", redness)]
    with pytest.raises(ValueError, match="train without FSDP"):
        BalancedGradients(GradientBalance(), rewards, flow_grpo().objective, policy)  # type: ignore[arg-type]
