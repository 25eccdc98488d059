"""The GPU memory of a training run, estimated from shapes before any weights are read. Checked on no GPU yet."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from genalign.algorithms.recipes import Recipe
from genalign.diffusion.policy import Policy
from genalign.runtime.memory_options import Memory
from genalign.training.settings import FittedSettings
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
    outline: Outline, policy: Policy, recipe: Recipe, settings: FittedSettings, guidance: float, stored: int
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

    # Per trained number: gradient and moments; of an adapter also its weight, moving average and old policy, which wait
    # on the CPU where the whole network is trained
    per_trained = 4 + _MOMENTS[settings.optimizer]
    if policy.config is not None:
        per_trained += 4 + 4 + 4 * (recipe.lag is not None)
    trained = sum(parameter.numel() for parameter in policy.parameters)
    always = {denoiser.name: float(weights), "trained weights and optimizer": float(trained * per_trained)}
    moved = frozen if memory.offload == "all" else {}
    if memory.offload == "text":
        moved = {name: size for name, size in frozen.items() if name.startswith("text_encoder")}
    always |= {name: size for name, size in frozen.items() if name not in moved}

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


class _FusedAttentionFunction(torch.autograd.Function):
    """Attention that saves what fused kernels save: query, key, value, output. Its values are not computed."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = value.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, output)
        return output


class FusedAttention(TorchFunctionMode):
    """A context in which ``scaled_dot_product_attention`` saves what fused kernels save; the meta device has none."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        named = dict(zip(("query", "key", "value"), args, strict=False)) | dict(kwargs or {})
        return _FusedAttentionFunction.apply(named["query"], named["key"], named["value"])


def saved_activations(network: nn.Module, run: Callable[[], Tensor], checkpointing: bool) -> int:
    """Bytes that autograd saves during ``run``, a forward pass of ``network``: each storage once, without weights.

    With ``checkpointing`` this is the peak of the backward pass: the inputs of all checkpointed blocks, everything
    saved outside of them, and everything saved within the largest of them.
    """
    weights = {tensor.untyped_storage()._cdata for tensor in (*network.parameters(), *network.buffers())}
    outside: dict[int, int] = {}  # bytes by storage
    blocks: list[dict[int, int]] = [{}]
    saving = outside

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            saving[storage._cdata] = storage.nbytes()
        return tensor

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal saving
        for tensor in _tensors([*args, *kwargs.values()]):
            save(tensor)
        saving = {}
        blocks.append(saving)

    def leave(module: nn.Module, args: object, output: object) -> None:
        nonlocal saving
        saving = outside

    with contextlib.ExitStack() as hooks:
        for block in checkpointed_blocks(network) if checkpointing else ():
            hooks.enter_context(block.register_forward_pre_hook(enter, with_kwargs=True))
            hooks.enter_context(block.register_forward_hook(leave))
        with FusedAttention(), torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            output = run()  # alive until the sum is taken: the address of a freed storage may be used again
        total = sum(outside.values()) + max(sum(inside.values()) for inside in blocks)
        del output
        return total


def checkpointed_blocks(network: nn.Module) -> Iterator[nn.Module]:
    """The blocks that diffusers recomputes under gradient checkpointing, down to the innermost.

    They are the entries of the module lists of every module that has the flag ``gradient_checkpointing``.
    """
    for module in network.modules():
        if "gradient_checkpointing" in vars(module):
            for block in itertools.chain(*(child for child in module.children() if isinstance(child, nn.ModuleList))):
                if not any("gradient_checkpointing" in vars(inner) for inner in block.modules()):
                    yield block


@torch.no_grad()
def largest_layer(network: nn.Module, run: Callable[[], Tensor]) -> int:
    """The most bytes that the input and output of one layer of ``network`` take during ``run``."""
    sizes = [0]

    def measure(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        sizes.append(sum(tensor.nbytes for tensor in _tensors([*args, output])))

    with contextlib.ExitStack() as hooks, FusedAttention():
        for layer in network.modules():
            if not list(layer.children()):
                hooks.enter_context(layer.register_forward_hook(measure))
        run()
    return max(sizes)


def _tensors(values: Sequence[object]) -> list[Tensor]:
    return [value for value in values if isinstance(value, Tensor)]
