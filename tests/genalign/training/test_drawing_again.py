"""Rounds that draw other samples in place of zero-variance groups, on the tiny pipeline."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from genalign.algorithms.recipe import Lag, Recipe
from genalign.algorithms.recipe_changes import with_adaptive_group_size, with_dynamic_sampling
from genalign.algorithms.recipes import dragon, flow_grpo, nft
from genalign.diffusion.policy import Lora, Policy
from genalign.diffusion.sampling import Sampling
from genalign.prompts import PromptSampler
from genalign.runtime.progress import SILENT
from genalign.scoring.score import NamedReward
from genalign.scoring.score_log import ScoreLog
from genalign.training.settings import TrainerSettings
from genalign.training.trainer import Trainer
from genalign.types import Prompt, PromptSet, RewardFunction
from pipelines import SD3
from tests.genalign.training.toy_runs import Session, redness, require_same_checkpoints, seed_generators

PROMPTS = PromptSet("eight", tuple(Prompt(f"{number} circles", {"n": number}) for number in range(8)))
SETTINGS = TrainerSettings(
    rounds=3, prompts_per_round=4, group_size=2, batch_size=3, updates_per_round=1, learning_rate=1e-2
)
SAMPLING = Sampling(num_steps=3, sigmas=(1.0, 0.6, 0.3))
RECIPES: dict[str, Callable[[], Recipe]] = {
    "dynamic sampling": lambda: with_dynamic_sampling(flow_grpo(window=1)),
    "dynamic sampling, groups whole": lambda: with_dynamic_sampling(dragon(anchor=0.1)),
    "dynamic sampling, lag": lambda: with_dynamic_sampling(nft(lag=Lag(slope=0.3))),
    "adaptive group size": lambda: with_adaptive_group_size(flow_grpo(window=1)),
}


def seldom(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """A reward that varies only for odd prompts."""
    varied = torch.tensor([bool(prompt.metadata and prompt.metadata["n"] % 2) for prompt in prompts])
    return torch.where(varied, redness(samples, prompts), 0.5)


def _trainer(
    opened: SD3,
    recipe: Recipe,
    reward: RewardFunction = seldom,
    settings: TrainerSettings = SETTINGS,
    score_log: ScoreLog | None = None,
) -> Trainer:
    if recipe.objective.unit == "group":
        settings = replace(settings, batch_size=4)
    pipeline, rewards = copy.deepcopy(opened), [NamedReward("red", reward)]
    policy = Policy(pipeline.denoiser, Lora(rank=2))
    rewards = score_log.logged(rewards) if score_log else rewards
    return Trainer(pipeline, policy, rewards, PROMPTS, recipe, settings, SAMPLING)


@pytest.fixture(scope="module")
def opened(tiny_folder: Path) -> SD3:
    """The tiny pipeline for images of 32 x 32, with the last of its blocks alone."""
    pipeline = SD3.load(tiny_folder, height=32, width=32)
    pipeline.denoiser.transformer_blocks = pipeline.denoiser.transformer_blocks[1:]
    return pipeline


@pytest.mark.parametrize("name", RECIPES)
def test_fewer_groups_have_zero_variance_and_all_that_runs_is_counted(opened: SD3, name: str) -> None:
    trainer, recipe = _trainer(opened, RECIPES[name]()), RECIPES[name]()
    result = next(trainer.rounds())
    drawn = int(result.metrics["redrawn_samples"])
    assert 0 < drawn <= 8 and result.metrics["trained_zero_std_share"] < result.zero_std_share
    assert result.samples == trainer.samples == 8 + drawn
    assert result.calls["decode"] == result.calls["reward/red"] == 8 + drawn
    plain = next(_trainer(opened, replace(recipe, redraw=None)).rounds())
    assert (result.reward, result.reward_std, result.zero_std_share) == (
        plain.reward,
        plain.reward_std,
        plain.zero_std_share,
    )  # of the prompts that were drawn first
    assert plain.samples == 8 and plain.nfe < result.nfe


def test_a_round_without_zero_variance_groups_is_trained_as_it_was_drawn(opened: SD3) -> None:
    plain, same = (_trainer(opened, recipe, redness) for recipe in (flow_grpo(window=1), RECIPES["dynamic sampling"]()))
    for expected, result in zip(plain.rounds(), same.rounds(), strict=True):
        assert result.metrics.pop("redrawn_samples") == result.metrics.pop("trained_zero_std_share") == 0.0
        assert replace(result, seconds=0.0) == replace(expected, seconds=0.0)


def test_redraws_end_without_further_prompts_or_at_the_limit(opened: SD3) -> None:
    settings = replace(SETTINGS, prompts_per_round=8)
    result = next(_trainer(opened, RECIPES["dynamic sampling"](), settings=settings).rounds())
    assert result.metrics["redrawn_samples"] == 0.0
    constant = _trainer(opened, RECIPES["dynamic sampling"](), lambda samples, _: torch.ones(len(samples)))
    assert next(constant.rounds()).metrics["redrawn_samples"] == 8.0  # a round's samples, and no more


def test_a_round_whose_redrawn_groups_vary_has_credit(opened: SD3) -> None:
    first = set[str]()

    def later(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """A reward that varies for all prompts except those drawn first."""
        return torch.where(torch.tensor([p.text in first for p in prompts]), 0.5, redness(samples, prompts))

    trainer = _trainer(opened, RECIPES["dynamic sampling"](), later, replace(SETTINGS, max_rounds_without_credit=1))
    first |= {prompt.text for prompt in next(trainer.prompts.rounds())}
    result = next(trainer.rounds())
    assert result.zero_std_share == 1.0 and result.metrics["trained_zero_std_share"] < 1.0
    assert trainer.monitor.rounds_without_credit == 0


@dataclass(frozen=True)
class OfGroups:
    """A reward of whole groups, which fails where it sees a part of one."""

    compares_group: ClassVar[bool] = True

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        assert set(Counter(map(id, prompts)).values()) == {SETTINGS.group_size}
        return seldom(samples, prompts)


def test_a_reward_of_groups_sees_whole_ones_that_are_drawn_again(opened: SD3) -> None:
    settings = replace(SETTINGS, batch_size=4)
    trainer = _trainer(opened, RECIPES["dynamic sampling"](), OfGroups(), settings)
    results = [next(trainer.rounds()) for _ in range(2)]
    assert [result.failed_rewards for result in results] == [0, 0]
    assert sum(result.metrics["redrawn_samples"] for result in results) > 0
    with pytest.raises(ValueError, match=r"reward 'red' compares all samples .*: choose with_dynamic_sampling"):
        _trainer(opened, RECIPES["adaptive group size"](), OfGroups(), settings)
    with pytest.raises(ValueError, match=r"batch_size 3 must be a multiple of .* for reward 'red': try 2"):
        _trainer(opened, RECIPES["dynamic sampling"](), OfGroups())


@pytest.mark.parametrize("name", RECIPES)
def test_samples_scores_and_groups_belong_together(opened: SD3, name: str) -> None:
    trainer = _trainer(opened, RECIPES[name]())
    first = next(trainer.prompts.rounds())
    batches = trainer.sample(0, first)
    before = trainer.gather_scores(batches, first)
    prompts, batches, scores, drawn = trainer._redrawn(0, first, batches, before, SILENT)
    inputs = [batch.rollout.inputs for batch in batches]
    own = torch.cat([one.prompt for one in inputs])
    assert torch.equal(own, scores.group) and drawn
    seeds = [seed for one in inputs for seed in one.step_seeds]
    assert len(set(seeds)) == len(seeds)
    final = torch.cat([batch.rollout.final for batch in batches])
    again = seldom(trainer.pipeline.decode(final), [prompts[place] for place in own.tolist()])
    torch.testing.assert_close(again, scores.scores[:, 0], atol=1e-5, rtol=1e-4)
    texts = trainer.pipeline.encode([prompt.text for prompt in prompts]).tensors["context"]
    for one in inputs:
        torch.testing.assert_close(one.conditioning.tensors["context"][one.prompt], texts[one.prompt])


@pytest.mark.parametrize("name", RECIPES)
def test_a_resumed_run_draws_the_same_again(opened: SD3, tmp_path: Path, name: str) -> None:
    def session(folder: str, seed: int) -> Session:
        seed_generators(seed)
        score_log = ScoreLog()
        return Session(tmp_path / folder, _trainer(opened, RECIPES[name](), score_log=score_log), score_log)

    rows = session("unbroken", 0).go(2)
    session("broken", 0).go(1)
    again = session("broken", 99)
    again.resume()
    assert again.go(2) == rows[1:]
    require_same_checkpoints(tmp_path / "unbroken" / "latest", tmp_path / "broken" / "latest")


def test_further_prompts_are_others_in_an_order_of_the_round() -> None:
    sampler = PromptSampler(PROMPTS, 4, seed=3)
    drawn = next(sampler.rounds())
    further = sampler.further(0, drawn)
    assert {*further, *drawn} == {*PROMPTS.prompts} and len(further) == 4
    assert sampler.further(0, drawn) == further
    assert len({tuple(sampler.further(index, drawn)) for index in range(9)}) > 1
    twice = PromptSet("twice", (*PROMPTS.prompts, *PROMPTS.prompts))
    assert len(PromptSampler(twice, 4, 3).further(0, drawn)) == 4


def test_sharded_networks_are_refused(opened: SD3) -> None:
    trainer = _trainer(opened, flow_grpo(window=1))
    trainer.policy.sharded = True
    with pytest.raises(ValueError, match=r"FSDP does not allow: leave with_dynamic_sampling .* out"):
        Trainer(
            trainer.pipeline.pipeline,
            trainer.policy,
            [NamedReward("red", seldom)],
            PROMPTS,
            RECIPES["adaptive group size"](),
            SETTINGS,
            SAMPLING,
        )
