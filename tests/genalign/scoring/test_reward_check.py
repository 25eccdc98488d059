"""Faulty rewards: each fails the check that names its fault, and no other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import pytest
import torch
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


@pytest.mark.parametrize(
    ("returned", "measured"),
    [
        (lambda n: [0.0] * n, "a list"),
        (lambda n: torch.zeros(n, 1), "float32 of shape (8, 1) for 8 samples"),
        (lambda n: torch.zeros(n, dtype=torch.long), "int64 of shape (8,)"),
        (lambda n: torch.full((n,), torch.inf), "8 infinite"),
        (lambda n: {}[n], "raised KeyError: 8"),
    ],
)
def test_unusable_result_ends_the_checks(probe: Probe, returned, measured: str) -> None:
    (only,) = check(lambda samples, prompts: returned(len(samples)), probe)
    assert (only.name, only.passed) == ("result", False)
    assert measured in only.measured and "(B,)" in only.advice


def test_shapes_verifier_passes(probe: Probe) -> None:
    checks = list(check(ShapesReward("partial"), probe, Expected(prompts=True)))
    assert failed(checks) == [] and "none reaches the sample" in [one.measured for one in checks]


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
