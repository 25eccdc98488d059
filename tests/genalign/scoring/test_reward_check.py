"""Faulty rewards: each fails the check that names its fault, and no other."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from genalign.cli.reward import RewardCheck, load_samples
from genalign.scoring.reward_check import Check, Expected, Probe, check
from genalign.types import Prompt, RewardFunction
from rewards.clip import ClipReward
from rewards.shapes import ShapesReward


@pytest.fixture(scope="module")
def probe() -> Probe:
    samples, prompts, _ = load_samples(RewardCheck(lambda: None, "shapes:val"))
    return Probe(samples, prompts)


def weights(prompts: Sequence[Prompt]) -> Tensor:
    """A different mixture (B, 3, 1, 1) of the channels for each prompt."""
    generators = [torch.Generator().manual_seed(sum(prompt.text.encode())) for prompt in prompts]
    return torch.stack([torch.rand(3, 1, 1, generator=generator) for generator in generators])


def mean(samples: Tensor) -> Tensor:
    return samples.flatten(1).mean(1)


def good(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """Differentiable, prompted, NaN for NaN."""
    return mean(samples.square() * weights(prompts))


def normalized(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    scores = good(samples, prompts)
    return scores - scores.nanmean()


def leaking(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    scores = good(samples, prompts)
    torch.set_grad_enabled(False)
    return scores


def retyping(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    torch.set_default_dtype(torch.float64)
    return good(samples, prompts)


def raising_for_nan(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    if bool(samples.isnan().any()):
        raise ValueError("NaN")
    return good(samples, prompts)


FAULTY: dict[str, tuple[RewardFunction, Expected, str, str]] = {
    "reversed": (lambda x, p: good(x, p).flip(0), Expected(), "order", "in the order of the samples"),
    "normalized": (normalized, Expected(), "batches", "no statistics of the batch"),
    "squeezed": (lambda x, p: good(x, p).squeeze(), Expected(), "batches", "keep the batch dimension"),
    "noisy": (lambda x, p: good(x, p) + 0.1 * torch.randn(len(x)), Expected(), "determinism", "eval mode"),
    "half detached": (lambda x, p: good(x, p) + mean(x.detach()), Expected(), "gradient", "look for what is detached"),
    "blind": (lambda x, p: mean(x), Expected(prompts=True), "sensitivity", "higher for the right prompt"),
    "in place": (lambda x, p: good(x.mul_(0.5), p), Expected(), "side effects", "work on a copy"),
    "leaking": (leaking, Expected(), "side effects", "use torch.no_grad()"),
    "retyping": (retyping, Expected(), "side effects", "set no defaults"),
    "zero for NaN": (lambda x, p: good(x.nan_to_num(), p), Expected(), "unscorable", "return NaN"),
    "raising for NaN": (raising_for_nan, Expected(), "unscorable", "return NaN"),
    "spoiled by NaN": (lambda x, p: good(x, p) + 0 * x.detach().sum(), Expected(), "unscorable", "score the others"),
    "constant": (lambda x, p: 0.5 + 0 * good(x, p), Expected(), "sensitivity", "scores that vary"),
    "nothing": (lambda x, p: torch.full((len(x),), torch.nan), Expected(), "sensitivity", "needs of a prompt"),
    "rough": (lambda x, p: x.flatten(1).std(1), Expected(degradation=True), "degradation", "quality raise the score"),
}


def failed(checks: Iterable[Check]) -> list[str]:
    return [one.name for one in checks if one.passed is False]


def measured(checks: Iterable[Check], name: str) -> str:
    return next(one.measured for one in checks if one.name == name)


def in_numpy(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """The usual reward of users: it computes in NumPy, which takes no tensor with a gradient."""
    array = samples.cpu().numpy()
    return torch.from_numpy((array * weights(prompts).numpy()).mean((1, 2, 3)))


def through_dlpack(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return torch.from_numpy(np.from_dlpack(samples).mean((1, 2, 3)))


def test_good_reward_passes(probe: Probe) -> None:
    checks = list(check(good, probe, Expected(gradient=True)))
    assert failed(checks) == [] and all(one.measured for one in checks)
    assert [one.name for one in checks if one.passed is None] == ["degradation"]


@pytest.mark.parametrize(("reward", "expected", "name", "advice"), FAULTY.values(), ids=FAULTY)
def test_fault_fails_its_own_check_alone(
    probe: Probe, reward: RewardFunction, expected: Expected, name: str, advice: str
) -> None:
    (failure,) = [one for one in check(reward, probe, expected) if one.passed is False]
    assert failure.name == name and advice in failure.advice
    assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32


async def awaited(count: int) -> Tensor:
    return torch.zeros(count)


@pytest.mark.parametrize(
    ("returned", "problem"),
    [
        (lambda n: [0.0] * n, "a list"),
        (lambda n: torch.zeros(n, 1), "float32 of shape (8, 1) for 8 samples"),
        (lambda n: torch.zeros(n, dtype=torch.long), "int64 of shape (8,)"),
        (lambda n: torch.full((n,), torch.inf), "8 infinite"),
        (lambda n: {}[n], "raised KeyError: 8 (test_reward_check.py:"),
        (lambda n: torch.zeros(n, dtype=torch.cfloat), "complex64 of shape (8,)"),
        (lambda n: torch.zeros(n, device="meta"), "a tensor on the meta device"),
        (lambda n: awaited(n), "a coroutine"),
    ],
)
def test_unusable_result_ends_the_checks(probe: Probe, returned, problem: str) -> None:
    (only,) = check(lambda samples, prompts: returned(len(samples)), probe)
    assert (only.name, only.passed) == ("result", False)
    assert problem in only.measured and "(B,)" in only.advice


@pytest.mark.parametrize("reward", [in_numpy, through_dlpack])
def test_a_reward_in_numpy_has_no_gradient_and_passes(probe: Probe, reward: RewardFunction) -> None:
    checks = list(check(reward, probe))
    assert failed(checks) == []
    assert "none: a black-box reward" in measured(checks, "gradient")
    assert failed(check(reward, probe, Expected(gradient=True))) == ["gradient"]


def test_a_loudness_meter_in_numpy_passes() -> None:
    waves = torch.randn(4, 1, 800, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 5).view(-1, 1, 1) / 10

    def loudness(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return torch.tensor([float(np.log10(np.square(wave.numpy().T).mean())) for wave in samples])

    assert failed(check(loudness, Probe(waves, [Prompt(f"clip {n}") for n in range(4)]))) == []


def test_maxima_that_tie_on_flat_areas_are_no_false_alarm() -> None:
    """As in LPIPS: an edge's pixel differs from its neighbors, and all pixels of a flat area are its maximum."""
    flat = torch.linspace(0.1, 0.9, 8).view(8, 1, 1, 1).expand(8, 3, 32, 32).clone()
    flat[:, :, 8:24, 8:24] += 0.05
    kernel = torch.randn(8, 3, 3, 3, generator=torch.Generator().manual_seed(0))

    def pooled(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        features = F.max_pool2d(F.conv2d(samples, kernel).relu(), 3, 2)
        return -mean(F.max_pool2d(F.conv2d(features, kernel.flip(1).repeat(1, 3, 1, 1)[:, :8]).relu(), 3, 2))

    checks = list(check(pooled, Probe(flat, [Prompt(f"level {n}") for n in range(8)]), Expected(gradient=True)))
    assert failed(checks) == []


def test_a_fault_that_shows_only_with_a_gradient_is_a_failure(probe: Probe) -> None:
    def in_place(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        scores = good(samples, prompts)
        if samples.requires_grad:
            raise RuntimeError("one of the variables has been modified by an inplace operation")
        return scores

    checks = list(check(in_place, probe))
    assert failed(checks) == ["gradient"]
    assert re.search(r"modified by an inplace operation \(test_reward_check.py:\d+\)", measured(checks, "gradient"))


def test_shapes_verifier_passes(probe: Probe) -> None:
    checks = list(check(ShapesReward("partial"), probe, Expected(prompts=True)))
    assert failed(checks) == [] and "none: a black-box reward" in measured(checks, "gradient")


@pytest.mark.slow
def test_embedded_clip_passes(probe: Probe) -> None:
    assert failed(check(ClipReward("shapes-clip"), probe, Expected(prompts=True, gradient=True))) == []


def test_waveforms_are_checked() -> None:
    time = torch.linspace(0, 0.25, 2000)
    tones = (110, 220, 330, 440, 550)
    waves = torch.stack([0.5 * torch.sin(2 * torch.pi * hertz * time) for hertz in tones])[:, None]
    tone_probe = Probe(waves, [Prompt(f"a tone of {hertz} Hz") for hertz in tones])
    assert failed(check(lambda x, p: -mean(x.diff(dim=-1).square()), tone_probe, Expected(gradient=True))) == []


def test_probe_needs_four_samples_of_different_prompts(probe: Probe) -> None:
    with pytest.raises(ValueError, match="at least 4 images"):
        Probe(probe.samples[:3], probe.prompts[:3])
    with pytest.raises(ValueError, match="prompts that differ"):
        replace(probe, prompts=[Prompt("same")] * 8)
