"""The GPU memory of a training run, estimated from shapes before any weights are read. Checked on no GPU yet."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from genalign.algorithms.recipes import Recipe
from genalign.diffusion.policy import Policy
from genalign.runtime.memory_options import Memory
from genalign.training.activation_memory import largest_layer, saved_activations
from genalign.training.settings import TrainerSettings
from genalign.types import Pipeline

_QUANTIZED = {"nf4": 0.5 + 4 / 64, "int8": 1.0}  # bytes per number; nf4 has a float32 for every 64 numbers
_MOMENTS = {"adamw": 8, "adamw8bit": 2}  # bytes per number


class MetaPipeline(Pipeline, Protocol):
    """A diffusers pipeline whose networks may be on the meta device, with shapes and no values."""

    pipe: Any

    @property
    def sample_shape(self) -> tuple[int, ...]: ...

    @property
    def latent_shape(self) -> tuple[int, ...]: ...

    @property
    def sample_rate(self) -> int | None: ...

    def require_guidance(self, guidance: float) -> None: ...

    def longest_conditioning(self, count: int) -> Mapping[str, Tensor]: ...

    def run_denoiser(self, x: Tensor, timestep: Tensor, tensors: Mapping[str, Tensor]) -> Tensor: ...

    def run_vae(self, latents: Tensor) -> Tensor: ...

    def zeros(self, *shape: int) -> Tensor: ...


@dataclass(frozen=True)
class NetworkSize:
    """The parameter count of a network, and how many of them quantization takes: the weights of linear layers."""

    name: str
    parameters: int
    linear: int


@dataclass(frozen=True)
class Outline:
    """A checkpoint opened without its weights, at ``width`` bytes per number.

    ``networks`` are the sizes of its networks without an adapter, the denoiser first.
    """

    pipeline: MetaPipeline
    networks: Sequence[NetworkSize]
    memory: Memory
    width: int


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by name: held during the whole run (``always``), and in addition during each phase of a round."""

    always: Mapping[str, float]
    phases: Mapping[str, Mapping[str, float]]

    @property
    def peaks(self) -> dict[str, float]:
        """The total bytes in each phase."""
        base = sum(self.always.values())
        return {phase: base + sum(extra.values()) for phase, extra in self.phases.items()}


def prediction_activations(outline: Outline, samples: int, guidance: float) -> int:
    """Bytes that autograd saves in one prediction for ``samples``, twice as many under guidance."""
    pipeline, rows = outline.pipeline, samples * (2 if guidance > 1 else 1)
    x, conditioning = pipeline.zeros(rows, *pipeline.latent_shape), pipeline.longest_conditioning(rows)
    timestep = torch.zeros(rows, device=x.device)
    return saved_activations(
        pipeline.denoiser, lambda: pipeline.run_denoiser(x, timestep, conditioning), outline.memory.checkpointing
    )


def estimate_memory(
    outline: Outline, policy: Policy, recipe: Recipe, settings: TrainerSettings, guidance: float, stored: int
) -> MemoryEstimate:
    """Estimate the memory of the training device; rewards' networks and temporary tensors are not counted.

    Args:
        outline: The checkpoint.
        policy: The policy of its denoiser, with the adapter if there is one.
        recipe: The method, which may sample with a copy of the trained weights.
        settings: Batch size, samples in a round and the optimizer.
        guidance: The guidance scale; above 1 the network sees twice the samples.
        stored: Stored tensors of a latent's size for each sample, as ``dry_run`` counts them.
    """
    pipeline, memory, width = outline.pipeline, outline.memory, outline.width
    denoiser, *others = outline.networks
    frozen = {network.name: float(network.parameters * width) for network in others}
    if policy.config is not None:  # an adapter is trained
        linear_width = _QUANTIZED[memory.quantization] if memory.quantization else width
        weights = (denoiser.parameters - denoiser.linear) * width + denoiser.linear * linear_width
    else:
        weights = 4.0 * denoiser.parameters  # float32

    # Per trained number: gradient, moving average, the adapter's weight or else the first weight, moments, old policy
    per_trained = 4 + 4 + 4 + _MOMENTS[settings.optimizer] + 4 * (recipe.lag is not None)
    trained = sum(parameter.numel() for parameter in policy.parameters)
    always = {denoiser.name: float(weights), "trained weights and optimizer": float(trained * per_trained)}
    always |= {} if memory.offload else frozen
    moved = frozen if memory.offload else {}

    # A round: float32 of every sample's stored latents, and of its decoded image or audio
    per_sample = stored * math.prod(pipeline.latent_shape) + math.prod(pipeline.sample_shape)
    samples = {"samples": 4.0 * settings.prompts_per_round * settings.group_size * per_sample}
    latents = pipeline.zeros(memory.decode_batch or settings.batch_size, *pipeline.latent_shape)
    layers = 3.0 * largest_layer(pipeline.pipe.vae, lambda: pipeline.run_vae(latents))
    activations = float(prediction_activations(outline, settings.batch_size, guidance))
    encoders = {name: size for name, size in moved.items() if name.startswith("text_encoder")}
    vae = {name: size for name, size in moved.items() if name == "vae"}
    decoding, learning = vae | samples | {"decoder layers": layers}, samples | {"activations": activations}
    return MemoryEstimate(always, {"encoding": encoders, "decoding": decoding, "learning": learning})
