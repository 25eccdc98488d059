"""Check what every reward must satisfy, on any reward, a user's too: ``genalign reward check``.

A reward scores samples one by one (``genalign.types.Reward``): the same alone, in any batch and in any order, NaN for
what it cannot score, and without side effects. What depends on the kind of reward (whether it reads the prompt, has a
gradient, falls with quality) is measured, and required only if it is ``Expected``.
"""

from __future__ import annotations

import inspect
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from genalign.runtime.media import as_jpeg, medium_of
from genalign.scoring.score import described, takes_no_gradient
from genalign.types import Prompt, RewardFunction

logger = logging.getLogger(__name__)

_ADVICE = {  # in the order of the checks
    "result": "return a float tensor (B,), one finite score or NaN for each sample (rewards.adapters takes lists)",
    "determinism": "put networks in eval mode, fix seeds and crops, judge at temperature 0; or average several calls",
    "order": "return the scores in the order of the samples",
    "batches": "use no statistics of the batch, no padding that others see, and keep the batch dimension of one sample",
    "gradient": "use torch operations all the way, and look for what is detached, rounded or scaled; or detach all",
    "side effects": "work on a copy of the samples; use torch.no_grad(), not torch.set_grad_enabled(); set no defaults",
    "unscorable": "return NaN for what cannot be scored, never a number, and score the others",
    "sensitivity": "see what the reward needs of a prompt, and return scores that vary, higher for the right prompt",
    "degradation": "make quality raise the score",
}


@dataclass(frozen=True)
class Check:
    """The outcome for one property: ``passed`` is None if it was only ``measured``; ``advice`` says what to do."""

    name: str
    passed: bool | None
    measured: str
    advice: str = ""


@dataclass(frozen=True)
class Probe:
    """At least four different samples with their prompts, which differ as well, to score in every check.

    ``samples`` are images (B, 3, H, W) in [0, 1] or waveforms (B, C, L) that show their prompts. Two scores are equal
    within ``tolerance`` of the largest, or of 1.
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
    """Properties that this kind of reward must have, and that are only measured otherwise.

    ``prompts``: the right prompt scores higher. ``gradient``: there is one. ``degradation``: the score falls with every
    degree of noise, blur and JPEG.

    Args:
        prompts: The right prompt scores higher than another one.
        gradient: The score has a gradient with respect to the samples.
        degradation: The score falls with every degree of noise, blur and JPEG.
    """

    prompts: bool = False
    gradient: bool = False
    degradation: bool = False


def check(reward: RewardFunction, probe: Probe, expected: Expected | None = None) -> Iterator[Check]:
    """Yield every check of a reward; a reward that raises fails the check in which it does.

    Without a usable result there are no other checks, and without determinism none that compare scores.
    """
    checks, failed = _Checks(reward, probe, expected or Expected()), set()
    for name, advice in _ADVICE.items():
        if "result" in failed or ("determinism" in failed and name in ("order", "batches", "gradient")):
            continue
        before = _switches()
        try:
            passed, measured = getattr(checks, name.replace(" ", "_"))()
        except Exception as error:  # a user's reward may raise anything
            logger.debug("check %r", name, exc_info=True)
            passed, measured = False, f"raised {described(error)[:300]}"
        finally:
            for switch, value in _switches().items():
                if value != before[switch]:
                    _SWITCHES[switch][1](before[switch])
        failed |= {name} if passed is False else set()
        yield Check(name, passed, measured, advice if passed is False else "")


_BLACK_BOX = (
    "none: a black-box reward, which training, search and steering use as it is, but not noise optimization or guided"
    " steering, which follow its gradient"
)
_Outcome = tuple[bool | None, str]  # passed, and what was measured
_SWITCHES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "grad mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    "default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "default device": (torch.get_default_device, torch.set_default_device),
}


def _switches() -> dict[str, Any]:
    """Read torch's global switches, which a reward must not change."""
    return {name: read() for name, (read, _) in _SWITCHES.items()}


class _Checks:
    """The checks of one reward on one probe, by the names of their advice."""

    def __init__(self, reward: RewardFunction, probe: Probe, expected: Expected) -> None:
        self.reward, self.probe, self.expected = reward, probe, expected
        self.samples, self.prompts = probe.samples, list(probe.prompts)

    def scores(self, samples: Tensor | None = None, prompts: Sequence[Prompt] | None = None) -> Tensor:
        """Score samples, by default the probe's, in float32 on the CPU."""
        samples = self.samples if samples is None else samples
        with torch.no_grad():
            return self.reward(samples.clone(), list(prompts or self.prompts)).detach().float().cpu()

    def result(self) -> _Outcome:
        with torch.no_grad():
            scores = self.reward(self.samples.clone(), self.prompts)
        if inspect.iscoroutine(scores):
            scores.close()  # it was never awaited, which Python would warn of
        if not isinstance(scores, Tensor) or scores.is_meta:
            return False, "a tensor on the meta device" if isinstance(scores, Tensor) else f"a {type(scores).__name__}"
        count, infinite = len(self.samples), int(scores.isinf().sum())
        measured = f"{str(scores.dtype).removeprefix('torch.')} of shape {tuple(scores.shape)} for {count} samples"
        if infinite:
            return False, f"{measured}, {infinite} infinite"
        return scores.shape == (count,) and scores.dtype.is_floating_point, measured

    def determinism(self) -> _Outcome:
        started, first = time.perf_counter(), self.scores()
        speed = len(first) / (time.perf_counter() - started)
        difference = self.probe.difference(first, self.scores())
        measured = f"{difference:.2g} of the scale between two calls, {speed:.3g} samples a second"
        return difference <= self.probe.tolerance, measured

    def order(self) -> _Outcome:
        places = torch.randperm(len(self.samples), generator=torch.Generator().manual_seed(0))
        moved = self.scores(self.samples[places.to(self.samples.device)], [self.prompts[i] for i in places.tolist()])
        difference = self.probe.difference(self.scores()[places], moved)
        return difference <= self.probe.tolerance, f"{difference:.2g} of the scale after a permutation"

    def batches(self) -> _Outcome:
        """Compare sorted scores of the whole batch, its halves and single samples; the order is checked by itself."""
        whole, worst = self.scores().sort().values, 0.0
        for size in (len(self.samples) // 2, 1):
            parts = []
            for first in range(0, len(self.samples), size):
                prompts = self.prompts[first : first + size]
                part = self.scores(self.samples[first : first + size], prompts)
                if part.shape != (len(prompts),):
                    return False, f"shape {tuple(part.shape)} for a batch of {len(prompts)}"
                parts.append(part)
            worst = max(worst, self.probe.difference(whole, torch.cat(parts).sort().values))
        return worst <= self.probe.tolerance, f"{worst:.2g} of the scale between a batch, its halves and single samples"

    def gradient(self) -> _Outcome:
        """Compare one sample's gradient with central differences along itself, the sample, and each channel's level.

        The sample has a texture: flat areas are where the maxima of pooling layers tie, and a slope has two sides.
        """
        texture = torch.rand(self.samples[:1].shape, generator=torch.Generator().manual_seed(0)).to(self.samples)
        sample, prompt = (0.1 + 0.7 * self.samples[:1] + 0.2 * texture).detach(), self.prompts[:1]
        leaf = sample.clone().requires_grad_()
        try:
            with torch.enable_grad():
                score = self.reward(leaf * 1.0, prompt).sum()
                slope = torch.autograd.grad(score, leaf, allow_unused=True)[0] if score.requires_grad else None
        except (RuntimeError, BufferError) as error:
            if not takes_no_gradient(error):
                raise
            slope = None
        if slope is None:
            return False if self.expected.gradient else None, _BLACK_BOX
        if bool(score.isnan()):
            return None, "unknown: the textured sample it is measured at was not scored"
        off = min(self._slope_error(sample, prompt, slope, step) for step in (0.1, 0.03, 0.01, 3e-3, 1e-3, 3e-4))
        return off <= 0.05, f"{off:.1%} off finite differences"

    def _slope_error(self, sample: Tensor, prompt: Sequence[Prompt], slope: Tensor, step: float) -> float:
        """The difference of a gradient from finite differences of a ``step``, in parts of the sample's norm."""
        levels = torch.eye(sample.shape[1]).to(sample).view(-1, 1, sample.shape[1], *[1] * (sample.ndim - 2))
        directions = torch.cat([slope, sample, *(level.expand_as(sample) for level in levels)])
        directions = F.normalize(directions.flatten(1), dim=1, eps=1e-20).view_as(directions)
        predicted = (directions * slope).flatten(1).sum(1).double().cpu()
        length = step * float(sample.norm())
        above, below = (
            torch.stack([self.scores(sample + sign * length * way, prompt).double().sum() for way in directions])
            for sign in (1, -1)
        )
        slopes, rounding = (above - below) / (2 * length), 4e-7 * above.abs().max() / length
        scale = torch.maximum(predicted.abs(), slopes.abs()).max().clamp_min(1e-20)
        return float(((predicted - slopes).abs() - rounding).clamp_min(0).max() / scale)

    def side_effects(self) -> _Outcome:
        """Check that the samples and torch's grad mode, default dtype and device are unchanged, in either grad mode."""
        changed = set()
        for enabled in (True, False):
            with torch.set_grad_enabled(enabled):
                before, samples = _switches(), self.samples.clone()
                self.reward(samples, self.prompts)
                changed |= {name for name, value in _switches().items() if value != before[name]}
                if not torch.equal(samples, self.samples):
                    changed.add("samples")
        return not changed, f"changed: {', '.join(sorted(changed)) or 'nothing'}"

    def unscorable(self) -> _Outcome:
        """Check that one sample of NaN makes one score NaN; its place is for ``order`` to check."""
        samples = self.samples.clone()
        samples[1] = torch.nan
        clean, spoiled = self.scores(), self.scores(samples)
        others = int(spoiled.isnan().sum()) - int(clean.isnan().sum()) - int(not bool(clean[1].isnan()))
        measured = "a number for a sample of NaN" if others < 0 else f"one sample of NaN makes {others} others NaN"
        return others == 0, measured

    def sensitivity(self) -> _Outcome:
        """Check that scores vary over samples, wrong prompts and noise, and whether the right prompt scores higher."""
        right, wrong = self.scores(), self.scores(prompts=[*self.prompts[1:], self.prompts[0]])
        noise = torch.rand(self.samples.shape, generator=torch.Generator().manual_seed(0)).to(self.samples)
        every = torch.cat([right, wrong, self.scores(noise)])
        finite = every[~every.isnan()]
        if not len(finite):
            return False, f"none of {len(every)} samples was scored"
        low, high = float(finite.min()), float(finite.max())
        if low == high:
            return False, f"every score is {low:.4g}"
        changed = int((((right - wrong).abs() > self.probe.tolerance) | (right.isnan() != wrong.isnan())).sum())
        gap = float((right - wrong).nanmean())
        measured = f"{low:.4g} to {high:.4g}; {changed} of {len(right)} scores change with the prompt"
        return (changed > 0 and gap > 0) or not self.expected.prompts, f"{measured}, the right one is {gap:+.4g} higher"

    def degradation(self) -> _Outcome:
        """Measure mean scores under three degrees of noise and blur, and of JPEG for images."""
        is_image = medium_of(self.samples).name == "image"
        least, pool = (0.0, F.avg_pool2d) if is_image else (-1.0, F.avg_pool1d)
        noise = torch.randn(self.samples.shape, generator=torch.Generator().manual_seed(0)).to(self.samples)
        degraded: dict[str, list[Tensor]] = {
            "noise": [(self.samples + scale * noise).clamp(least, 1) for scale in (0.05, 0.15, 0.4)],
            "blur": [pool(self.samples, w, 1, w // 2, count_include_pad=False) for w in (3, 7, 15)],
        }
        if is_image:
            degraded["JPEG"] = [as_jpeg(self.samples, quality) for quality in (40, 15, 3)]
        measured, falls = [], []
        for name, batches in degraded.items():
            means = [float(self.scores(batch).nanmean()) for batch in (self.samples, *batches)]
            falls.append(all(after < before for before, after in itertools.pairwise(means)))
            measured.append(f"{name} {' '.join(f'{mean:.3g}' for mean in means)}{' falls' if falls[-1] else ''}")
        return all(falls) if self.expected.degradation else None, "; ".join(measured)
