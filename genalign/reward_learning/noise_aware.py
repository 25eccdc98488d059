"""Training of noise-aware rewards (TTSnap, arXiv 2511.22242), which predict clean rewards from previews.

A dataset holds the previews of complete trajectories with the rewards of their final samples. A student starts as the
reward itself and learns these rewards from the previews: first at the cleanest level, from there at the next one, up to
the noisiest. The weights at the end of each level are kept. ``genalign.search.noise_aware`` records the previews, and
scores a search by the students.

A student is an ``nn.Module`` whose trainable parameters require a gradient. It is called with previews (B, ...) and
prompts, and returns the expected rewards (B,) of the clean samples. Its attribute ``input_kind`` is "latents" or
"samples", for previews as latents or decoded.

M trajectories, S levels. A level is a grid's ``noise_share``: sigma on a flow's path, and in [0, 1] on all paths.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import scipy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genalign.diffusion.noise import derived_seed
from genalign.reward_learning.fitting import FitSettings, Fitter
from genalign.runtime.files import load_state, save_state
from genalign.types import AnyCallable, Prompt

Decode = Callable[[Tensor], Tensor]
"""A pipeline's ``decode``, from latents (B, ...) to samples."""

_DIGEST_VALUES = 256  # of a tensor, at equal distances, that identify it


@runtime_checkable
class NetworkReward(Protocol):
    """A reward by one network, which can be trained into a student of itself."""

    def network(self) -> nn.Module:
        """Return the network, called with samples and prompts; it is opened once and shared by all that ask for it."""


@runtime_checkable
class HasDecoder(Protocol):
    """A student of latents that decodes them by a small network of its own."""

    decoder: nn.Module

    def decoder_target(self, samples: Tensor) -> Tensor:
        """Return what its decoder should output for previews that the pipeline decodes to ``samples``."""


@dataclass(frozen=True)
class RewardIdentity:
    """The reward that a student was trained for: its import path, and a digest of its weights or its settings."""

    path: str
    digest: str

    @classmethod
    def of(cls, reward: AnyCallable) -> RewardIdentity:
        """Identify a reward, whichever name it has in a run; its weights count as rounded to bfloat16."""
        kind = reward if inspect.isroutine(reward) else type(reward)
        path = f"{kind.__module__}.{kind.__qualname__}"
        digest = hashlib.blake2b(path.encode(), digest_size=8)
        if isinstance(reward, NetworkReward):
            network = reward.network()
            digest.update(network.extra_repr().encode())  # such as the output of a learned reward and its pool
            for name, weight in network.named_parameters():
                values = weight.detach().flatten()[:: max(1, weight.numel() // _DIGEST_VALUES)]
                digest.update(f"{name} {tuple(weight.shape)}".encode())
                digest.update(values.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
        elif is_dataclass(reward):
            digest.update(repr(reward).encode())
        return cls(path, digest.hexdigest())

    def beside(self, other: RewardIdentity) -> str:
        """Describe the reward in a sentence that has named ``other``."""
        if self.path != other.path:
            return self.path
        return f"{self.path} with other weights or settings (fingerprint {self.digest}, not {other.digest})"


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


@dataclass(frozen=True)
class Distillation:
    """Settings of a student's training.

    The student trains for ``epochs`` on the previews of the cleanest level, then of the next one, and so on, from the
    weights of the level before and with a new optimizer. The loss is the mean squared error to the clean reward in
    units of its standard deviation, plus ``rank`` times the cross entropy of which of two samples of a prompt is
    better, at temperature ``tau``. A student with a decoder first trains it for ``decoder_epochs`` on one preview of
    every trajectory.

    Args:
        epochs: Passes over the dataset at each noise level.
        batch_size: Previews in one optimizer step.
        learning_rate: Learning rate of AdamW at the start of each level; it falls linearly to half.
        weight_decay: Weight decay of AdamW.
        rank: Weight of the pairwise ranking loss beside the squared error; 0 leaves it out, as TTSnap's code does.
        tau: Temperature of the ranking loss.
        decoder_epochs: Passes over the dataset for the student's own decoder.
        decoder_learning_rate: Learning rate of the student's own decoder.
        seed: Seed of the order of the previews.
    """

    epochs: int = 1
    batch_size: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    rank: float = 0.0
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
    fitter = Fitter(dict(decoder.named_parameters()), FitSettings(settings.decoder_learning_rate, last=1.0, clip=None))
    for _ in range(settings.decoder_epochs):
        losses = []
        for rows in torch.split(torch.randperm(len(previews), generator=generator), settings.batch_size):
            target = targets[rows].to(fitter.device, torch.float32)
            loss = F.mse_loss(decoder(previews[rows].to(fitter.device)), target)
            fitter.step(loss)
            losses.append(float(loss.detach()))
        yield sum(losses) / len(losses)


@dataclass(frozen=True)
class TrainedLevel:
    """A student's trainable weights, by name, after its training at the noise level ``sigma``, and the mean loss there.

    The loss is that of the last epoch.
    """

    sigma: float
    weights: Mapping[str, Tensor]
    loss: float


def distill(
    student: nn.Module, dataset: PreviewDataset, decode: Decode, settings: Distillation
) -> Iterator[TrainedLevel]:
    """Train a student from the cleanest level to the noisiest, and yield its weights after each.

    Args:
        student: The network to train.
        dataset: Previews and their clean rewards.
        decode: The pipeline's decoder, for a student of samples.
        settings: Epochs, losses, batch size and seed.
    """
    clean, prompt = dataset.clean, dataset.prompt
    spread = clean.std().clamp(min=1e-6)
    trainable = {name: weight for name, weight in student.named_parameters() if weight.requires_grad}
    batches = settings.epochs * -(-len(dataset) // settings.batch_size)
    for level in reversed(range(len(dataset.sigmas))):
        fitter = Fitter(trainable, FitSettings(settings.learning_rate, settings.weight_decay, last=0.5), batches)
        for epoch in range(settings.epochs):
            generator = torch.Generator().manual_seed(derived_seed(settings.seed, level, epoch))
            # batches with all trajectories of a prompt side by side, prompts in random order
            order = torch.randperm(len(dataset.prompts), generator=generator)
            shuffled = torch.argsort(torch.argsort(order)[prompt], stable=True)
            losses = []
            for rows in torch.split(shuffled, settings.batch_size):
                prediction = _predict(student, dataset, rows, level, decode)
                loss = _loss(prediction / spread, clean[rows] / spread, prompt[rows], settings)
                fitter.step(loss)
                losses.append(float(loss.detach()))
        weights = {name: weight.cpu() for name, weight in fitter.copies().items()}
        yield TrainedLevel(float(dataset.sigmas[level]), weights, sum(losses) / len(losses))


def _predict(student: nn.Module, dataset: PreviewDataset, rows: Tensor, level: int, decode: Decode) -> Tensor:
    previews = dataset.previews[rows, level].float()
    with torch.no_grad():
        inputs = decode(previews) if student.input_kind == "samples" else previews
    prompts = [dataset.prompts[p] for p in dataset.prompt[rows].tolist()]
    scores: Tensor = student(inputs.to(next(student.parameters()).device), prompts)
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
def validate(student: nn.Module, dataset: PreviewDataset, level: int, decode: Decode, batch: int = 64) -> LevelQuality:
    """Measure how well a student ranks at one level of a dataset.

    Args:
        student: The network to validate, with its weights of this level.
        dataset: Held-out previews and their clean rewards.
        level: The place of the level in the dataset.
        decode: The pipeline's decoder, for a student of samples.
        batch: Number of previews in a call of the student.

    Raises:
        ValueError: No prompt has two samples of different reward.
    """
    batches = torch.split(torch.arange(len(dataset)), batch)
    scores = torch.cat([_predict(student, dataset, rows, level, decode) for rows in batches])
    return ranking_quality(scores, dataset.clean, dataset.prompt, float(dataset.sigmas[level]))


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
