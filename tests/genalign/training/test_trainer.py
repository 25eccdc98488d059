"""The loop on the tiny pipeline."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from genalign.algorithms.recipes import Recipe, awm, flow_grpo, prdp
from genalign.diffusion.policy import Lora, Policy
from genalign.diffusion.rollout import Rollout, rollout
from genalign.diffusion.sampling import Sampling
from genalign.diffusion.transitions import CPS, ODE, FlowSDE, Kernel
from genalign.runtime.optimizer_state import load_optimizer_tensors, optimizer_tensors
from genalign.scoring.score import NamedReward
from genalign.training.trainer import RoundResult, Trainer, TrainerSettings
from genalign.types import Prompt, PromptSet
from pipelines import SD3

PROMPTS = PromptSet("two", (Prompt("a circle"), Prompt("two squares")))
SETTINGS = TrainerSettings(
    rounds=2, prompts_per_round=2, group_size=4, batch_size=4, updates_per_round=2, learning_rate=1e-2, weight_decay=0.0
)
TOLERANT = replace(SETTINGS, max_failed_fraction=0.5)
SAMPLING = Sampling(num_steps=4, sigmas=(1.0, 0.75, 0.5, 0.25))
LORA = Lora(rank=4, alpha=8)


def redness(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return samples[:, 0].flatten(1).mean(1) - samples[:, 1:].flatten(1).mean(1)


def constant(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return torch.ones(len(samples))


def _trainer(tiny: SD3, reward: NamedReward, recipe: Recipe, settings: TrainerSettings = SETTINGS) -> Trainer:
    policy = Policy(tiny.denoiser, LORA, seed=settings.seed)
    return Trainer(tiny, policy, [reward], PROMPTS, recipe, settings, SAMPLING)


def _weights(trainer: Trainer) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in trainer.policy.parameters]


@pytest.mark.parametrize("kernel", [FlowSDE(0.7), CPS(0.8)])
def test_a_reward_rises(tiny: SD3, kernel: Kernel) -> None:
    recipe = flow_grpo(kernel, window=2, clip_range=1e-2, shared_noise=False)
    settings = replace(SETTINGS, rounds=30, group_size=8, batch_size=8, learning_rate=3e-2)
    results = list(_trainer(tiny, NamedReward("red", redness), recipe, settings).rounds())
    first, last = (sum(result.reward for result in part) / 5 for part in (results[:5], results[-5:]))
    spread = results[0].reward_std
    assert last > first + spread


def test_the_first_update_is_on_policy(tiny: SD3, caplog: pytest.LogCaptureFixture) -> None:
    for result in _trainer(tiny, NamedReward("red", redness), flow_grpo(window=2)).rounds():
        assert result.log_ratio_max == 0.0
    assert "disagree" not in caplog.text


def test_equal_scores_leave_the_weights_alone(tiny: SD3) -> None:
    trainer = _trainer(tiny, NamedReward("one", constant), flow_grpo())
    before = _weights(trainer)
    result = next(trainer.rounds())
    assert result.zero_std_share == 1.0 and math.isnan(result.loss) and result.as_dict()["loss"] is None
    assert "forward backward" not in result.calls  # nothing was replayed
    for old, new in zip(before, _weights(trainer), strict=True):
        assert torch.equal(old, new)


def test_kl_is_zero_at_the_start_and_grows(tiny: SD3) -> None:
    recipe = flow_grpo(window=2, clip_range=1e-2, kl=0.01)
    first, *_, last = _trainer(tiny, NamedReward("red", redness), recipe, replace(SETTINGS, rounds=4)).rounds()
    assert last.kl > first.kl >= 0.0


def test_samples_that_could_not_be_scored_are_left_out(tiny: SD3) -> None:
    def sometimes(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        scores = redness(samples, prompts)
        scores[0] = torch.nan
        return scores

    result = next(_trainer(tiny, NamedReward("r", sometimes), flow_grpo(window=1), TOLERANT).rounds())
    assert result.failed_rewards == 2  # one of each batch of four
    assert result.as_dict()["reward"] is not None


@pytest.mark.parametrize("recipe", [flow_grpo(window=1), prdp(window=1), awm()], ids=["flow_grpo", "prdp", "awm"])
def test_a_sample_that_overflowed_does_not_spoil_the_others(
    tiny: SD3, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overflowing(*arguments: Any, **options: Any) -> Rollout:
        made = rollout(*arguments, **options)
        made.final[0] = torch.inf
        made.x_next[0] = torch.nan
        return made

    monkeypatch.setattr("genalign.training.sampler.rollout", overflowing)
    trainer = _trainer(tiny, NamedReward("red", redness), recipe, TOLERANT)
    before = _weights(trainer)
    result = next(trainer.rounds())
    after = _weights(trainer)
    assert result.failed_rewards == 2  # one of each batch of four
    assert all(weight.isfinite().all() for weight in after)
    assert not all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_runs_are_reproducible(tiny_folder: object) -> None:
    def run(seed: int) -> tuple[list[RoundResult], list[Tensor]]:
        trainer = _trainer(
            SD3.load(str(tiny_folder)), NamedReward("red", redness), flow_grpo(window=2), replace(SETTINGS, seed=seed)
        )
        return list(trainer.rounds()), _weights(trainer)

    (results, weights), (again, same), (other, _) = run(0), run(0), run(1)
    assert [replace(r, seconds=0.0) for r in results] == [replace(r, seconds=0.0) for r in again]
    assert all(torch.equal(a, b) for a, b in zip(weights, same, strict=True))
    assert results[0].reward != other[0].reward


def test_forwards_are_counted(tiny: SD3) -> None:
    recipe = flow_grpo(window=2, window_reach=0.25)  # begins at step 0, so there is no shared prefix
    result = next(_trainer(tiny, NamedReward("red", redness), recipe).rounds())
    sampling, training, reference = 8 * 4, 8 * 2, 4
    assert result.samples == 8
    assert result.nfe == sampling + training + reference


def test_windows_are_the_same_for_everybody_and_avoid_the_last_step(tiny: SD3) -> None:
    recipe = flow_grpo(window=2, window_reach=1.0)
    grid = SAMPLING.grid(tiny)
    windows = {recipe.steps(grid, index, seed=0) for index in range(50)}
    assert windows == {(0, 1), (1, 2)}
    assert recipe.steps(grid, 7, seed=0) == recipe.steps(grid, 7, seed=0)
    assert flow_grpo().steps(grid, 0, 0) == (0, 1, 2)


def test_impossible_recipes(tiny: SD3) -> None:
    grid = SAMPLING.grid(tiny)
    with pytest.raises(ValueError, match=r"ODE.* has no trainable step .* needs a stochastic kernel, such as FlowSDE"):
        flow_grpo(ODE()).steps(grid, 0, 0)
    with pytest.raises(ValueError, match=r"recipe\.window is 4 steps, but only steps \[0, 1, 2\] of 4 can be trained"):
        flow_grpo(window=4).steps(grid, 0, 0)
    with pytest.raises(ValueError, match=r"recipe\.window must be at least 1 step, not 0; null trains every step"):
        flow_grpo(window=0)


def test_impossible_geometry() -> None:
    with pytest.raises(ValueError, match="group_size is 1: a group needs at least 2 samples to compare"):
        TrainerSettings(group_size=1)
    with pytest.raises(ValueError, match=r"batch_size 96 must be a multiple of group_size 10, .* try 90"):
        TrainerSettings(group_size=10, batch_size=96)
    message = r"prompts_per_round 3 x group_size 8 = 24 samples do not divide into 2 updates of batches of 8"
    with pytest.raises(ValueError, match=message):
        TrainerSettings(prompts_per_round=3, group_size=8, batch_size=8)
    with pytest.raises(ValueError, match=r"sampling\.sigmas has 2 values for 10 steps: give one per step"):
        Sampling(sigmas=(1.0, 0.5))


def test_adam_in_eight_bits(tiny: SD3, tiny_folder: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="the extra genalign[memory] is not installed")
    settings = replace(SETTINGS, optimizer="adamw8bit")
    trainer = _trainer(tiny, NamedReward("red", redness), flow_grpo(window=2, shared_noise=False), settings)
    before = _weights(trainer)
    list(trainer.rounds())
    assert any(not torch.equal(old, new) for old, new in zip(before, _weights(trainer), strict=True))
    assert type(trainer.optimizer).__name__ == "AdamW8bit"
    tensors = optimizer_tensors(trainer.optimizer)
    again = _trainer(SD3.load(tiny_folder), NamedReward("red", redness), flow_grpo(window=2), settings)
    load_optimizer_tensors(again.optimizer, tensors)
    restored = optimizer_tensors(again.optimizer)
    assert all(torch.equal(restored[name], tensor) for name, tensor in tensors.items())
