"""The records that the packages exchange, and the protocols that they meet by. Imports torch only.

Shapes: B = P prompts x G samples per prompt, T steps, S stored transitions, K rewards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

Metadata = Mapping[str, Any]


@dataclass(frozen=True)
class Prompt:
    """A text and, where a reward or a verifier needs it, its GenEval metadata (tag, include, exclude, prompt)."""

    text: str
    metadata: Metadata | None = None

    @property
    def task(self) -> str:
        """The GenEval tag, or "all" for a prompt without metadata."""
        return str(self.metadata["tag"]) if self.metadata and "tag" in self.metadata else "all"


@dataclass(frozen=True)
class PromptSet:
    """A named, ordered list of prompts."""

    name: str
    prompts: tuple[Prompt, ...]

    @classmethod
    def of(cls, prompts: PromptSet | Sequence[str | Prompt]) -> PromptSet:
        """Turn a list of texts or prompts into a set named "prompts"; a set is returned as it is."""
        if isinstance(prompts, PromptSet):
            return prompts
        return cls("prompts", tuple(Prompt(prompt) if isinstance(prompt, str) else prompt for prompt in prompts))

    def __len__(self) -> int:
        return len(self.prompts)

    def by_task(self) -> dict[str, tuple[Prompt, ...]]:
        """Prompts grouped by task, tasks in order of first appearance."""
        tasks: dict[str, list[Prompt]] = {}
        for prompt in self.prompts:
            tasks.setdefault(prompt.task, []).append(prompt)
        return {task: tuple(prompts) for task, prompts in tasks.items()}

    def of_tasks(self, tasks: Sequence[str]) -> PromptSet:
        """The prompts of these tasks, under the same name. Raises ValueError for a task without prompts."""
        if unknown := set(tasks) - set(self.by_task()):
            raise ValueError(
                f"{self.name} has no task {', '.join(sorted(unknown))}: choose from {', '.join(self.by_task())}"
            )
        return PromptSet(self.name, tuple(prompt for prompt in self.prompts if prompt.task in tasks))


@dataclass(frozen=True)
class NoiseLevel:
    """A point on a path: what the network is told, and the marginal x = alpha x0 + sigma eps.

    Every field is a float64 tensor of shape () or (B,).
    """

    timestep: Tensor
    alpha: Tensor
    sigma: Tensor


@dataclass(frozen=True)
class NoiseStep(NoiseLevel):
    """One move along a grid, from (alpha, sigma) to (alpha_next, sigma_next); ``index`` is its place 0..T-1 (long)."""

    index: Tensor
    alpha_next: Tensor
    sigma_next: Tensor


@dataclass(frozen=True)
class Grid:
    """T moves. ``timestep`` is (T,), ``alpha`` and ``sigma`` are (T + 1,), all float64, sigma descending."""

    timestep: Tensor
    alpha: Tensor
    sigma: Tensor

    def __len__(self) -> int:
        return len(self.timestep)

    @property
    def noise_share(self) -> Tensor:
        """sigma / (alpha + sigma), (T + 1,): from nearly 1 to 0 on every path, and sigma itself on a flow's."""
        return self.sigma / (self.alpha + self.sigma)

    def __getitem__(self, index: int | Tensor) -> NoiseStep:
        """The move ``index``, or a batch of moves for a long tensor of shape (B,)."""
        i = torch.as_tensor(index)
        if int(i.min()) < 0 or int(i.max()) >= len(self):
            raise IndexError(f"step {index} is outside this grid of {len(self)} steps")
        return NoiseStep(self.timestep[i], self.alpha[i], self.sigma[i], i, self.alpha[i + 1], self.sigma[i + 1])


@dataclass(frozen=True)
class Conditioning:
    """What a pipeline's encoders made of P prompts: named tensors whose first dimension is P."""

    tensors: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, index: slice | Tensor) -> Conditioning:
        """The rows of ``index``, on the device they are on."""
        return Conditioning({name: tensor[index] for name, tensor in self.tensors.items()})


class Path(Protocol):
    """An interpolation between data and noise; see ``genalign.diffusion.paths``."""

    def x0(self, x: Tensor, prediction: Tensor, level: NoiseLevel) -> Tensor: ...

    def eps(self, x: Tensor, prediction: Tensor, level: NoiseLevel) -> Tensor: ...

    def prediction(self, x0: Tensor, eps: Tensor, level: NoiseLevel) -> Tensor: ...

    def add_noise(self, x0: Tensor, eps: Tensor, level: NoiseLevel) -> Tensor: ...


class Pipeline(Protocol):
    """A diffusion or flow model as the loops see it; implementations are in ``pipelines``."""

    @property
    def path(self) -> Path:
        """The interpolation that the network was trained on."""

    @property
    def denoiser(self) -> nn.Module:
        """The network that is trained."""

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Text conditioning, computed once per distinct prompt and cached; rows in the order of ``prompts``."""

    def grid(self, num_steps: int, sigmas: Sequence[float] | None = None) -> Grid:
        """The sampling grid of the checkpoint's scheduler, or the given sigmas (a final 0 is appended)."""

    def level(self, u: Tensor) -> NoiseLevel:
        """Noise levels for training at u in [0, 1] (B,)."""

    def initial_noise(self, seeds: Sequence[int]) -> Tensor:
        """Latents at the first noise level, one seed per sample, drawn on the CPU in float32."""

    def predict(self, x: Tensor, level: NoiseLevel, conditioning: Conditioning, guidance: float) -> Tensor:
        """The network's output at ``level.timestep`` in float32, classifier-free guidance inside where guidance > 1."""

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] or waveforms (B, C, L) in [-1, 1]; differentiable."""


@runtime_checkable
class Reward(Protocol):
    """Scores samples one by one; higher is better, NaN where a sample could not be scored."""

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores (B,) for samples (B, ...)."""


RewardFunction = Callable[[Tensor, Sequence[Prompt]], Tensor]
PairwiseReward = Callable[[Tensor, Tensor, Sequence[Prompt]], Tensor]
"""Probabilities (B,) that a sample of the first batch is better than that of the second; NaN where it cannot tell."""

SetReward = Callable[[Tensor], float]
"""A score of a whole set of samples from their features (n, d); higher is better. ValueError for too few samples."""

FeatureFunction = Callable[[Tensor], Tensor]
"""Features (B, d) of samples (B, ...), differentiable."""


@runtime_checkable
class TrainableReward(Protocol):
    """A reward that is trained along with the generator, such as a discriminator.

    Its weights stand still while a round is scored; ``update`` is called once after it and may change them.
    """

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores (B,) by the weights of the last update."""

    def update(self, samples: Tensor, prompts: Sequence[Prompt]) -> Mapping[str, float]:
        """Learn from a round's generated samples (B, ...); named readings for the log. Where several processes train,
        each is given all samples of the round, and must learn the same of them."""

    def tensors(self) -> dict[str, Tensor]:
        """Everything that the future depends on, for a checkpoint."""

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what ``tensors()`` gave."""
