"""Check what every reward must satisfy, on any reward, a user's too: ``genalign reward check``.

A reward scores samples one by one (``genalign.types.Reward``): the same alone, in any batch and in any order, NaN for
what it cannot score, and without side effects. What depends on the kind of reward (whether it reads the prompt, has a
gradient, falls with quality) is measured, and required only if it is ``Expected``.
"""

from __future__ import annotations

import io
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from genalign.runtime.media import medium_of
from genalign.types import Prompt, RewardFunction

_STEPS = (0.1, 0.03, 0.01, 3e-3, 1e-3, 3e-4)  # of finite differences, as parts of a sample's norm
_GRADIENT_TOLERANCE = 0.05


@dataclass(frozen=True)
class Check:
    """The outcome for one property: ``passed`` is None if it was only ``measured``; ``advice`` says what to do."""

    name: str
    passed: bool | None
    measured: str
    advice: str = ""


@dataclass(frozen=True)
class Probe:
    """At least four different samples, images (B, 3, H, W) in [0, 1] or waveforms (B, C, L), that show their prompts,
    which differ. Two scores are equal within ``tolerance`` of the largest, or of 1.
    """

    samples: Tensor
    prompts: Sequence[Prompt]
    tolerance: float = 1e-5

    def __post_init__(self) -> None:
        if len(self.samples) != len(self.prompts) or len(self.prompts) < 4:
            raise ValueError(
                f"a check needs at least 4 images (B, 3, H, W) or waveforms (B, C, L) with one prompt each, not"
                f" {tuple(self.samples.shape)} and {len(self.prompts)} prompts"
            )
        if len({prompt.text for prompt in self.prompts}) < len(self.prompts):
            raise ValueError("a check needs prompts that differ: take each one once")

    def difference(self, left: Tensor, right: Tensor) -> float:
        """Return the largest difference relative to the largest score or 1; infinite if only one side is NaN."""
        if not torch.equal(left.isnan(), right.isnan()):
            return float("inf")
        scale = max(1.0, float(left.nan_to_num().abs().max()))
        return float((left - right).nan_to_num().abs().max()) / scale


@dataclass(frozen=True)
class Expected:
    """Properties that this kind of reward must have, which are only measured otherwise. ``prompts``: the right prompt
    scores higher. ``gradient``: there is one. ``degradation``: it falls with every degree of noise, blur and JPEG.
    """

    prompts: bool = False
    gradient: bool = False
    degradation: bool = False


def check(reward: RewardFunction, probe: Probe, expected: Expected | None = None) -> Iterator[Check]:
    """Yield every check. Without a usable result there are no others; without determinism, the checks that compare
    scores are left out.
    """
    checks = _Checks(reward, probe, expected or Expected())
    first = checks.run("result", checks.result)
    yield first
    if first.passed is False:
        return
    same = checks.run("determinism", checks.determinism)
    yield same
    if same.passed:
        yield checks.run("order", checks.order)
        yield checks.run("batches", checks.batches)
        yield checks.run("gradient", checks.gradient)
    for name, measure in (
        ("side effects", checks.side_effects),
        ("unscorable", checks.unscorable),
        ("sensitivity", checks.sensitivity),
        ("degradation", checks.degradation),
    ):
        yield checks.run(name, measure)


_Outcome = tuple[bool | None, str, str]  # passed, measured, advice if it did not


class _Checks:
    """The checks of one reward on one probe."""

    def __init__(self, reward: RewardFunction, probe: Probe, expected: Expected) -> None:
        self.reward, self.probe, self.expected = reward, probe, expected
        self.samples, self.prompts = probe.samples, list(probe.prompts)

    def run(self, name: str, measure: Callable[[], _Outcome]) -> Check:
        """Run one check and restore torch's global switches; a reward that raises fails it."""
        enabled, dtype, device = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_default_device()
        try:
            passed, measured, advice = measure()
        except Exception as error:  # a user's reward may raise anything
            passed, measured = False, f"raised {type(error).__name__}: {str(error)[:200]}"
            advice = "see the message for what the reward needs"
        finally:
            torch.set_grad_enabled(enabled)
            torch.set_default_dtype(dtype)
            if torch.get_default_device() != device:
                torch.set_default_device(device)
        return Check(name, passed, measured, advice if passed is False else "")

    def scores(self, samples: Tensor | None = None, prompts: Sequence[Prompt] | None = None) -> Tensor:
        """Score samples, by default the probe's, in float32 on the CPU."""
        samples = self.samples if samples is None else samples
        with torch.no_grad():
            return self.reward(samples.clone(), list(prompts or self.prompts)).detach().float().cpu()

    def result(self) -> _Outcome:
        advice = "return a float tensor of shape (B,) with one finite score, or NaN, per sample"
        with torch.no_grad():
            scores = self.reward(self.samples.clone(), self.prompts)
        if not isinstance(scores, Tensor):
            return False, f"a {type(scores).__name__}", advice + " (rewards.adapters takes lists)"
        count = len(self.samples)
        measured = f"{str(scores.dtype).removeprefix('torch.')} of shape {tuple(scores.shape)} for {count} samples"
        if infinite := int(scores.isinf().sum()):
            return False, f"{measured}, {infinite} infinite", advice
        return scores.shape == (count,) and scores.dtype.is_floating_point, measured, advice

    def determinism(self) -> _Outcome:
        started = time.perf_counter()
        first = self.scores()
        speed = len(first) / (time.perf_counter() - started)
        difference = self.probe.difference(first, self.scores())
        advice = "put networks in eval mode, fix seeds and crops, judge at temperature 0; or average several calls"
        measured = f"{difference:.2g} of the scale between two calls, {speed:.3g} samples a second"
        return difference <= self.probe.tolerance, measured, advice

    def order(self) -> _Outcome:
        places = torch.randperm(len(self.samples), generator=torch.Generator().manual_seed(0))
        moved = self.scores(self.samples[places.to(self.samples.device)], [self.prompts[i] for i in places.tolist()])
        difference = self.probe.difference(self.scores()[places], moved)
        advice = "return the scores in the order of the samples"
        return difference <= self.probe.tolerance, f"{difference:.2g} of the scale after a permutation", advice

    def batches(self) -> _Outcome:
        """Compare sorted scores of the whole batch, its halves and single samples; the order is checked by itself."""
        whole, worst = self.scores().sort().values, 0.0
        for size in (len(self.samples) // 2, 1):
            parts = []
            for first in range(0, len(self.samples), size):
                prompts = self.prompts[first : first + size]
                part = self.scores(self.samples[first : first + size], prompts)
                if part.shape != (len(prompts),):
                    measured = f"shape {tuple(part.shape)} for a batch of {len(prompts)}"
                    return False, measured, "keep the batch dimension, also of a single sample"
                parts.append(part)
            worst = max(worst, self.probe.difference(whole, torch.cat(parts).sort().values))
        advice = "score each sample by itself: no statistics of the batch, no padding that others see"
        measured = f"{worst:.2g} of the scale between a batch, its halves and single samples"
        return worst <= self.probe.tolerance, measured, advice

    def gradient(self) -> _Outcome:
        """Compare one sample's gradient with central differences along itself, the sample, and each channel's level."""
        sample, prompt = (0.1 + 0.8 * self.samples[:1]).detach(), self.prompts[:1]
        leaf = sample.clone().requires_grad_()
        with torch.enable_grad():
            score = self.reward(leaf * 1.0, prompt).sum()
            slope = torch.autograd.grad(score, leaf, allow_unused=True)[0] if score.requires_grad else None
        if slope is None:
            advice = "use torch operations all the way, without detach or no_grad"
            return False if self.expected.gradient else None, "none reaches the sample", advice
        shifts = torch.eye(sample.shape[1]).to(sample).reshape(-1, sample.shape[1], *[1] * (sample.ndim - 2))
        directions = [slope, sample, *(shift.expand_as(sample[0])[None] for shift in shifts)]
        directions = [direction / direction.norm().clamp_min(1e-20) for direction in directions]
        predicted = torch.stack([(direction * slope).sum() for direction in directions]).double().cpu()
        error = float("inf")
        for step in _STEPS:
            length = step * float(sample.norm())
            above, below = (
                torch.stack([self.scores(sample + sign * length * d, prompt).sum().double() for d in directions])
                for sign in (1, -1)
            )
            measured = (above - below) / (2 * length)
            rounding = 4e-7 * above.abs().max() / length
            scale = torch.maximum(predicted.abs(), measured.abs()).max().clamp_min(1e-20)
            error = min(error, float((((predicted - measured).abs() - rounding).clamp_min(0) / scale).max()))
        advice = "look for what is detached, rounded or scaled on the way; or detach all, and search without a gradient"
        return error <= _GRADIENT_TOLERANCE, f"{error:.1%} off finite differences", advice

    def side_effects(self) -> _Outcome:
        """Check that the samples and torch's grad mode, default dtype and device are unchanged, in either grad mode."""
        switches = {
            "grad mode": torch.is_grad_enabled,
            "default dtype": torch.get_default_dtype,
            "default device": torch.get_default_device,
        }
        changed = set()
        for enabled in (True, False):
            with torch.set_grad_enabled(enabled):
                before, samples = {name: read() for name, read in switches.items()}, self.samples.clone()
                self.reward(samples, self.prompts)
                changed |= {name for name, read in switches.items() if read() != before[name]}
                changed |= set() if torch.equal(samples, self.samples) else {"samples"}
        advice = (
            "work on a copy of the samples; use torch.no_grad(), not torch.set_grad_enabled(False); set no defaults"
        )
        measured = (
            f"changed: {', '.join(sorted(changed))}" if changed else "samples, grad mode, dtype and device unchanged"
        )
        return not changed, measured, advice

    def unscorable(self) -> _Outcome:
        """Check that one sample of NaN makes one score NaN; its place is for ``order`` to check."""
        advice = "return NaN for what cannot be scored, never a number, and score the others"
        samples = self.samples.clone()
        samples[1] = torch.nan
        try:
            scores = self.scores(samples)
        except Exception as error:
            return False, f"raised {type(error).__name__} for a whole batch with one sample of NaN", advice
        clean = self.scores()
        more = int(scores.isnan().sum()) - int(clean.isnan().sum()) - int(not bool(clean[1].isnan()))
        measured = "a number for a sample of NaN" if more < 0 else f"one sample of NaN makes {more} others NaN"
        return more == 0, measured if more else "NaN for a sample of NaN alone", advice

    def sensitivity(self) -> _Outcome:
        """Check that scores vary over samples, wrong prompts and noise, and whether the right prompt scores higher."""
        right, wrong = self.scores(), self.scores(prompts=[*self.prompts[1:], self.prompts[0]])
        noise = torch.rand(self.samples.shape, generator=torch.Generator().manual_seed(0)).to(self.samples)
        every = torch.cat([right, wrong, self.scores(noise)])
        finite = every[~every.isnan()]
        if not len(finite):
            return False, f"none of {len(every)} samples was scored", "see what the reward needs of a prompt"
        if finite.min() == finite.max():
            return False, f"every score is {float(finite[0]):.4g}", "return scores that vary: is a failure scored?"
        changed = int((((right - wrong).abs() > self.probe.tolerance) | (right.isnan() != wrong.isnan())).sum())
        gap = float((right - wrong).nanmean())
        measured = (
            f"{float(finite.min()):.4g} to {float(finite.max()):.4g}; {changed} of {len(right)} scores change with the"
            f" prompt, the right one is {gap:+.4g} higher"
        )
        passed = changed > 0 and gap > 0 if self.expected.prompts else True
        return passed, measured, "read the prompt, and score the right one higher"

    def degradation(self) -> _Outcome:
        """Measure mean scores under three degrees of noise and blur, and of JPEG for images."""
        is_image = medium_of(self.samples).name == "image"
        noise = torch.randn(self.samples.shape, generator=torch.Generator().manual_seed(0)).to(self.samples)
        pool = F.avg_pool2d if is_image else F.avg_pool1d
        degraded: dict[str, list[Tensor]] = {
            "noise": [(self.samples + s * noise).clamp(0.0 if is_image else -1.0, 1) for s in (0.05, 0.15, 0.4)],
            "blur": [pool(self.samples, w, 1, w // 2, count_include_pad=False) for w in (3, 7, 15)],
        }
        if is_image:
            jpegs = [torch.stack([_jpeg(sample, quality) for sample in self.samples]) for quality in (40, 15, 3)]
            degraded["JPEG"] = [images.to(self.samples) for images in jpegs]
        measured, falls = [], []
        for name, batches in degraded.items():
            means = [float(self.scores(batch).nanmean()) for batch in (self.samples, *batches)]
            falls.append(all(after < before for before, after in itertools.pairwise(means)))
            measured.append(f"{name} {' '.join(f'{mean:.3g}' for mean in means)}{' falls' if falls[-1] else ''}")
        return all(falls) if self.expected.degradation else None, "; ".join(measured), "make quality raise the score"


def _jpeg(image: Tensor, quality: int) -> Tensor:
    from PIL import Image

    pixels = (image.float().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    with Image.open(buffer, formats=("JPEG",)) as file:
        return torch.from_numpy(np.array(file)).permute(2, 0, 1).float() / 255
