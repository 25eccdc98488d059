"""The training loop on the tiny pipeline."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from genalign.algorithms.credit import TaskNormalized
from genalign.algorithms.interfaces import TermCounts
from genalign.algorithms.preference_recipes import rwr, sft
from genalign.algorithms.recipe import Recipe
from genalign.algorithms.recipe_changes import with_credit
from genalign.algorithms.recipes import awm, flow_grpo, nft, ngrpo, prdp, vgpo
from genalign.diffusion.paths import FlowPath
from genalign.diffusion.policy import Lora, Policy
from genalign.diffusion.rollout import Rollout, rollout
from genalign.diffusion.sampling import Sampling
from genalign.diffusion.transitions import CPS, FlowSDE, Kernel
from genalign.runtime.state import load_optimizer_tensors, optimizer_tensors
from genalign.scoring.score import RewardError
from genalign.training.learner import Learner
from genalign.training.round_result import RoundResult
from genalign.training.settings import TrainerSettings
from genalign.training.trainer import Trainer
from genalign.types import Prompt
from pipelines import SD3
from tests.genalign.training.toy_runs import SAMPLING, SETTINGS, redness, toy_trainer, weights

TOLERANT = replace(SETTINGS, max_failed_fraction=0.5)


@pytest.mark.parametrize("kernel", [FlowSDE(0.7), CPS(0.8)])
def test_a_reward_rises(small: SD3, kernel: Kernel) -> None:
    recipe = flow_grpo(kernel, window=2, clip_range=1e-2, shared_noise=False)
    settings = replace(SETTINGS, rounds=15, group_size=8, batch_size=8, learning_rate=3e-2)
    results = list(toy_trainer(small, recipe, settings=settings).rounds())
    first, last = (sum(result.reward for result in part) / 5 for part in (results[:5], results[-5:]))
    assert last > first + results[0].reward_std


def test_the_first_update_is_on_policy(tiny: SD3, caplog: pytest.LogCaptureFixture) -> None:
    for result in toy_trainer(tiny, flow_grpo(window=2)).rounds():
        assert result.log_ratio_max == 0.0
    assert "disagree" not in caplog.text


def test_equal_scores_leave_the_weights_alone(tiny: SD3) -> None:
    trainer = toy_trainer(tiny, flow_grpo(), lambda samples, _: torch.ones(len(samples)))
    before = weights(trainer)
    result = next(trainer.rounds())
    assert result.zero_std_share == 1.0 and math.isnan(result.loss) and result.as_dict()["loss"] is None
    assert "nfe backward" not in result.calls  # nothing was replayed
    assert all(torch.equal(old, new) for old, new in zip(before, weights(trainer), strict=True))


def _by_prompt(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """A reward that is the same for all samples of a prompt."""
    return torch.tensor([len(prompt.text) / 100 for prompt in prompts])


LEARNING: dict[str, Callable[[], Recipe]] = {
    "ngrpo": lambda: ngrpo(window=1),
    "the mean of the task": lambda: with_credit(flow_grpo(window=1), TaskNormalized("task")),
    "an anchor": lambda: vgpo(window=1, anchor=0.1),
    "sft": lambda: sft(draws=1),
    "rwr": lambda: rwr(draws=1),
}
WITHOUT_CREDIT: dict[str, Callable[[], Recipe]] = {
    "flow_grpo": lambda: flow_grpo(window=1),
    "nft, which holds the policy in place": lambda: nft(draws=1),
    "prdp, whose credit is the score": lambda: prdp(window=1),
}


@pytest.mark.parametrize("name", LEARNING)
def test_a_round_of_zero_variance_groups_counts_where_the_recipe_learns_from_it(tiny: SD3, name: str) -> None:
    settings = replace(SETTINGS, rounds=1, max_rounds_without_credit=1)
    trainer = toy_trainer(tiny, LEARNING[name](), _by_prompt, settings)
    before = weights(trainer)
    (result,) = trainer.rounds()
    assert result.zero_std_share == 1.0 and not trainer.learner.without_credit
    assert not all(torch.equal(old, new) for old, new in zip(before, weights(trainer), strict=True))


@pytest.mark.parametrize("name", WITHOUT_CREDIT)
def test_rounds_without_credit_end_a_run(tiny: SD3, name: str, caplog: pytest.LogCaptureFixture) -> None:
    settings = replace(SETTINGS, rounds=3, max_rounds_without_credit=2)
    trainer = toy_trainer(tiny, WITHOUT_CREDIT[name](), _by_prompt, settings)
    rounds = trainer.rounds()
    next(rounds)
    assert "no sample of this round has credit" in caplog.text and trainer.state().numbers["rounds_without_credit"] == 1
    with pytest.raises(RewardError, match=r"for 2 rounds no sample had credit \(training\.max_rounds_without_credit\)"):
        next(rounds)


def test_without_a_limit_rounds_without_credit_end_no_run(tiny: SD3) -> None:
    settings = replace(SETTINGS, rounds=3, max_rounds_without_credit=None)
    trainer = toy_trainer(tiny, flow_grpo(window=1), _by_prompt, settings)
    assert len(list(trainer.rounds())) == trainer.monitor.rounds_without_credit == 3
    with pytest.raises(ValueError, match=r"training\.max_rounds_without_credit must be at least 1, not 0"):
        replace(SETTINGS, max_rounds_without_credit=0)


@pytest.mark.parametrize(
    ("credited", "losses", "without_credit"),
    [([False, True], 3, False), ([False, False], 3, True), ([True, True], 0, True)],
)
def test_ranks_agree_that_a_round_has_no_credit(credited: list[bool], losses: int, without_credit: bool) -> None:
    """A rank may have no sample with credit where another has some."""
    processes = SimpleNamespace(all_gather_object=lambda own: credited)
    rank: Any = SimpleNamespace(processes=processes, _counts=lambda batches: TermCounts(losses, 0))
    assert Learner._is_without_credit(rank, []) is without_credit


def test_kl_is_zero_at_the_start_and_grows(tiny: SD3) -> None:
    recipe = flow_grpo(window=2, clip_range=1e-2, kl=0.01)
    first, *_, last = toy_trainer(tiny, recipe, settings=replace(SETTINGS, rounds=4)).rounds()
    assert last.kl > first.kl >= 0.0


@pytest.mark.parametrize("recipe", [flow_grpo(window=1), prdp(window=1), awm()], ids=["flow_grpo", "prdp", "awm"])
def test_a_sample_that_overflows_does_not_spoil_the_others(
    tiny: SD3, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overflowing(*arguments: Any, **options: Any) -> Rollout:
        trajectories = rollout(*arguments, **options)
        trajectories.final[0] = torch.inf
        trajectories.x_next[0] = torch.nan
        return trajectories

    monkeypatch.setattr("genalign.training.sampler.rollout", overflowing)
    trainer = toy_trainer(tiny, recipe, settings=TOLERANT)
    before = weights(trainer)
    result = next(trainer.rounds())
    after = weights(trainer)
    assert result.failed_rewards == 2  # one of each batch of four
    assert all(weight.isfinite().all() for weight in after)
    assert not all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_runs_are_reproducible(tiny_folder: Path) -> None:
    def run(seed: int) -> tuple[list[RoundResult], list[Tensor]]:
        trainer = toy_trainer(SD3.load(tiny_folder), flow_grpo(window=2), settings=replace(SETTINGS, seed=seed))
        return [replace(result, seconds=0.0) for result in trainer.rounds()], weights(trainer)

    (results, first), (again, second), (other, _) = run(0), run(0), run(1)
    assert results == again and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert results[0].reward != other[0].reward


def test_rounds_are_trained_at_the_rates_of_the_schedule(tiny: SD3) -> None:
    settings = replace(SETTINGS, rounds=4, learning_rate=0.01, learning_rate_schedule="linear", warmup_rounds=2)
    trainer = toy_trainer(tiny, flow_grpo(window=1), settings=settings)
    rates = [(result.learning_rate, trainer.learner.optimizer.param_groups[0]["lr"]) for result in trainer.rounds()]
    assert rates == [(pytest.approx(rate), pytest.approx(rate)) for rate in (0.005, 0.01, 0.01, 0.005)]


def test_nfe_is_counted(tiny: SD3) -> None:
    recipe = flow_grpo(window=2, window_reach=0.25)  # starts at step 0, so there is no shared prefix
    result = next(toy_trainer(tiny, recipe).rounds())
    sampling, training, reference = 8 * 4, 8 * 2, 4
    assert result.samples == 8
    assert result.nfe == sampling + training + reference


def test_windows_follow_from_the_seed_and_avoid_the_last_step(tiny: SD3) -> None:
    recipe = flow_grpo(window=2, window_reach=1.0)
    grid = SAMPLING.grid(tiny)
    assert {recipe.steps(FlowPath(), grid, index, seed=0) for index in range(50)} == {(0, 1), (1, 2)}
    assert recipe.steps(FlowPath(), grid, 7, seed=0) == recipe.steps(FlowPath(), grid, 7, seed=0)
    assert flow_grpo().steps(FlowPath(), grid, 0, 0) == (0, 1, 2)


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"training\.max_failed_fraction must be in \[0, 1\], not 1\.5"):
        TrainerSettings(max_failed_fraction=1.5)
    with pytest.raises(ValueError, match=r"sampling\.sigmas has 2 values for 10 steps: give one per step"):
        Sampling(sigmas=(1.0, 0.5))


def test_adam_in_eight_bits(tiny: SD3, tiny_folder: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="the extra genalign[memory] is not installed")
    settings = replace(SETTINGS, optimizer="adamw8bit")
    trainer = toy_trainer(tiny, flow_grpo(window=2, shared_noise=False), settings=settings)
    before = weights(trainer)
    list(trainer.rounds())
    assert any(not torch.equal(old, new) for old, new in zip(before, weights(trainer), strict=True))
    assert type(trainer.learner.optimizer).__name__ == "AdamW8bit"
    tensors = optimizer_tensors(trainer.learner.optimizer)
    again = toy_trainer(SD3.load(tiny_folder), flow_grpo(window=2), settings=settings)
    load_optimizer_tensors(again.optimizer, tensors)
    restored = optimizer_tensors(again.optimizer)
    assert all(torch.equal(restored[name], tensor) for name, tensor in tensors.items())


def test_functions_and_texts_are_enough(tiny: SD3) -> None:
    def blueness(samples: Tensor, prompts: Sequence[str]) -> Tensor:
        return torch.stack(
            [sample[2].mean() * len(prompt.split()) for sample, prompt in zip(samples, prompts, strict=True)]
        )

    rewards = {"red": redness, "blue": blueness}
    settings = TrainerSettings(rounds=1, group_size=2)
    policy = Policy(tiny.denoiser, Lora(rank=2))
    trainer = Trainer(tiny, policy, rewards, ["a cat", "a dog", "two birds"], flow_grpo(window=1), settings, SAMPLING)
    (result,) = trainer.rounds()
    assert set(result.rewards) == {"red", "blue"} and result.samples == 4
    assert result.reward == pytest.approx(sum(result.rewards.values()), rel=1e-5)


def test_the_averaged_adapter_is_saved_for_diffusers(tiny: SD3, tiny_folder: Path, tmp_path: Path) -> None:
    trainer = toy_trainer(tiny, flow_grpo(window=2, shared_noise=False))
    list(trainer.rounds())
    trainer.save(str(tmp_path / "mine"))
    pipe = StableDiffusion3Pipeline.from_pretrained(tiny_folder)
    pipe.load_lora_weights(tmp_path / "mine" / "lora")
    loaded = {name: p for name, p in pipe.transformer.named_parameters() if "lora_" in name}
    with trainer.policy.averaged():
        trained = {name: p for name, p in tiny.denoiser.named_parameters() if "lora_" in name}
        expected = {name.replace(".default.", ".default_0."): p.detach().clone() for name, p in trained.items()}
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name].detach(), expected[name]) for name in expected)
    assert next((tmp_path / "mine" / "peft").rglob("adapter_config.json"))


def test_a_pipeline_that_cannot_write_weights_is_named(tiny: SD3, tmp_path: Path) -> None:
    trainer = toy_trainer(tiny, flow_grpo())
    trainer.pipeline.pipeline = Mock(spec=["path"])
    with pytest.raises(TypeError, match="Mock has no save_lora and save_denoiser: train a pipeline that defines them"):
        trainer.save(tmp_path)
