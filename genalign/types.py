"""The records and protocols that the packages share. Imports torch only.

Shapes: B = P prompts x G samples per prompt, T steps, S stored transitions, K rewards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

Metadata = Mapping[str, Any]

Precision = Literal["float32", "bfloat16", "float16"]
"""The name of a dtype of weights in settings."""

AnyCallable = Callable  # type: ignore[type-arg]  # bare, for the reason below
"""The type of a setting that takes a function or an object that is called. It has no parameters, since jsonargparse
reads a class that is given for a ``Callable[..., Tensor]`` as a factory of tensors, and refuses it.
"""


class Prompt(str):
    """A text and, where a reward or a verifier needs it, its GenEval metadata (tag, include, exclude, prompt).

    It is a string, so rewards that were written for strings take it; two prompts are equal if their texts are.
    ``Prompt(prompt)`` keeps the metadata of a prompt, unless others follow.
    """

    metadata: Metadata | None

    def __new__(cls, text: str, metadata: Metadata | None = None) -> Prompt:
        prompt = super().__new__(cls, text)
        prompt.metadata = text.metadata if metadata is None and isinstance(text, Prompt) else metadata
        return prompt

    @property
    def text(self) -> str:
        """The text as a plain string, without metadata."""
        return str(self)

    @property
    def task(self) -> str:
        """The GenEval tag; without one the user, as in "ada" or "0.5 ada + 0.5 bob"; "all" without either."""
        if self.metadata and "tag" in self.metadata:
            return str(self.metadata["tag"])
        users = users_of(self).items()
        return " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in users) or "all"


def users_of(prompt: str) -> dict[str, float]:
    """Return whose taste a prompt's samples are for, the "user" of its metadata, with weights; {} for nobody's.

    A name has the weight 1; a mapping from names to weights mixes tastes. Raises ValueError for anything else.
    """
    user = (prompt.metadata or {}).get("user") if isinstance(prompt, Prompt) else None
    if user is None:
        return {}
    if isinstance(user, str):
        return {user: 1.0}
    if isinstance(user, Mapping) and user and all(isinstance(weight, int | float) for weight in user.values()):
        return {str(name): float(weight) for name, weight in user.items()}
    raise ValueError(
        f"a prompt's user is a name, or names with weights, as in {{'ada': 0.5, 'bob': 0.5}}, not {user!r}"
    )


@dataclass(frozen=True)
class PromptSet:
    """A named, ordered list of prompts."""

    name: str
    prompts: tuple[Prompt, ...]

    @classmethod
    def of(cls, prompts: PromptSet | str | Sequence[str]) -> PromptSet:
        """Turn a text, or a list of texts or prompts, into a set named "prompts"; a set is returned as it is."""
        if isinstance(prompts, PromptSet):
            return prompts
        return cls("prompts", tuple(map(Prompt, [prompts] if isinstance(prompts, str) else prompts)))

    def __len__(self) -> int:
        return len(self.prompts)

    def by_task(self) -> dict[str, tuple[Prompt, ...]]:
        """Group the prompts by task, in order of first appearance."""
        tasks: dict[str, list[Prompt]] = {}
        for prompt in self.prompts:
            tasks.setdefault(prompt.task, []).append(prompt)
        return {task: tuple(prompts) for task, prompts in tasks.items()}

    def of_tasks(self, tasks: Sequence[str]) -> PromptSet:
        """Select the prompts of some tasks, under the same name. Raises ValueError for a task without prompts."""
        if unknown := set(tasks) - set(self.by_task()):
            raise ValueError(
                f"{self.name} has no task {', '.join(sorted(unknown))}: choose from {', '.join(self.by_task())}"
            )
        return PromptSet(self.name, tuple(prompt for prompt in self.prompts if prompt.task in tasks))


@dataclass(frozen=True)
class NoiseLevel:
    """A point on a path: the network's timestep, and the marginal x = alpha x0 + sigma eps.

    Every field is a float64 tensor of shape () or (B,).
    """

    timestep: Tensor
    alpha: Tensor
    sigma: Tensor

    def rows(self, index: Tensor) -> NoiseLevel:
        """Select the levels ``index`` (N,) long of a batch; a level of all rows is that of any of them."""
        fields = (self.timestep, self.alpha, self.sigma)
        return NoiseLevel(*(field[index] if field.ndim else field for field in fields))


@dataclass(frozen=True)
class NoiseStep(NoiseLevel):
    """One step of a sampling grid, from (alpha, sigma) to (alpha_next, sigma_next); ``index`` is 0..T-1 (long)."""

    index: Tensor
    alpha_next: Tensor
    sigma_next: Tensor


@dataclass(frozen=True)
class Grid:
    """A sampling grid of T steps: ``timestep`` (T,), ``alpha`` and ``sigma`` (T + 1,), float64, sigma descending."""

    timestep: Tensor
    alpha: Tensor
    sigma: Tensor

    def __len__(self) -> int:
        return len(self.timestep)

    @property
    def noise_share(self) -> Tensor:
        """Sigma / (alpha + sigma), (T + 1,): from nearly 1 to 0 on every path, and sigma itself on a flow's."""
        return self.sigma / (self.alpha + self.sigma)

    def __getitem__(self, index: int | Tensor) -> NoiseStep:
        """Return the step ``index``, or a batch of steps for a long tensor (B,)."""
        i = torch.as_tensor(index)
        if int(i.min()) < 0 or int(i.max()) >= len(self):
            raise IndexError(f"step {index} is outside this grid of {len(self)} steps")
        return NoiseStep(self.timestep[i], self.alpha[i], self.sigma[i], i, self.alpha[i + 1], self.sigma[i + 1])


@dataclass(frozen=True)
class Conditioning:
    """Text conditioning of P prompts: the encoders' outputs by name, whose first dimension is P."""

    tensors: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, index: Tensor) -> Conditioning:
        """Select the rows ``index`` (B,) long, on their device."""
        place = index.to(next(iter(self.tensors.values())).device, non_blocking=True)
        return Conditioning({name: tensor[place] for name, tensor in self.tensors.items()})

    def to(self, device: torch.device) -> Conditioning:
        """Move the tensors to ``device``."""
        return Conditioning({name: tensor.to(device, non_blocking=True) for name, tensor in self.tensors.items()})


class Path(Protocol):
    """An interpolation between data and noise; see ``genalign.diffusion.paths``."""

    def x0(self, x: Tensor, prediction: Tensor, level: NoiseLevel) -> Tensor: ...

    def eps(self, x: Tensor, prediction: Tensor, level: NoiseLevel) -> Tensor: ...

    def prediction(self, x0: Tensor, eps: Tensor, level: NoiseLevel) -> Tensor: ...

    def add_noise(self, x0: Tensor, eps: Tensor, level: NoiseLevel) -> Tensor: ...


class Pipeline(Protocol):
    """A diffusion or flow model for sampling and training; implementations are in ``pipelines``."""

    @property
    def path(self) -> Path:
        """The interpolation that the network was trained on."""

    @property
    def denoiser(self) -> nn.Module:
        """The trained network, a transformer or UNet."""

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype that the network computes in: that of mixed precision, or of its weights."""

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Encode texts, once per distinct prompt and cached; rows in the order of ``prompts``."""

    def grid(self, num_steps: int, sigmas: Sequence[float] | None = None) -> Grid:
        """Return the sampling grid of the checkpoint's scheduler, or of explicit sigmas (a final 0 is appended)."""

    def level(self, u: Tensor) -> NoiseLevel:
        """Return noise levels for training at u in [0, 1] (B,)."""

    def guidance_scale(self, guidance: float | None) -> float:
        """Return the scale of classifier-free guidance to sample with; None is the default of the model's family.

        Raises ValueError for a scale that the model does not take.
        """

    def initial_noise(self, seeds: Sequence[int]) -> Tensor:
        """Draw latents at the first noise level, one seed per sample, on the CPU in float32."""

    def predict(self, x: Tensor, level: NoiseLevel, conditioning: Conditioning, guidance: float) -> Tensor:
        """Return the network's output at ``level.timestep`` in float32; classifier-free guidance if guidance > 1."""

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents to images (B, 3, H, W) in [0, 1] or waveforms (B, C, L) in [-1, 1]; differentiable."""


@runtime_checkable
class CompilesBlocks(Protocol):
    """A pipeline that compiles the blocks of its denoiser if it was opened so."""

    def compile_blocks(self, batch_sizes: Sequence[int] = ()) -> None:
        """Compile after the adapter is on; smaller batches are padded to the next larger of ``batch_sizes``."""


@runtime_checkable
class EncodesSamples(Protocol):
    """A pipeline whose autoencoder encodes samples, too, and whose latents can be kept and learned from."""

    @property
    def autoencoder(self) -> str:
        """The fingerprint of the autoencoder, by which stored latents belong to it."""

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """The shape of one sample's latents."""

    def encode_samples(self, samples: Tensor) -> Tensor:
        """Encode samples (B, ...) in their range to clean latents (B, C, ...)."""


@runtime_checkable
class RecordsStudent(Protocol):
    """A pipeline whose weights say that they are a few-step student's, wherever they are saved and loaded."""

    def record_student(self, guidance: float) -> None:
        """Record that the network is, or is trained to be, a few-step student of a teacher with this guidance scale."""


@runtime_checkable
class Reward(Protocol):
    """Scores samples one by one; higher is better, NaN where a sample could not be scored."""

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Return scores (B,) of samples (B, ...)."""


@runtime_checkable
class SaturatingReward(Protocol):
    """A reward whose scores level off on purpose, as a log-sigmoid's do, so good samples no longer differ.

    Use it with a credit in units of the score, such as ``LeaveOneOut``: dividing by the standard deviation would undo
    the saturation.
    """

    @property
    def saturates(self) -> bool:
        """Whether the reward levels off: True."""


@runtime_checkable
class GroupReward(Protocol):
    """A reward that compares the samples of a prompt with each other, and must see all of them in one call.

    A group is all samples of a call that share one ``Prompt`` object. Training keeps groups in one batch for such a
    reward, and refuses what would split them.
    """

    @property
    def compares_group(self) -> bool:
        """Whether the score of a sample depends on the others of its prompt: True."""


@runtime_checkable
class ComparesWithReferences(Protocol):
    """A reward that compares a sample with references of its prompt, such as images or earlier scores."""

    def require_references(self, prompt: Prompt) -> None:
        """Raise ValueError, which says what to add, where there are no references for ``prompt``."""


RewardFunction = Callable[[Tensor, Sequence[Prompt]], Tensor]
PairwiseReward = Callable[[Tensor, Tensor, Sequence[Prompt]], Tensor]
"""Probabilities (B,) that a sample of the first batch is better than that of the second; NaN where undecided."""

SetReward = Callable[[Tensor], float]
"""A score of a whole set of samples from their features (n, d); higher is better. ValueError for too few samples."""

FeatureFunction = Callable[[Tensor], Tensor]
"""Features (B, d) of samples (B, ...), differentiable."""


@runtime_checkable
class TrainableReward(Protocol):
    """A reward that is trained along with the generator, such as a discriminator.

    Its weights are constant while a round is scored; ``update`` is called once after the round and may change them.
    """

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Return scores (B,) with the weights of the last update."""

    def update(self, samples: Tensor, prompts: Sequence[Prompt], rows: Sequence[int]) -> Mapping[str, float]:
        """Train on a round's generated samples and return metrics for the log.

        ``prompts`` are those of all B samples of the round. Each rank of a distributed run gets its own ``samples``
        (b, ...), whose numbers among the B are ``rows``, and must make the same update.
        """

    def tensors(self) -> dict[str, Tensor]:
        """Return the state to save in a checkpoint; every rank calls this, and the main rank's is written."""

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore a result of ``tensors()``."""
