"""Every recipe on the one loop, with the tiny pipeline: a reward that it can raise rises."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from genalign.algorithms.credit import DifficultyWeighted, NormalizedSum, TaskNormalized
from genalign.algorithms.interfaces import RoundScores
from genalign.algorithms.matching import MatchingObjective, NoisedSamples
from genalign.algorithms.matching_losses import AWMLoss, ChiSquaredLink, DPOLoss, RewardWeightedLoss
from genalign.algorithms.pathwise import Ascent
from genalign.algorithms.pathwise_recipes import (
    align_prop,
    direct_align,
    draft,
    draft_lv,
    drtune,
    flow_bp,
    instruct_video,
    noise_hypernetwork,
    refl,
)
from genalign.algorithms.preference_recipes import crd, dgpo, dp2o_sr, dpo, gdro, kto, rwr, sft
from genalign.algorithms.recipe import Lag, Recipe
from genalign.algorithms.recipe_changes import with_chi_squared, with_credit
from genalign.algorithms.recipes import (
    adv_grpo,
    awm,
    ddpo,
    dense_grpo,
    dragon,
    dragon_set,
    flow_dppo,
    flow_grpo,
    guard_grpo,
    matching,
    mix_grpo,
    nft,
    ngrpo,
    prdp,
    tempflow_grpo,
    turning_point,
    vgpo,
)
from genalign.algorithms.trajectory import PolicyGradient
from genalign.diffusion.hypernetwork import Hypernetwork
from genalign.diffusion.policy import Lora, Policy
from genalign.diffusion.rollout import ReplayBatch
from genalign.diffusion.sampling import Sampling
from genalign.diffusion.transitions import FlowSDE
from genalign.scoring.score import NamedReward
from genalign.training.round_result import RoundResult
from genalign.training.settings import TrainerSettings
from genalign.training.trainer import Trainer
from genalign.types import Prompt, PromptSet
from pipelines import SD3

PROMPTS = PromptSet("two", (Prompt("a circle"), Prompt("two squares")))
SAMPLING = Sampling(num_steps=4, sigmas=(1.0, 0.75, 0.5, 0.25))
KERNEL = FlowSDE(0.9)


def redness(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """From 0 for cyan to 2 for red."""
    return 1 + samples[:, 0].flatten(1).mean(1) - samples[:, 1:].flatten(1).mean(1)


def color(samples: Tensor) -> Tensor:
    return samples.flatten(2).mean(2)


def red_set(features: Tensor) -> float:
    return float((features[:, 0] - features[:, 1:].mean(1)).mean())


def _small(opened: SD3, size: int = 8) -> SD3:
    """A copy of the tiny pipeline for latents of this height and width: 8 for images of 32 x 32."""
    pipeline = copy.deepcopy(opened)
    pipeline.height = pipeline.width = size
    return pipeline


def _train(
    opened: SD3,
    recipe: Recipe,
    rounds: int,
    rate: float,
    updates: int = 1,
    size: int = 8,
    lora: Lora = Lora(rank=4, alpha=8),
) -> list[RoundResult]:
    settings = TrainerSettings(
        rounds=rounds, prompts_per_round=2, group_size=8, batch_size=16, updates_per_round=updates, learning_rate=rate
    )
    tiny = _small(opened, size)
    policy = Policy(tiny.denoiser, lora, seed=0)
    trainer = Trainer(tiny, policy, [NamedReward("red", redness)], PROMPTS, recipe, settings, SAMPLING)
    return list(trainer.rounds())


def green_set(features: Tensor) -> float:
    """A set reward that conflicts with the samples' own reward, redness."""
    return float(features[:, 1].mean())


PATHWISE: dict[str, Callable[[], Recipe]] = {
    "draft": draft,
    "draft through all steps": lambda: draft(None, Ascent(limit=1.0)),
    "draft_lv": draft_lv,
    "align_prop": lambda: align_prop(mean=0.5),
    "refl": lambda: refl(last=0.5),
    "flow_bp": lambda: flow_bp(active=2),
    "drtune": lambda: drtune(active=2),
    "direct_align": lambda: direct_align(high=0.8, inversion=0.2),
    "instruct_video": lambda: instruct_video(moves=4),
    "noise_hypernetwork": lambda: noise_hypernetwork(Ascent(limit=1.0, anchor=1e-3)),
}

RECIPES: dict[str, Callable[[], Recipe]] = {
    "dense_grpo": lambda: dense_grpo(KERNEL, clip_range=1e-2),
    "guard_grpo": lambda: guard_grpo(KERNEL, clip_range=1e-3),
    "mix_grpo": lambda: mix_grpo(KERNEL, window=2, rounds_each=3, clip_range=1e-2),
    "tempflow_grpo": lambda: tempflow_grpo(KERNEL, clip_range=1e-2),
    "tempflow_grpo with branching": lambda: tempflow_grpo(KERNEL, clip_range=1e-2, branching=True),
    "vgpo": lambda: vgpo(KERNEL, clip_range=1e-2),
    "turning_point": lambda: turning_point(KERNEL, clip_range=1e-2),
    "flow_dppo": lambda: flow_dppo(KERNEL, limit=1e-2),
    "ddpo": lambda: ddpo(clip_range=1e-2),
    "adv_grpo": lambda: replace(adv_grpo(window=3, clip_range=1e-2), shared_noise=False),
    "gdpo": lambda: replace(flow_grpo(KERNEL, clip_range=1e-2), credit=NormalizedSum()),
    "prdp": lambda: prdp(KERNEL, beta=1e-2, clip_range=1e-2),
    "dragon with dpo": lambda: dragon("dpo", beta=100.0),
    "dragon with kto": lambda: dragon("kto", beta=100.0),
    "dragon with chi-PO": lambda: dragon("dpo", beta=100.0, link=ChiSquaredLink(10.0)),
    "dragon with a set reward": lambda: dragon_set(red_set, color, beta=100.0),
    "dragon with quality": lambda: dragon_set(green_set, color, quality=3.0, beta=100.0),
    "nft": lambda: nft(lag=Lag(slope=0.0)),
    "awm": awm,
    "crd": crd,
    "dgpo": lambda: dgpo(clip_range=1e-1),
    "dp2o_sr": lambda: dp2o_sr(count=2),
    "dpo": dpo,
    "gdro": lambda: gdro(beta=10.0, temperature=0.002),  # half the spread of the rewards
    "kto": lambda: kto(threshold=0.98),
    "rwr": lambda: rwr(temperature=0.002),
    "sft": lambda: sft(count=2),
    **PATHWISE,
}


FAST = ("dense_grpo", "tempflow_grpo", "turning_point", "prdp", "guard_grpo", "ddpo", "draft", "nft", "dragon with dpo")
"""Recipes that learn in half the rounds."""

EACH_FAMILY = ("dense_grpo", "guard_grpo", "ddpo", "prdp", "dragon with dpo", "nft", "draft")
"""Recipes whose losses and credits have little in common; the others take a minute more together."""


@pytest.mark.parametrize(
    "name", [name if name in EACH_FAMILY else pytest.param(name, marks=pytest.mark.slow) for name in RECIPES]
)
def test_the_reward_rises(tiny_opened: SD3, name: str) -> None:
    rounds, rate = (12, 2e-2) if name in FAST else (24, 1e-2)
    size = 16 if "dragon" in name else 8  # with few pixels the pairs of DRAGON teach too little
    results = _train(tiny_opened, RECIPES[name](), rounds, rate, size=size)
    first, last = (sum(result.reward for result in part) / 4 for part in (results[:4], results[-4:]))
    spread = results[0].reward_std
    assert last > first + 0.5 * spread
    assert all(result.log_ratio_max == 0.0 for result in results)
    assert results[-1].kl > 0 and bool(torch.tensor([result.loss for result in results]).isfinite().all())


def test_replays_have_the_gates_of_the_rollout(tiny_opened: SD3) -> None:
    lora = Lora(rank=4, alpha=8, hypernetwork=Hypernetwork(width=16))
    results = _train(tiny_opened, flow_grpo(KERNEL, kl=0.1), 2, 1e-2, lora=lora)
    assert all(result.log_ratio_max == 0.0 for result in results) and results[-1].kl > 0


@pytest.mark.slow
@pytest.mark.parametrize("condition_on", ["state", "prompt"])
@pytest.mark.parametrize("name", ["ddpo", "draft"])
def test_the_reward_rises_with_a_hypernetwork(
    tiny_opened: SD3, name: str, condition_on: Literal["state", "prompt"]
) -> None:
    lora = Lora(rank=4, alpha=8, hypernetwork=Hypernetwork(condition_on, width=16))
    results = _train(tiny_opened, RECIPES[name](), 24, 1e-2, lora=lora)
    first, last = (sum(result.reward for result in part) / 4 for part in (results[:4], results[-4:]))
    assert last > first + 0.5 * results[0].reward_std
    assert all(result.log_ratio_max == 0.0 for result in results)


def test_a_credit_knows_the_tasks_of_the_prompts(tiny_opened: SD3) -> None:
    tiny, seen = _small(tiny_opened), list[RoundScores]()
    texts = {"a circle": "color", "two squares": "count", "three squares": "count"}
    prompts = PromptSet("three", tuple(Prompt(text, {"tag": tag}) for text, tag in texts.items()))

    def credit(scores: RoundScores) -> Tensor:
        seen.append(scores)
        return DifficultyWeighted(TaskNormalized())(scores)

    settings = TrainerSettings(rounds=1, prompts_per_round=3, group_size=2, batch_size=6, updates_per_round=1)
    recipe = with_credit(flow_grpo(KERNEL, window=1), credit)
    policy = Policy(tiny.denoiser, Lora(rank=4), seed=0)
    trainer = Trainer(tiny, policy, [NamedReward("red", redness)], prompts, recipe, settings, SAMPLING)
    (result,) = trainer.rounds()
    round_prompts = next(trainer.prompts.rounds())
    trial, sampled = seen  # of made-up scores, before anything is sampled
    assert trial.task is None and sampled.task is not None and result.grad_norm > 0
    same = [[a.task == b.task for b in round_prompts] for a in round_prompts]
    assert torch.equal(sampled.task[::2, None] == sampled.task[None, 1::2], torch.tensor(same))


def test_ngrpo_clips_unequally() -> None:
    objective = ngrpo(best=2.0, clip_range=1e-3, kl=0.1).objective
    assert isinstance(objective, PolicyGradient) and objective.kl == 0.1
    assert objective.loss.clip_range == (0.8e-3, 1.2e-3) and objective.clip_range == 0.8e-3


def _gradients(opened: SD3, recipe: Recipe) -> tuple[list[Tensor], int]:
    """The gradients of two updates, where the samples of one prompt differ in reward, and the NFE of the round."""
    tiny = _small(opened)
    tiny.denoiser.transformer_blocks = tiny.denoiser.transformer_blocks[1:]  # one of the two is enough
    settings = TrainerSettings(rounds=1, prompts_per_round=4, group_size=4, batch_size=8)
    prompts = PromptSet("four", tuple(Prompt(f"{count} circles") for count in range(4)))

    def of_one_prompt(samples: Tensor, texts: Sequence[Prompt]) -> Tensor:
        return redness(samples, texts) * torch.tensor([float(text == texts[0]) for text in texts])

    policy, gradients = Policy(tiny.denoiser, Lora(rank=4), seed=0), list[Tensor]()
    trainer = Trainer(tiny, policy, [NamedReward("red", of_one_prompt)], prompts, recipe, settings, SAMPLING)
    trainer.learner.optimizer = torch.optim.SGD(policy.parameters)  # Adam amplifies rounding errors

    def record(*_: Any) -> None:
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in policy.parameters]
        gradients.append(torch.cat([part.flatten() for part in parts]))

    trainer.learner.optimizer.register_step_pre_hook(record)
    (result,) = trainer.rounds()
    return gradients, result.nfe


def _all(self: object, credit: Tensor, *group: Tensor) -> Tensor:
    return torch.ones(len(credit), dtype=torch.bool)


# KTO asks who has credit, not how much; DiffusionNFT, an anchor, set rewards and gradients of rewards take part of
# every sample; one step of a batch is one network call
WITHOUT_SKIPPING = (
    *(
        "awm",
        "crd",
        "dgpo",
        "gdro",
        "kto",
        "rwr",
        "sft",
        "dragon with kto",
        "nft",
        "dragon with a set reward",
        "dragon with quality",
    ),
    "tempflow_grpo with branching",
    *PATHWISE,
)


@pytest.mark.parametrize(
    "name", ["flow_grpo", "awm without anchor", *(name for name in RECIPES if name not in WITHOUT_SKIPPING)]
)
def test_samples_outside_the_loss_are_skipped_without_changing_the_gradient(
    tiny_opened: SD3, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    more = {"flow_grpo": lambda: flow_grpo(KERNEL, clip_range=1e-2), "awm without anchor": lambda: awm(anchor=0.0)}
    recipe = (RECIPES | more)[name]()
    skipping, few = _gradients(tiny_opened, recipe)
    monkeypatch.setattr(ReplayBatch, "batches", lambda live, whole=ReplayBatch.batches: whole(torch.ones_like(live)))
    for loss in (DPOLoss, AWMLoss):
        monkeypatch.setattr(loss, "used", _all)
    monkeypatch.setattr(AWMLoss, "terms", lambda self, credit, group: int((credit != 0).sum()))
    whole, many = _gradients(tiny_opened, recipe)
    assert few < many and len(skipping) == 2
    for ours, theirs in zip(skipping, whole, strict=True):
        assert theirs.norm() > 0 and (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_a_kl_penalty_costs_a_reference_of_each_trained_transition(tiny_opened: SD3) -> None:
    _, plain = _gradients(tiny_opened, flow_grpo(KERNEL))
    _, penalized = _gradients(tiny_opened, flow_grpo(KERNEL, kl=0.1))
    _, measured = _gradients(tiny_opened, flow_grpo(KERNEL, kl=1e-9))
    assert plain < penalized == measured < 2 * plain


def test_weighted_matching_is_a_recipe_of_one_line(tiny_opened: SD3) -> None:
    recipe = matching(
        lambda outcome: (outcome.combined > outcome.combined.median()).float(), MatchingObjective(RewardWeightedLoss())
    )
    assert len(_train(tiny_opened, recipe, rounds=1, rate=1e-3)) == 1


def test_an_old_policy_samples_where_there_is_a_lag(tiny_opened: SD3) -> None:
    results = _train(tiny_opened, nft(lag=Lag(slope=1.0, limit=1.0)), rounds=6, rate=3e-2)
    # With a decay of min(i, 1), the policy that samples takes the weights after round 0 and keeps them.
    assert results[-1].log_ratio_max == 0.0 and results[-1].kl > 0


def test_credit_without_completions_or_features_is_an_error(tiny_opened: SD3) -> None:
    with pytest.raises(ValueError, match="give the recipe a completion"):
        _train(tiny_opened, replace(dense_grpo(KERNEL), completion=None), 1, 1e-3)
    with pytest.raises(ValueError, match="give the recipe a feature function"):
        _train(tiny_opened, replace(dragon_set(red_set, color), features=None), 1, 1e-3)


def test_the_ratio_of_awm_is_to_the_weights_that_sampled_the_round(
    tiny_opened: SD3, monkeypatch: pytest.MonkeyPatch
) -> None:
    distances: list[float] = []
    loss = AWMLoss.__call__

    def watched(self: AWMLoss, noised: NoisedSamples, credit: Tensor, group: Tensor) -> Tensor:
        distances.append(float((noised.prediction.detach() - noised.old).abs().max()))
        return loss(self, noised, credit, group)

    monkeypatch.setattr(AWMLoss, "__call__", watched)
    _train(tiny_opened, awm(draws=1), rounds=2, rate=1e-3, updates=2)
    updates = [distances[i : i + len(distances) // 4] for i in range(0, len(distances), len(distances) // 4)]
    assert [max(update) > 0 for update in updates] == [False, True, False, True]


def test_the_samples_of_a_branched_group_part_at_the_one_step_of_the_round(tiny_opened: SD3) -> None:
    recipe = tempflow_grpo(KERNEL, branching=True)
    settings = TrainerSettings(rounds=8, prompts_per_round=2, group_size=3, batch_size=6, updates_per_round=1)
    tiny = _small(tiny_opened)
    policy = Policy(tiny.denoiser, Lora(rank=4), seed=0)
    trainer = Trainer(tiny, policy, [NamedReward("red", redness)], PROMPTS, recipe, settings, SAMPLING)
    trained = {recipe.steps(tiny.path, trainer.grid, index, 0) for index in range(20)}
    assert trained == {(0,), (1,), (2,)}  # of four, without the last
    for index in range(3):
        (batch,) = trainer.sample(index, PROMPTS.prompts)
        before, after = batch.rollout.states.unflatten(0, (2, 3)).unbind(2)
        assert torch.equal(before, before[:, :1].expand_as(before))
        assert not any(torch.equal(after[:, one], after[:, other]) for one, other in ((0, 1), (0, 2), (1, 2)))
        assert batch.stepwise is None


def test_a_trust_region_in_kl_acts_from_the_second_update_on(tiny_opened: SD3) -> None:
    first, second = (_train(tiny_opened, flow_dppo(KERNEL, limit=1e-9), 1, 1e-2, updates)[0] for updates in (1, 2))
    assert first.clip_fraction == 0.0 < second.clip_fraction


def test_a_chi_squared_penalty_is_for_recipes_with_a_kl(tiny_opened: SD3) -> None:
    assert len(_train(tiny_opened, with_chi_squared(flow_grpo(KERNEL, kl=0.1), 50.0), rounds=1, rate=1e-3)) == 1
    for recipe in (flow_grpo(), dragon(), prdp()):
        with pytest.raises(ValueError, match="needs a recipe with a KL penalty, such as flow_grpo: set its kl above 0"):
            with_chi_squared(recipe, 50.0)


def test_arguments_that_exclude_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="completes no stored states: leave it out"):
        tempflow_grpo(completion_steps=2, branching=True)
    with pytest.raises(ValueError, match='link belongs to the loss "dpo"'):
        dragon("kto", link=ChiSquaredLink(10.0))
