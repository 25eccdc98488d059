"""Noise-aware rewards (TTSnap, arXiv 2511.22242): scorers of previews that predict the reward of the clean sample.

A dataset holds the previews of complete trajectories with the rewards of their final samples. A student learns to
predict the rewards from the previews, level by level. The resulting scorer refuses levels at which it ranks badly.

A student is an ``nn.Module`` whose trainable parameters require a gradient. It is called with previews (B, ...), noise
levels (B,) and prompts, and returns the expected rewards (B,) of the clean samples. Its attribute ``input_kind`` is
"latents" or "samples", for previews as latents or decoded.

M trajectories, S levels. A level is a grid's ``noise_share``: sigma on a flow's path, and in [0, 1] on all paths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import scipy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genalign.diffusion.noise import derived_seed
from genalign.runtime.files import load_state, save_state
from genalign.search.engine import Particles, ScoredParticles, SearchRun
from genalign.types import Prompt

Decode = Callable[[Tensor], Tensor]
"""A pipeline's ``decode``, from latents (B, ...) to samples."""


@runtime_checkable
class HasDecoder(Protocol):
    """A student of latents that decodes them by a small network of its own."""

    decoder: nn.Module

    def decoder_target(self, samples: Tensor) -> Tensor:
        """Return what its decoder should output for previews that the pipeline decodes to ``samples``."""


@dataclass(frozen=True)
class PreviewDataset:
    """Previews of M trajectories at S noise levels, with the rewards of their final samples.

    Attributes:
        previews: Clean latents (M, S, ...) float16 predicted at each level.
        sigmas: Noise levels (S,), descending.
        prompt: Index (M,) long of each trajectory's prompt.
        clean: Reward (M,) of each trajectory's final sample.
        prompts: The prompts.
    """

    previews: Tensor
    sigmas: Tensor
    prompt: Tensor
    clean: Tensor
    prompts: tuple[Prompt, ...]

    def __len__(self) -> int:
        return len(self.clean)

    def save(self, path: Path) -> None:
        """Write the dataset as one safetensors file."""
        tensors = {"previews": self.previews, "sigmas": self.sigmas, "prompt": self.prompt, "clean": self.clean}
        save_state(
            path, tensors, {"prompts": [{"text": prompt.text, "metadata": prompt.metadata} for prompt in self.prompts]}
        )

    @classmethod
    def load(cls, path: Path) -> PreviewDataset:
        """Read a dataset that ``save`` wrote."""
        tensors, meta = load_state(path)
        return cls(**tensors, prompts=tuple(Prompt(**prompt) for prompt in meta["prompts"]))

    def extend(self, other: PreviewDataset) -> PreviewDataset:
        """Return these trajectories followed by ``other`` at the same levels."""
        return PreviewDataset(
            torch.cat([self.previews, other.previews]),
            self.sigmas,
            torch.cat([self.prompt, other.prompt + len(self.prompts)]),
            torch.cat([self.clean, other.clean]),
            self.prompts + other.prompts,
        )


@torch.no_grad()
def sample_with_previews(run: SearchRun, count: int, steps: Sequence[int]) -> tuple[Tensor, ScoredParticles]:
    """Sample ``count`` candidates of every prompt of a run by the ODE.

    Returns the previews (M, S, ...) float16 after the network evaluations ``steps`` (ascending, from 0), and the final
    samples.
    """
    candidates, previews = run.start(count), []
    for step in steps:
        candidates = run.advance(candidates, step + 1)
        previews.append(candidates.preview.half())
    return torch.stack(previews, dim=1), run.finish(candidates)


def record_previews(run: SearchRun, count: int, steps: Sequence[int]) -> PreviewDataset:
    """Sample as ``sample_with_previews`` and keep the candidates whose rewards are finite."""
    previews, finished = sample_with_previews(run, count, steps)
    clean = run.weighted_sum(finished.scores)
    finite = clean.isfinite()
    sigmas = run.grid.noise_share[list(steps)].float()
    return PreviewDataset(previews[finite], sigmas, finished.candidates.prompt[finite], clean[finite], run.prompts)


@dataclass(frozen=True)
class Distillation:
    """Settings of a student's training.

    The student trains for ``epochs`` on the cleanest level, then as long on the two cleanest in equal parts, and so on,
    so that one network learns all levels. The loss is the mean squared error to the clean reward in units of its
    standard deviation, plus ``rank`` times the cross entropy of which of two samples of a prompt is better, at
    temperature ``tau``. A student with a decoder first trains it for ``decoder_epochs`` on one preview of every
    trajectory.

    Args:
        epochs: Passes over the dataset for each noise level that is added.
        batch_size: Previews in one optimizer step.
        learning_rate: Learning rate of AdamW.
        weight_decay: Weight decay of AdamW.
        rank: Weight of the pairwise ranking loss beside the squared error.
        tau: Temperature of the ranking loss.
        decoder_epochs: Passes over the dataset for the student's own decoder.
        decoder_learning_rate: Learning rate of the student's own decoder.
        seed: Seed of the order of the previews.
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


def train_decoder(
    student: HasDecoder, dataset: PreviewDataset, decode: Decode, settings: Distillation
) -> Iterator[float]:
    """Train a student's own decoder, and yield the mean loss after every epoch.

    Args:
        student: A student with a decoder.
        dataset: Previews; one of each trajectory is used, at a random level.
        decode: The decoder of the pipeline, whose samples make the targets.
        settings: Epochs, learning rate, batch size and seed.
    """
    decoder = student.decoder
    generator = torch.Generator().manual_seed(derived_seed(settings.seed, "decoder"))
    level = torch.randint(len(dataset.sigmas), (len(dataset),), generator=generator)
    previews = dataset.previews[torch.arange(len(dataset)), level].float()
    with torch.no_grad():
        batches = torch.split(previews, settings.batch_size)
        targets = torch.cat([student.decoder_target(decode(batch)).half().cpu() for batch in batches])
    optimizer = torch.optim.AdamW(decoder.parameters(), settings.decoder_learning_rate)
    device = next(decoder.parameters()).device
    for _ in range(settings.decoder_epochs):
        losses = []
        for rows in torch.split(torch.randperm(len(previews), generator=generator), settings.batch_size):
            loss = F.mse_loss(decoder(previews[rows].to(device)), targets[rows].to(device, torch.float32))
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            losses.append(float(loss.detach()))
        yield sum(losses) / len(losses)


def distill(
    student: nn.Module, dataset: PreviewDataset, decode: Decode, settings: Distillation
) -> Iterator[tuple[int, float]]:
    """Train a student, and yield the number of levels in use and the mean loss after every epoch.

    Args:
        student: The network to train.
        dataset: Previews and their clean rewards.
        decode: The pipeline's decoder, for a student of samples.
        settings: Epochs, losses, batch size and seed.
    """
    clean, prompt = dataset.clean, dataset.prompt
    target = (clean - clean.mean()) / clean.std().clamp(min=1e-6)
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    for levels in range(1, len(dataset.sigmas) + 1):
        optimizer = torch.optim.AdamW(parameters, settings.learning_rate, weight_decay=settings.weight_decay)
        for epoch in range(settings.epochs):
            generator = torch.Generator().manual_seed(derived_seed(settings.seed, levels, epoch))
            # batches with all trajectories of a prompt side by side, prompts in random order
            order = torch.randperm(len(dataset.prompts), generator=generator)
            shuffled = torch.argsort(torch.argsort(order)[prompt], stable=True)
            losses = []
            for rows in torch.split(shuffled, settings.batch_size):
                level = len(dataset.sigmas) - 1 - torch.randint(levels, (len(rows),), generator=generator)
                loss = _loss(_predict(student, dataset, rows, level, decode), target[rows], prompt[rows], settings)
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                losses.append(float(loss.detach()))
            yield levels, sum(losses) / len(losses)


def _predict(student: nn.Module, dataset: PreviewDataset, rows: Tensor, level: Tensor, decode: Decode) -> Tensor:
    previews = dataset.previews[rows, level].float()
    with torch.no_grad():
        inputs = decode(previews) if student.input_kind == "samples" else previews
    prompts = [dataset.prompts[p] for p in dataset.prompt[rows].tolist()]
    device = next(student.parameters()).device
    scores: Tensor = student(inputs.to(device), dataset.sigmas[level].to(device), prompts)
    return scores.cpu()


def _loss(prediction: Tensor, target: Tensor, prompt: Tensor, settings: Distillation) -> Tensor:
    loss = F.mse_loss(prediction, target)
    better = (prompt[:, None] == prompt[None, :]) & (target[:, None] > target[None, :])
    if not settings.rank or not bool(better.any()):
        return loss
    lead = (prediction[:, None] - prediction[None, :])[better]
    return loss + settings.rank * F.softplus(-lead / settings.tau).mean()


@dataclass(frozen=True)
class LevelQuality:
    """How well a scorer ranks held-out trajectories at one noise level; means over prompts.

    Attributes:
        sigma: The noise level.
        tau: Kendall's tau with the clean reward.
        top: How often the best sample is in the top quarter.
        gap: By how much the best sample of the top quarter falls short of the best one, in the reward's units.
    """

    sigma: float
    tau: float
    top: float
    gap: float


@torch.no_grad()
def validate(student: nn.Module, dataset: PreviewDataset, decode: Decode, batch_size: int = 64) -> list[LevelQuality]:
    """Measure how well a student ranks at every level of a dataset.

    Args:
        student: The network to validate.
        dataset: Held-out previews and their clean rewards.
        decode: The pipeline's decoder, for a student of samples.
        batch_size: Number of previews in a call of the student.

    Raises:
        ValueError: No prompt has two samples of different reward.
    """
    qualities = []
    for place, sigma in enumerate(dataset.sigmas.tolist()):
        batches = torch.split(torch.arange(len(dataset)), batch_size)
        scores = [_predict(student, dataset, rows, torch.full_like(rows, place), decode) for rows in batches]
        qualities.append(ranking_quality(torch.cat(scores), dataset.clean, dataset.prompt, sigma))
    return qualities


def ranking_quality(prediction: Tensor, clean: Tensor, prompt: Tensor, sigma: float) -> LevelQuality:
    """Compare predictions (M,) with clean rewards (M,), prompt by prompt.

    Args:
        prediction: Predicted rewards.
        clean: Rewards of the final samples.
        prompt: Index (M,) of each sample's prompt.
        sigma: The noise level of the predictions, for the result.

    Raises:
        ValueError: No prompt has two samples of different reward.
    """
    rows = []
    for key in torch.unique(prompt):
        ours, true = prediction[prompt == key], clean[prompt == key]
        if len(true) < 2 or float(true.max()) == float(true.min()):
            continue
        quarter = ours.topk(max(1, len(true) // 4)).indices
        gap = float(true.max() - true[quarter].max())
        tau = float(scipy.stats.kendalltau(ours.numpy(), true.numpy()).statistic)
        rows.append((tau if tau == tau else 0.0, float(gap == 0), gap))  # a constant prediction ranks nothing
    if not rows:
        raise ValueError("no prompt has two samples of different reward: record more of each")
    tau, top, gap = (sum(column) / len(rows) for column in zip(*rows, strict=True))
    return LevelQuality(sigma, tau, top, gap)


@dataclass(frozen=True)
class NoiseAware:
    """A ``PreviewScorer`` by a trained student, whose calls are counted as "reward/noise-aware".

    Attributes:
        student: The network; it predicts standardized rewards.
        qualities: Its validation at every level.
        mean: Mean of the rewards that it was trained on.
        std: Standard deviation of the rewards that it was trained on.
        least_tau: Levels at which Kendall's tau is below this are refused, as are those that were not validated.
    """

    student: nn.Module
    qualities: tuple[LevelQuality, ...]
    mean: float = 0.0
    std: float = 1.0
    least_tau: float = 0.1

    @torch.no_grad()
    def __call__(self, run: SearchRun, candidates: Particles) -> Tensor:
        sigma = float(run.grid.noise_share[candidates.steps_done - 1])
        device = next(self.student.parameters()).device
        self.check(sigma)

        def predict(previews: Tensor, prompts: Sequence[Prompt]) -> Tensor:
            scores: Tensor = self.student(previews, torch.full((len(previews),), sigma, device=device), prompts)
            return scores

        counted, scores = run.metered("noise-aware", predict), []
        for part in candidates.split(run.batch_size):
            inputs = run.pipeline.decode(part.preview) if self.student.input_kind == "samples" else part.preview
            scores.append(self.mean + self.std * counted(inputs.to(device), run.prompts_of(part)).float().cpu())
        return torch.cat(scores)[:, None]

    def check(self, sigma: float) -> None:
        """Raise ValueError for a noise level at which the scorer was not validated or ranks too badly."""
        nearest = min(self.qualities, key=lambda quality: abs(quality.sigma - sigma))
        if abs(nearest.sigma - sigma) > 0.03:
            levels = ", ".join(f"{quality.sigma:.2f}" for quality in self.qualities)
            raise ValueError(
                f"this scorer was validated at noise levels {levels}, not at {sigma:.2f}: prune at one of these levels"
            )
        if nearest.tau < self.least_tau:
            raise ValueError(
                f"at noise level {sigma:.2f} this scorer ranks with Kendall's tau {nearest.tau:.2f}, below"
                f" {self.least_tau:.2f}: prune later, or train it on more trajectories"
            )
