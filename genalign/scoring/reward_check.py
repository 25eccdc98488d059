"""What every reward must hold to, measured on any reward, a user's too: ``genalign reward check``.

A reward scores samples one by one (``genalign.types.Reward``): the same alone, in any batch and in any order, NaN for
what it cannot score, and without side effects. What depends on the kind of reward (whether it reads the prompt, has a
gradient, falls with quality) is measured, and held to only where it is ``Expected``.
"""

from __future__ import annotations

import io
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from genalign.types import Prompt, RewardFunction

_STEPS = (0.1, 0.03, 0.01, 3e-3, 1e-3, 3e-4)  # of finite differences, as parts of a sample's norm
_GRADIENT_TOLERANCE = 0.05


@dataclass(frozen=True)
class Check:
    """One property: ``passed`` is None where it was only ``measured``; ``advice`` is what to do about it."""

    name: str
    passed: bool | None
    measured: str
    advice: str = ""


@dataclass(frozen=True)
class Probe:
    """At least four different samples, images (B, 3, H, W) in [0, 1] or waveforms (B, C, L), that show their prompts,
    which differ. Two scores are equal within ``tolerance`` of the largest, or of 1."""

    samples: Tensor
    prompts: Sequence[Prompt]
    tolerance: float = 1e-5

    def __post_init__(self) -> None:
        if len(self.samples) != len(self.prompts) or len(self.prompts) < 4 or self.samples.ndim not in (3, 4):
            raise ValueError(
                f"a check needs at least 4 images (B, 3, H, W) or waveforms (B, C, L) with one prompt each, not"
                f" {tuple(self.samples.shape)} and {len(self.prompts)} prompts"
            )
        if len({prompt.text for prompt in self.prompts}) < len(self.prompts):
            raise ValueError("a check needs prompts that differ: take each one once")

    @property
    def rotated(self) -> list[Prompt]:
        """The prompts, each by another sample than its own."""
        return [*self.prompts[1:], self.prompts[0]]

    def noise(self) -> Tensor:
        """Samples of noise alone."""
        return torch.rand(self.samples.shape, generator=torch.Generator().manual_seed(0)).to(self.samples)

    def difference(self, left: Tensor, right: Tensor) -> float:
        """The largest difference, as a part of the largest score or of 1; infinite where only one side is NaN."""
        if not torch.equal(left.isnan(), right.isnan()):
            return float("inf")
        scale = max(1.0, float(left.nan_to_num().abs().max()))
        return float((left - right).nan_to_num().abs().max()) / scale


@dataclass(frozen=True)
class Expected:
    """What this kind of reward is held to, where it would else only be measured. ``prompts``: the right prompt scores
    higher. ``gradient``: there is one. ``degradation``: it falls with every degree of noise, blur and JPEG."""

    prompts: bool = False
    gradient: bool = False
    degradation: bool = False


def check(reward: RewardFunction, probe: Probe, expected: Expected | None = None) -> Iterator[Check]:
    """Every check, one by one. Without a usable result there are no others; without determinism, those that compare
    scores tell nothing and are left out."""
    expected = expected or Expected()
    first = _held("result", lambda: result(reward, probe))
    yield first
    if first.passed is False:
        return
    same = _held("determinism", lambda: determinism(reward, probe))
    yield same
    if same.passed:
        yield _held("order", lambda: order(reward, probe))
        yield _held("batches", lambda: batches(reward, probe))
        yield _held("gradient", lambda: gradient(reward, probe, expected.gradient))
    yield _held("inputs", lambda: inputs(reward, probe))
    yield _held("torch state", lambda: torch_state(reward, probe))
    yield _held("unscorable", lambda: unscorable(reward, probe))
    yield _held("variation", lambda: variation(reward, probe))
    yield _held("prompts", lambda: prompts(reward, probe, expected.prompts))
    yield _held("degradation", lambda: degradation(reward, probe, expected.degradation))
    if probe.samples.ndim == 4:
        yield _held("8 bits", lambda: eight_bits(reward, probe))
    yield _held("throughput", lambda: throughput(reward, probe))


def result(reward: RewardFunction, probe: Probe) -> Check:
    """One float for every sample, none of them infinite."""
    advice = "return a float tensor of shape (B,) with one finite score, or NaN, per sample"
    with torch.no_grad():
        scores = reward(probe.samples.clone(), probe.prompts)
    if not isinstance(scores, Tensor):
        return Check("result", False, f"a {type(scores).__name__}", advice + " (rewards.adapters takes lists)")
    count = len(probe.samples)
    told = f"{str(scores.dtype).removeprefix('torch.')} of shape {tuple(scores.shape)} for {count} samples"
    fine = scores.shape == (count,) and scores.dtype.is_floating_point
    if fine and bool(scores.isinf().any()):
        return Check("result", False, f"{told}, {int(scores.isinf().sum())} infinite", advice)
    return Check("result", fine, told, "" if fine else advice)


def determinism(reward: RewardFunction, probe: Probe) -> Check:
    """The same samples score the same again."""
    difference = probe.difference(_scores(reward, probe), _scores(reward, probe))
    advice = "put networks in eval mode, fix seeds and crops, judge at temperature 0; or average several calls"
    return _equal("determinism", difference, probe, "between two calls", advice)


def order(reward: RewardFunction, probe: Probe) -> Check:
    """A sample's score is found at the sample's place."""
    places = torch.randperm(len(probe.samples), generator=torch.Generator().manual_seed(0))
    moved = _call(reward, probe.samples[places.to(probe.samples.device)], [probe.prompts[i] for i in places.tolist()])
    difference = probe.difference(_scores(reward, probe)[places], moved)
    return _equal("order", difference, probe, "after a permutation", "return the scores in the order of the samples")


def batches(reward: RewardFunction, probe: Probe) -> Check:
    """The same scores come of the whole batch, of its halves, and of every sample alone, in whatever order they come:
    that is for ``order`` to hold."""
    whole, worst = _scores(reward, probe).sort().values, 0.0
    for size in (len(probe.samples) // 2, 1):
        parts = []
        for first in range(0, len(probe.samples), size):
            prompts = probe.prompts[first : first + size]
            part = _call(reward, probe.samples[first : first + size], prompts)
            if part.shape != (len(prompts),):
                told = f"shape {tuple(part.shape)} for a batch of {len(prompts)}"
                return Check("batches", False, told, "keep the batch dimension, also of a single sample")
            parts.append(part)
        worst = max(worst, probe.difference(whole, torch.cat(parts).sort().values))
    advice = "score each sample by itself: no statistics of the batch, no padding that others see"
    return _equal("batches", worst, probe, "between a batch, its halves and single samples", advice)


def gradient(reward: RewardFunction, probe: Probe, expected: bool = False) -> Check:
    """One sample's gradient is that of finite differences: along itself, along each channel's level and the sample."""
    sample, prompt = (0.1 + 0.8 * probe.samples[:1]).detach(), probe.prompts[:1]
    leaf = sample.clone().requires_grad_()
    with torch.enable_grad():
        score = reward(leaf * 1.0, prompt).sum()
        found = torch.autograd.grad(score, leaf, allow_unused=True)[0] if score.requires_grad else None
    if found is None:
        advice = "keep to torch all the way, without detach or no_grad" if expected else ""
        return Check("gradient", False if expected else None, "none reaches the sample", advice)
    directions = _directions(sample, found)
    predicted = torch.stack([(direction * found).sum() for direction in directions]).double().cpu()
    error = float("inf")
    for step in _STEPS:
        error = min(error, _error(reward, sample, prompt, directions, predicted, step * float(sample.norm())))
        if error <= _GRADIENT_TOLERANCE:
            return Check("gradient", True, f"{error:.1%} off finite differences")
    advice = "find what is detached, rounded or scaled on the way; or detach all, and be searched without a gradient"
    return Check("gradient", False, f"{error:.1%} off finite differences at best", advice)


def _directions(sample: Tensor, gradient: Tensor) -> list[Tensor]:
    """Unit directions of a sample (1, C, ...): its gradient, itself, and a shift of each channel."""
    shifts = [torch.zeros_like(sample) for _ in range(sample.shape[1])]
    for channel, shift in enumerate(shifts):
        shift[:, channel] = 1.0
    return [direction / direction.norm().clamp_min(1e-20) for direction in (gradient, sample, *shifts)]


def _error(
    reward: RewardFunction,
    sample: Tensor,
    prompt: Sequence[Prompt],
    directions: Sequence[Tensor],
    predicted: Tensor,
    length: float,
) -> float:
    """The largest deviation (D,) of central differences, less what rounding explains, as a part of the largest."""
    sides = [
        [_call(reward, sample + sign * length * direction, prompt).sum().double() for direction in directions]
        for sign in (1, -1)
    ]
    above, below = (torch.stack(side) for side in sides)
    measured = (above - below) / (2 * length)
    rounding = 4e-7 * above.abs().max() / length
    scale = torch.maximum(predicted.abs(), measured.abs()).max().clamp_min(1e-20)
    return float((((predicted - measured).abs() - rounding).clamp_min(0) / scale).max())


def inputs(reward: RewardFunction, probe: Probe) -> Check:
    """The samples are as they were: other rewards, and the training, see them next."""
    given = probe.samples.clone()
    with torch.no_grad():
        reward(given, probe.prompts)
    fine = torch.equal(given, probe.samples)
    told = "untouched" if fine else "the samples were changed in place"
    return Check("inputs", fine, told, "" if fine else "work on a copy: no operations in place on the samples")


def torch_state(reward: RewardFunction, probe: Probe) -> Check:
    """Torch's global switches are as they were: grad mode, whichever it was, default dtype and device."""
    changed = set()
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            before = _switches()
            reward(probe.samples.clone(), probe.prompts)
            changed |= {name for name, value in _switches().items() if before[name] != value}
    told = f"changed: {', '.join(sorted(changed))}" if changed else "grad mode, dtype and device as before"
    advice = "use torch.no_grad() around the network, not torch.set_grad_enabled(False); set no defaults"
    return Check("torch state", not changed, told, advice if changed else "")


def unscorable(reward: RewardFunction, probe: Probe) -> Check:
    """One sample of NaN makes one score NaN; which one is for ``order`` to hold."""
    samples, advice = (
        probe.samples.clone(),
        "return NaN for what cannot be scored, never a number, and score the others",
    )
    samples[1] = torch.nan
    try:
        scores = _call(reward, samples, probe.prompts)
    except Exception as error:
        told = f"raised {type(error).__name__} for a whole batch with one sample of NaN"
        return Check("unscorable", False, told, advice)
    clean = _scores(reward, probe)
    more = int(scores.isnan().sum()) - int(clean.isnan().sum()) - int(not bool(clean[1].isnan()))
    if more < 0:
        return Check("unscorable", False, "a number for a sample of NaN", advice)
    if more > 0:
        return Check("unscorable", False, f"one sample of NaN makes {more} others NaN", advice)
    return Check("unscorable", True, "NaN for a sample of NaN alone")


def variation(reward: RewardFunction, probe: Probe) -> Check:
    """Scores differ over samples, wrong prompts and noise: a constant teaches nothing."""
    scores = torch.cat(
        [
            _scores(reward, probe),
            _call(reward, probe.samples, probe.rotated),
            _call(reward, probe.noise(), probe.prompts),
        ]
    )
    known = scores[~scores.isnan()]
    if not len(known):
        return Check("variation", False, f"none of {len(scores)} samples was scored", "see what it needs of a prompt")
    told = f"{float(known.min()):.4g} to {float(known.max()):.4g}, {int(scores.isnan().sum())} of {len(scores)} NaN"
    fine = bool(known.min() < known.max())
    return Check("variation", fine, told, "" if fine else "every sample scores the same: is a failure scored?")


def prompts(reward: RewardFunction, probe: Probe, expected: bool = False) -> Check:
    """Whether wrong prompts change the scores, and lower them."""
    right, wrong = _scores(reward, probe), _call(reward, probe.samples, probe.rotated)
    changed = int((((right - wrong).abs() > probe.tolerance) | (right.isnan() != wrong.isnan())).sum())
    gap = float((right - wrong).nanmean())
    told = f"{changed} of {len(right)} scores change with the prompt, the right one is {gap:+.4g} higher"
    if not expected:
        return Check("prompts", None, told)
    fine = changed > 0 and gap > 0
    return Check("prompts", fine, told, "" if fine else "read the prompt, and score the right one higher")


def degradation(reward: RewardFunction, probe: Probe, expected: bool = False) -> Check:
    """Mean scores of samples that are made worse in three degrees: noise and blur, and JPEG for images."""
    clean, told, falling = float(_scores(reward, probe).nanmean()), [], True
    for name, worsen in _worsenings(probe.samples):
        means = [clean, *(float(_call(reward, worsen(degree), probe.prompts).nanmean()) for degree in range(3))]
        falls = all(after < before for before, after in itertools.pairwise(means))
        falling = falling and falls
        told.append(f"{name} {' '.join(f'{mean:.3g}' for mean in means)}{' falls' if falls else ''}")
    if not expected:
        return Check("degradation", None, "; ".join(told))
    return Check(
        "degradation", falling, "; ".join(told), "" if falling else "quality should cost score at every degree"
    )


def eight_bits(reward: RewardFunction, probe: Probe) -> Check:
    """What rounding images to 8 bits, as PNG and remote rewards do, changes."""
    samples = 0.1 + 0.8 * probe.samples
    rounded = (samples * 255).round() / 255
    before, after = _call(reward, samples, probe.prompts), _call(reward, rounded, probe.prompts)
    spread = float(before[~before.isnan()].std(correction=0)) if bool((~before.isnan()).any()) else 0.0
    change = float((before - after).abs().nan_to_num().max())
    return Check("8 bits", None, f"scores change by {change:.2g} at most, where their spread is {spread:.2g}")


def throughput(reward: RewardFunction, probe: Probe) -> Check:
    """Samples a second, in a batch and one by one."""
    started = time.perf_counter()
    _scores(reward, probe)
    together = time.perf_counter() - started
    started = time.perf_counter()
    _call(reward, probe.samples[:1], probe.prompts[:1])
    alone = time.perf_counter() - started
    count = len(probe.samples)
    return Check(
        "throughput", None, f"{count / together:.3g} samples a second in batches of {count}, {1 / alone:.3g} alone"
    )


def _worsenings(samples: Tensor) -> list[tuple[str, Callable[[int], Tensor]]]:
    """Named functions from a degree 0, 1, 2 to worse samples."""
    noise = torch.randn(samples.shape, generator=torch.Generator().manual_seed(0)).to(samples)
    low = 0.0 if samples.ndim == 4 else -1.0

    def noisy(degree: int) -> Tensor:
        return (samples + (0.05, 0.15, 0.4)[degree] * noise).clamp(low, 1)

    def blurred(degree: int) -> Tensor:
        width = (3, 7, 15)[degree]
        if samples.ndim == 3:
            return F.avg_pool1d(samples, width, 1, width // 2, count_include_pad=False)
        return F.avg_pool2d(samples, width, 1, width // 2, count_include_pad=False)

    def compressed(degree: int) -> Tensor:
        return torch.stack([_jpeg(sample, (40, 15, 3)[degree]) for sample in samples]).to(samples)

    images: list[tuple[str, Callable[[int], Tensor]]] = [("JPEG", compressed)] if samples.ndim == 4 else []
    return [("noise", noisy), ("blur", blurred), *images]


def _jpeg(image: Tensor, quality: int) -> Tensor:
    from PIL import Image

    pixels = (image.float().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    with Image.open(buffer, formats=("JPEG",)) as file:
        return torch.from_numpy(np.array(file)).permute(2, 0, 1).float() / 255


def _held(name: str, measure: Callable[[], Check]) -> Check:
    """The check, with torch's switches put back behind it; a failed one where the reward raises."""
    try:
        with _restored():
            return measure()
    except Exception as error:  # a user's reward may raise anything
        return Check(name, False, f"raised {type(error).__name__}: {str(error)[:200]}", "see what it needs")


@contextmanager
def _restored() -> Iterator[None]:
    enabled, dtype = torch.is_grad_enabled(), torch.get_default_dtype()
    device = torch.get_default_device()
    try:
        yield
    finally:
        torch.set_grad_enabled(enabled)
        torch.set_default_dtype(dtype)
        if torch.get_default_device() != device:
            torch.set_default_device(device)


def _switches() -> dict[str, object]:
    return {
        "grad mode": torch.is_grad_enabled(),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
    }


def _call(reward: RewardFunction, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """Scores in float32 on the CPU."""
    with torch.no_grad():
        return reward(samples.clone(), list(prompts)).detach().float().cpu()


def _scores(reward: RewardFunction, probe: Probe) -> Tensor:
    return _call(reward, probe.samples, probe.prompts)


def _equal(name: str, difference: float, probe: Probe, where: str, advice: str) -> Check:
    fine = difference <= probe.tolerance
    return Check(name, fine, f"{difference:.2g} of the scale {where}", "" if fine else advice)
