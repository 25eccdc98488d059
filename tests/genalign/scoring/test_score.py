"""Rewards that fail, and how."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from genalign.scoring.score import NamedReward, RewardError, RewardMonitor, named, probe, score
from genalign.types import Prompt

IMAGES = torch.rand(4, 3, 8, 8)
PROMPTS = [Prompt("a circle")] * 4


def brightness(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return samples.flatten(1).mean(1)


def raising(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    raise ConnectionError("server gone")


def half(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return torch.tensor([1.0, torch.nan, torch.inf, 0.0])


def refuses_dark(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    if bool((samples == 0).flatten(1).all(1).any()):
        raise ValueError("too dark")
    return brightness(samples, prompts)


def test_failures_are_nan_and_never_zero(caplog: pytest.LogCaptureFixture) -> None:
    rewards = [NamedReward("a", brightness), NamedReward("b", raising), NamedReward("c", half)]
    scores = score(rewards, IMAGES, PROMPTS)
    assert scores.shape == (4, 3)
    torch.testing.assert_close(scores[:, 0], IMAGES.flatten(1).mean(1))
    assert bool(scores[:, 1].isnan().all())
    assert scores[:, 2].isnan().tolist() == [False, True, True, False]
    assert "reward 'b' raised ConnectionError: server gone; calling it again" in caplog.text
    assert "reward 'b' raised ConnectionError: server gone; 4 scores are NaN" in caplog.text


def test_a_wrong_shape_is_refused() -> None:
    message = r"reward 'x' returned shape \(4, 1\) for 4 samples: return one score per sample, a tensor of shape \(4,\)"
    with pytest.raises(RewardError, match=message):
        score([NamedReward("x", lambda samples, prompts: torch.zeros(4, 1))], IMAGES, PROMPTS)
    with pytest.raises(RewardError, match=r"reward 'x' returned shape \(\) for 1 samples"):
        score([NamedReward("x", lambda samples, prompts: samples.mean(), score_batch=1)], IMAGES, PROMPTS)
    with pytest.raises(RewardError, match=r"reward 'x' returned list: return a tensor of shape \(B,\)"):
        score([NamedReward("x", lambda samples, prompts: [0.0] * 4)], IMAGES, PROMPTS)


def test_the_probe_says_what_is_wrong() -> None:
    probe([NamedReward("fine", brightness), NamedReward("partly", half)], IMAGES, PROMPTS)
    with pytest.raises(RewardError, match="reward 'r' raised ConnectionError on a first batch: server gone"):
        probe([NamedReward("r", raising)], IMAGES, PROMPTS)
    with pytest.raises(RewardError, match="reward 'n' scored none of 4 first samples: all are NaN"):
        probe([NamedReward("n", lambda samples, prompts: torch.full((4,), torch.nan))], IMAGES, PROMPTS)
    with pytest.raises(RewardError, match="reward 'i' is a int: give something callable"):
        probe([NamedReward("i", 3)], IMAGES, PROMPTS)


@pytest.mark.parametrize("score_batch", [None, 1, 3, 4, 9])
def test_parts_change_no_score(score_batch: int | None) -> None:
    sizes: list[int] = []

    def told_apart(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        sizes.append(len(samples))
        return samples.flatten(1).mean(1) + torch.tensor([float(prompt.text) for prompt in prompts])

    reward = NamedReward("r", told_apart, score_batch=score_batch)
    prompts = [Prompt(str(i)) for i in range(4)]
    expected = IMAGES.flatten(1).mean(1) + torch.arange(4)
    torch.testing.assert_close(score([reward], IMAGES, prompts), expected[:, None], rtol=0, atol=0)
    assert max(sizes) <= (score_batch or 4) and sum(sizes) == 4
    probe([reward], IMAGES, prompts)


def test_parts_keep_the_gradient() -> None:
    samples = IMAGES.clone().requires_grad_()
    whole, parts = NamedReward("r", brightness), NamedReward("r", brightness, score_batch=3)
    gradients = [torch.autograd.grad(reward(samples, PROMPTS).square().sum(), samples)[0] for reward in (whole, parts)]
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_what_raises_once_costs_nothing() -> None:
    calls: list[int] = []

    def flaky(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        calls.append(len(samples))
        if len(calls) == 1:
            raise ConnectionError("a moment")
        return brightness(samples, prompts)

    torch.testing.assert_close(score([NamedReward("r", flaky)], IMAGES, PROMPTS)[:, 0], brightness(IMAGES, PROMPTS))
    assert calls == [4, 4]


@pytest.mark.parametrize(("score_batch", "lost"), [(None, [0, 1, 2, 3]), (1, [2]), (4, [2])])
def test_a_failing_sample_loses_its_own_score_alone_where_batches_may_be_split(
    score_batch: int | None, lost: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    samples = IMAGES.clone()
    samples[2] = 0
    scores = score([NamedReward("r", refuses_dark, score_batch=score_batch)], samples, PROMPTS)[:, 0]
    assert scores.isnan().nonzero()[:, 0].tolist() == lost
    assert f"reward 'r' raised ValueError: too dark; {len(lost)} scores are NaN" in caplog.text


def test_a_call_that_hangs_has_failed(caplog: pytest.LogCaptureFixture) -> None:
    answer, calls = threading.Event(), []

    def hanging(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        calls.append(torch.is_grad_enabled())
        if len(calls) < 3:
            answer.wait()
        return brightness(samples, prompts)

    reward = NamedReward("slow", hanging, score_batch=2, timeout=0.05)
    scores = score([reward], IMAGES, PROMPTS)[:, 0]
    answer.set()
    assert scores.isnan().tolist() == [True, True, False, False]
    assert calls == [False, False, False]  # a call that hangs is not split
    assert "reward 'slow' raised TimeoutError: no scores within 0.05 s; 2 scores are NaN" in caplog.text


def test_settings_of_a_reward_are_checked() -> None:
    with pytest.raises(ValueError, match="timeout of reward 'x' must be positive, in seconds, not 0"):
        NamedReward("x", brightness, timeout=0)
    with pytest.raises(ValueError, match="score_batch of reward 'x' must be at least 1 sample, not 0"):
        NamedReward("x", brightness, score_batch=0)


def test_rewards_are_named() -> None:
    reward = NamedReward("mine", brightness, 2.0, 3)
    assert named(reward) == [reward] == named([reward])
    assert [one.name for one in named({"a": brightness, "b": half})] == ["a", "b"]
    assert named(brightness) == [NamedReward("reward", brightness)]


def test_rewards_of_very_different_spread_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    scores = torch.tensor([[0.0, 100.0, 5.0], [1.0, 200.0, 5.0], [torch.nan, 0.0, 5.0]])
    rewards = [NamedReward("small", brightness), NamedReward("large", brightness), NamedReward("still", brightness)]
    RewardMonitor().compare([rewards[0], NamedReward("large", brightness, 0.01), rewards[2]], scores)
    assert caplog.text == ""
    RewardMonitor().compare(rewards, scores)
    assert "reward 'large' varies 163 times as much as 'small', which will hardly count: lower" in caplog.text


def test_too_many_failures_stop_the_run() -> None:
    scores = torch.tensor([[1.0], [torch.nan], [torch.nan], [torch.nan]])
    message = r"75% of this round's samples could not be scored \(training\.max_failed_fraction is 5%\): .* resume from"
    with pytest.raises(RewardError, match=message):
        RewardMonitor().see(scores, silent=False)
    RewardMonitor(max_failed_fraction=0.75).see(scores, silent=False)


def test_rounds_without_signal_warn_once_and_then_stop(caplog: pytest.LogCaptureFixture) -> None:
    scores = torch.ones(4, 1)
    monitor = RewardMonitor(silent_rounds=2)
    for silent in (True, False, True, False):  # a round with signal starts the count again
        monitor.see(scores, silent)
    caplog.clear()
    monitor = RewardMonitor(silent_rounds=3)
    monitor.see(scores, silent=True)
    monitor.see(scores, silent=True)
    assert caplog.text.count("nothing to learn from") == 1
    with pytest.raises(RewardError, match="for 3 rounds every group had equal scores: use a reward with partial"):
        monitor.see(scores, silent=True)
