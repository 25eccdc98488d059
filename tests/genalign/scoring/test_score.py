"""Rewards that fail, and how."""

from __future__ import annotations

import json
import logging
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor

from genalign.scoring.score import NamedReward, RewardError, RewardMonitor, named, probe, score
from genalign.types import Prompt, RewardFunction
from rewards.adapters import Adapted

IMAGES = torch.rand(4, 3, 8, 8)
PROMPTS = [Prompt("a circle")] * 4


def brightness(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return samples.flatten(1).mean(1)


def raising(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    raise ConnectionError("server gone")


def half(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return torch.tensor([1.0, torch.nan, torch.inf, 0.0])


def scores_of(function: RewardFunction, **settings: Any) -> Tensor:
    return score([NamedReward("r", function, **settings)], IMAGES, PROMPTS)[:, 0]


def test_failures_are_nan_and_never_zero(caplog: pytest.LogCaptureFixture) -> None:
    rewards = [NamedReward("a", brightness), NamedReward("b", raising), NamedReward("c", half)]
    scores = score(rewards, IMAGES, PROMPTS)
    assert scores.shape == (4, 3)
    torch.testing.assert_close(scores[:, 0], brightness(IMAGES, PROMPTS))
    assert bool(scores[:, 1].isnan().all())
    assert scores[:, 2].isnan().tolist() == [False, True, True, False]
    failure = f"reward 'b' raised ConnectionError: server gone (test_score.py:{raising.__code__.co_firstlineno + 1})"
    assert f"{failure}; calling it again" in caplog.text and f"{failure}; 4 scores are NaN" in caplog.text


@pytest.mark.parametrize("level", [logging.INFO, logging.DEBUG])  # --debug sets the latter
def test_a_failure_is_logged_with_its_traceback_on_request(level: int, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(level, "genalign"):
        scores_of(raising)
    assert ("Traceback" in caplog.text) == (level == logging.DEBUG)


@pytest.mark.parametrize(
    ("wrong", "score_batch", "message"),
    [
        (torch.zeros(4, 1), None, r"shape \(4, 1\) for 4 samples: return one score .*, a tensor of shape \(4,\)"),
        (torch.tensor(0.0), 1, r"shape \(\) for 1 samples"),
        ([0.0] * 4, None, r"list: return a tensor of shape \(B,\)"),
        (torch.zeros(4, dtype=torch.cfloat), None, "complex numbers: return real ones"),
        (
            torch.zeros(4, device="meta"),
            None,
            "a tensor without values, on the meta device: load its weights on a real",
        ),
    ],
)
def test_wrong_shape_is_refused(wrong: Any, score_batch: int | None, message: str) -> None:
    with pytest.raises(RewardError, match=f"reward 'r' returned {message}"):
        scores_of(lambda samples, prompts: wrong, score_batch=score_batch)


def test_an_async_function_is_refused_without_a_warning() -> None:
    async def later(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return brightness(samples, prompts)

    with pytest.raises(RewardError, match=r"reward 'r' is an async function: wrap it in rewards.adapters.Adapted"):
        scores_of(later)


def test_a_reward_in_numpy_cannot_be_followed_by_its_gradient() -> None:
    reward = NamedReward("mine", lambda samples, prompts: torch.from_numpy(samples.numpy().mean((1, 2, 3))))
    assert reward(IMAGES, PROMPTS).shape == (4,)
    with pytest.raises(
        RewardError, match=r"reward 'mine' has no gradient, .*: use another strategy or recipe, or torch opera"
    ):
        reward(IMAGES.clone().requires_grad_(), PROMPTS)


def parsed(images: Sequence[Any], prompts: Sequence[str]) -> list[float]:
    return json.loads("not JSON")


async def parsed_later(images: Sequence[Any], prompts: Sequence[str]) -> list[float]:
    return parsed(images, prompts)


def multiplied(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return torch.nn.functional.linear(samples, torch.zeros(3, 5))


@pytest.mark.parametrize(
    ("reward", "line"),
    [
        (raising, "server gone"),
        (multiplied, "functional.linear"),  # and not torch's line below it
        (Adapted(parsed), "json.loads"),  # and not the standard library's line
        (Adapted(parsed_later), "json.loads"),
    ],
)
def test_a_failure_names_the_users_line(reward: RewardFunction, line: str) -> None:
    number = next(n for n, text in enumerate(Path(__file__).read_text().split("\n"), start=1) if line in text)
    with pytest.raises(RewardError, match=rf"\(test_score.py:{number}\)$"):
        probe([NamedReward("r", reward)], IMAGES, PROMPTS)


def test_a_failure_within_an_installed_package_names_its_line() -> None:
    reward = Adapted(torchvision.transforms.functional.rotate)
    with pytest.raises(RewardError, match=r"\(torchvision/transforms/\w+.py:\d+\)$"):
        probe([NamedReward("r", reward)], IMAGES, PROMPTS)


def test_probe_refuses_a_broken_reward() -> None:
    probe([NamedReward("fine", brightness), NamedReward("partly", half)], IMAGES, PROMPTS)
    with pytest.raises(RewardError, match="reward 'r' failed on a first batch: ConnectionError: server gone"):
        probe([NamedReward("r", raising)], IMAGES, PROMPTS)
    with pytest.raises(RewardError, match="reward 'n' scored none of 4 first samples: all are NaN"):
        probe([NamedReward("n", lambda samples, prompts: torch.full((4,), torch.nan))], IMAGES, PROMPTS)
    with pytest.raises(RewardError, match="reward 'i' is a int: give something callable"):
        probe([NamedReward("i", 3)], IMAGES, PROMPTS)


@pytest.mark.parametrize("score_batch", [None, 1, 3, 4, 9])
def test_score_batch_changes_no_score(score_batch: int | None) -> None:
    sizes: list[int] = []

    def prompted(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        sizes.append(len(samples))
        return brightness(samples, prompts) + torch.tensor([float(prompt.text) for prompt in prompts])

    reward, prompts = NamedReward("r", prompted, score_batch=score_batch), [Prompt(str(i)) for i in range(4)]
    scores = score([reward], IMAGES, prompts)[:, 0]
    torch.testing.assert_close(scores, brightness(IMAGES, prompts) + torch.arange(4), rtol=0, atol=0)
    assert max(sizes) <= (score_batch or 4) and sum(sizes) == 4
    probe([reward], IMAGES, prompts)


def test_score_batch_preserves_the_gradient() -> None:
    samples = IMAGES.clone().requires_grad_()
    whole, parts = NamedReward("r", brightness), NamedReward("r", brightness, score_batch=3)
    gradients = [torch.autograd.grad(reward(samples, PROMPTS).square().sum(), samples)[0] for reward in (whole, parts)]
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_single_failure_loses_no_score() -> None:
    sizes: list[int] = []

    def flaky(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        sizes.append(len(samples))
        return raising(samples, prompts) if len(sizes) == 1 else brightness(samples, prompts)

    torch.testing.assert_close(scores_of(flaky), brightness(IMAGES, PROMPTS))
    assert sizes == [4, 4]


@pytest.mark.parametrize(("score_batch", "lost"), [(None, [0, 1, 2, 3]), (1, [2]), (4, [2])])
def test_failing_sample_loses_only_its_own_score_where_batches_may_be_split(
    score_batch: int | None, lost: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    def refuses_third(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        if any(torch.equal(sample, IMAGES[2]) for sample in samples):
            raise ValueError("not this one")
        return brightness(samples, prompts)

    scores = scores_of(refuses_third, score_batch=score_batch)
    assert scores.isnan().nonzero()[:, 0].tolist() == lost
    assert re.search(rf"raised ValueError: not this one \(test_score.py:\d+\); {len(lost)} scores are NaN", caplog.text)


def test_call_past_its_timeout_has_failed(caplog: pytest.LogCaptureFixture) -> None:
    release, calls = threading.Event(), []

    def hanging(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        calls.append(torch.is_grad_enabled())
        if len(calls) < 3:
            release.wait()
        return brightness(samples, prompts)

    scores = scores_of(hanging, score_batch=2, timeout=0.05)
    release.set()
    assert scores.isnan().tolist() == [True, True, False, False]
    assert calls == [False, False, False]  # a call that hangs is not split
    assert "reward 'r' raised TimeoutError: no scores within 0.05 s; 2 scores are NaN" in caplog.text


def test_invalid_reward_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="timeout of reward 'x' must be positive, in seconds, not 0"):
        NamedReward("x", brightness, timeout=0)
    for endless in (torch.nan, torch.inf, 1e10):  # Python's locks wait for 292 years at most
        with pytest.raises(ValueError, match=f"not {re.escape(str(endless))}; none waits for any call"):
            NamedReward("x", brightness, timeout=endless)
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
    message = (
        r"75% of .* could not be scored \(training\.max_failed_fraction is 5%\): .* or it returned NaN.* resume from"
    )
    with pytest.raises(RewardError, match=message):
        RewardMonitor().see_scores(scores)
    RewardMonitor(max_failed_fraction=0.75).see_scores(scores)


def test_rounds_without_signal_warn_once_and_then_stop(caplog: pytest.LogCaptureFixture) -> None:
    monitor, patient = RewardMonitor(max_rounds_without_credit=3), RewardMonitor(max_rounds_without_credit=None)
    for without_credit in (True, True, False, True, True):  # a round with signal starts the count again
        monitor.see_round(without_credit)
    assert caplog.text.count("nothing to learn from") == 2
    message = r"for 3 rounds no sample had credit \(training\.max_rounds_without_credit\), .*: use a reward"
    with pytest.raises(RewardError, match=message):
        monitor.see_round(without_credit=True)
    for _ in range(50):
        patient.see_round(without_credit=True)
    assert patient.rounds_without_credit == 50
