"""Noise-aware rewards (TTSnap, arXiv 2511.22242): scorers of previews that know what the clean sample will be worth.

A recording holds the previews of complete trajectories with the clean reward of their ends; a student learns the one
from the other, level by level; and the scorer that comes of it refuses levels at which it ranks too badly.

M trajectories, S levels. A level is a grid's ``noise_share``: sigma on a flow's path, and in [0, 1] on all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from scipy.stats import kendalltau
from torch import Tensor, nn

from genalign.diffusion.noise import derived_seed
from genalign.runtime.files import load_state, save_state
from genalign.scoring.budget import DECODE, reward_call
from genalign.search.engine import Particles, ScoredParticles, SearchRun
from genalign.types import Prompt

Look = Callable[[Tensor], Tensor]
"""From previews (latents) to what a student looks at: a pipeline's ``decode``, or ``as_they_are``."""


def as_they_are(previews: Tensor) -> Tensor:
    """For students of latents."""
    return previews


class Student(Protocol):
    """A network that scores previews; an ``nn.Module`` whose trainable parameters require a gradient."""

    @property
    def on(self) -> Literal["latents", "samples"]:
        """What it looks at: previews as they are, or decoded."""

    def __call__(self, previews: Tensor, sigma: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """The expected reward (B,) of the clean samples, for previews (B, ...) at noise levels (B,)."""


@runtime_checkable
class Decoding(Protocol):
    """A student of latents that sees them through a small decoder of its own."""

    decoder: nn.Module

    def seen(self, samples: Tensor) -> Tensor:
        """What its decoder is to make of previews that the pipeline's decodes to ``samples``."""


@dataclass(frozen=True)
class Recording:
    """Clean latents expected at S levels, ``previews`` (M, S, ...) float16, at noise levels ``sigmas`` (S,) falling, of
    M trajectories with prompts ``prompt`` (M,) long of ``prompts``, and the reward ``clean`` (M,) of their ends.
    """

    previews: Tensor
    sigmas: Tensor
    prompt: Tensor
    clean: Tensor
    prompts: tuple[Prompt, ...]

    def __len__(self) -> int:
        return len(self.clean)

    def save(self, path: Path) -> None:
        """As one safetensors file."""
        tensors = {"previews": self.previews, "sigmas": self.sigmas, "prompt": self.prompt, "clean": self.clean}
        save_state(path, tensors, {"prompts": [asdict(prompt) for prompt in self.prompts]})

    @classmethod
    def load(cls, path: Path) -> Recording:
        """What ``save`` wrote."""
        tensors, meta = load_state(path)
        return cls(**tensors, prompts=tuple(Prompt(**prompt) for prompt in meta["prompts"]))

    def joined(self, other: Recording) -> Recording:
        """These trajectories, then those of ``other``, at the same levels."""
        return Recording(
            torch.cat([self.previews, other.previews]),
            self.sigmas,
            torch.cat([self.prompt, other.prompt + len(self.prompts)]),
            torch.cat([self.clean, other.clean]),
            self.prompts + other.prompts,
        )


@torch.no_grad()
def watched(run: SearchRun, count: int, steps: Sequence[int]) -> tuple[Tensor, ScoredParticles]:
    """Sample ``count`` candidates of every prompt of a run by the ODE: their previews (M, S, ...) float16 of network
    evaluations ``steps`` (ascending, from 0), and their ends.
    """
    candidates, previews = run.start(count), []
    for step in steps:
        candidates = run.advance(candidates, step + 1)
        assert candidates.preview is not None, "an advanced candidate has a preview"
        previews.append(candidates.preview.half())
    return torch.stack(previews, dim=1), run.finish(candidates)


def record(run: SearchRun, count: int, steps: Sequence[int]) -> Recording:
    """What ``watched`` sees, with the reward of the ends. Candidates whose reward failed are left out."""
    previews, finished = watched(run, count, steps)
    clean = run.combined(finished.scores)
    known = clean.isfinite()
    sigmas = run.grid.noise_share[list(steps)].float()
    return Recording(previews[known], sigmas, finished.candidates.prompt[known], clean[known], run.prompts)


@dataclass(frozen=True)
class Distillation:
    """``epochs`` for each level, from the cleanest to the noisiest, each over that level and those before it in equal
    parts, so that one network comes to serve them all.

    The loss is the mean square error to the clean reward, in units of its standard deviation, plus ``rank`` times the
    cross entropy of which of two samples of a prompt is better, at temperature ``tau``. A student with a decoder of its
    own first learns, for ``decoder_epochs``, what the pipeline's makes of one preview of every trajectory.
    """

    epochs: int = 2
    batch_size: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    rank: float = 0.5
    tau: float = 0.5
    decoder_epochs: int = 20
    decoder_learning_rate: float = 2e-3
    seed: int = 0


def learn_to_decode(student: Decoding, recording: Recording, decode: Look, settings: Distillation) -> Iterator[float]:
    """Train a student's decoder by mean square error to what it is to see of previews that ``decode`` decodes, on one
    of every trajectory at any level; yields the mean loss after every epoch.
    """
    decoder = student.decoder
    generator = torch.Generator().manual_seed(derived_seed(settings.seed, "decoder"))
    level = torch.randint(len(recording.sigmas), (len(recording),), generator=generator)
    previews = recording.previews[torch.arange(len(recording)), level].float()
    with torch.no_grad():
        decoded = torch.cat(
            [student.seen(decode(part)).half().cpu() for part in torch.split(previews, settings.batch_size)]
        )
    optimizer = torch.optim.AdamW(decoder.parameters(), settings.decoder_learning_rate)
    device = device_of(decoder)
    for _ in range(settings.decoder_epochs):
        losses = []
        for rows in torch.split(torch.randperm(len(previews), generator=generator), settings.batch_size):
            loss = F.mse_loss(decoder(previews[rows].to(device)), decoded[rows].to(device, torch.float32))
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            losses.append(float(loss.detach()))
        yield sum(losses) / len(losses)


def distil(student: nn.Module, recording: Recording, look: Look, settings: Distillation) -> Iterator[tuple[int, float]]:
    """Train a ``Student``; yields (levels in use, mean loss) after every epoch."""
    target = (recording.clean - recording.clean.mean()) / recording.clean.std().clamp(min=1e-6)
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    for levels in range(1, len(recording.sigmas) + 1):
        optimizer = torch.optim.AdamW(trained, settings.learning_rate, weight_decay=settings.weight_decay)
        for epoch in range(settings.epochs):
            generator = torch.Generator().manual_seed(derived_seed(settings.seed, levels, epoch))
            losses = []
            for rows in _batches(recording, settings.batch_size, generator):
                level = len(recording.sigmas) - 1 - torch.randint(levels, (len(rows),), generator=generator)
                predicted = _predicted(student, recording, rows, level, look)
                loss = _loss(predicted, target[rows], recording.prompt[rows], settings)
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                nn.utils.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                losses.append(float(loss.detach()))
            yield levels, sum(losses) / len(losses)


def _predicted(student: nn.Module, recording: Recording, rows: Tensor, level: Tensor, look: Look) -> Tensor:
    with torch.no_grad():
        seen = look(recording.previews[rows, level].float())
    asked = [recording.prompts[p] for p in recording.prompt[rows].tolist()]
    device = device_of(student)
    scores: Tensor = student(seen.to(device), recording.sigmas[level].to(device), asked)
    return scores.cpu()


def device_of(student: nn.Module) -> torch.device:
    """Where its weights are; what it looks at is taken there."""
    return next(student.parameters()).device


def _batches(recording: Recording, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Rows in batches, all of a prompt's side by side, prompts in random order."""
    order = torch.randperm(len(recording.prompts), generator=generator)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    yield from torch.split(torch.argsort(place[recording.prompt], stable=True), size)


def _loss(predicted: Tensor, target: Tensor, prompt: Tensor, settings: Distillation) -> Tensor:
    loss = F.mse_loss(predicted, target)
    better = (prompt[:, None] == prompt[None, :]) & (target[:, None] > target[None, :])
    if not settings.rank or not bool(better.any()):
        return loss
    lead = (predicted[:, None] - predicted[None, :])[better]
    return loss + settings.rank * F.softplus(-lead / settings.tau).mean()


@dataclass(frozen=True)
class Quality:
    """How a scorer of previews does at one noise level on held-out trajectories, means over prompts: Kendall's ``tau``
    with the clean reward, how often the best sample is in the ``top`` quarter, and by how much the best of that quarter
    falls short of the best (``gap``, in the reward's units).
    """

    sigma: float
    tau: float
    top: float
    gap: float


@torch.no_grad()
def validate(student: nn.Module, recording: Recording, look: Look, batch_size: int = 64) -> list[Quality]:
    """At every level of a recording. Raises ValueError where no prompt has two samples of different reward."""
    found = []
    for place, sigma in enumerate(recording.sigmas.tolist()):
        parts = torch.split(torch.arange(len(recording)), batch_size)
        levels = torch.full((batch_size,), place)
        predicted = torch.cat([_predicted(student, recording, rows, levels[: len(rows)], look) for rows in parts])
        found.append(quality(predicted, recording.clean, recording.prompt, sigma))
    return found


def quality(predicted: Tensor, clean: Tensor, prompt: Tensor, sigma: float) -> Quality:
    """Of predictions (M,) for clean rewards (M,), prompt by prompt."""
    rows = []
    for key in torch.unique(prompt):
        mine, true = predicted[prompt == key], clean[prompt == key]
        if len(true) < 2 or float(true.max()) == float(true.min()):
            continue
        chosen = mine.topk(max(1, len(true) // 4)).indices
        gap = float(true.max() - true[chosen].max())
        tau = float(kendalltau(mine.numpy(), true.numpy()).statistic)
        rows.append((tau if tau == tau else 0.0, float(gap == 0), gap))  # a constant prediction ranks nothing
    if not rows:
        raise ValueError("no prompt has two samples of different reward: record more of each")
    tau, top, gap = (sum(column) / len(rows) for column in zip(*rows, strict=True))
    return Quality(sigma, tau, top, gap)


@dataclass(frozen=True)
class NoiseAware:
    """A ``PreviewScorer`` by a trained student, in the reward's own units (``mean``, ``std`` of its training).

    It refuses levels that are further than ``tolerance`` from every level it was validated at, or at which it ranked
    worse than ``least_tau``. It is billed as "reward/noise-aware", and where it looks at samples a decode for each.
    """

    student: nn.Module
    qualities: tuple[Quality, ...]
    mean: float = 0.0
    std: float = 1.0
    least_tau: float = 0.1
    tolerance: float = 0.03

    @property
    def on(self) -> Literal["latents", "samples"]:
        """What the student looks at."""
        looks: Literal["latents", "samples"] = self.student.on  # type: ignore[assignment]  # modules type their attributes loosely
        return looks

    @torch.no_grad()
    def __call__(self, run: SearchRun, candidates: Particles) -> Tensor:
        sigma = float(run.grid.noise_share[candidates.done - 1])
        self.check(sigma)
        return torch.cat([self._scores(run, part, sigma) for part in candidates.split(run.batch_size)])[:, None]

    def _scores(self, run: SearchRun, part: Particles, sigma: float) -> Tensor:
        assert part.preview is not None, "candidates that are scored have been advanced"
        run.bill(reward_call("noise-aware"), len(part))
        seen = run.pipeline.decode(part.preview) if self.on == "samples" else part.preview
        asked, device = [run.prompts[p] for p in part.prompt.tolist()], device_of(self.student)
        scores: Tensor = self.student(seen.to(device), torch.full((len(part),), sigma, device=device), asked)
        return self.mean + self.std * scores.float().cpu()

    def check(self, sigma: float) -> None:
        """Raises ValueError for a level that it cannot be trusted at."""
        nearest = min(self.qualities, key=lambda found: abs(found.sigma - sigma))
        if abs(nearest.sigma - sigma) > self.tolerance:
            known = ", ".join(f"{found.sigma:.2f}" for found in self.qualities)
            raise ValueError(f"this scorer was validated at noise levels {known}, not at {sigma:.2f}: prune at those")
        if nearest.tau < self.least_tau:
            raise ValueError(
                f"at noise level {sigma:.2f} this scorer ranks with Kendall's tau {nearest.tau:.2f}, below"
                f" {self.least_tau:.2f}: prune later, or train it on more trajectories"
            )

    def bill(self, run: SearchRun, candidates: int) -> Counter[str]:
        """A call of the student for each, and a decode where it looks at samples."""
        decodes = {DECODE: candidates} if self.on == "samples" else {}
        return Counter({reward_call("noise-aware"): candidates} | decodes)
