"""Networks of a diffusers pipeline of the user's own, called on a bounded number of samples at a time.

The results are those of whole batches up to rounding, since no sample of these networks depends on another.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.audioldm2 import AudioLDM2UNet2DConditionModel
from torch import Tensor, nn

from pipelines.steering.scheduler_hooks import replaced

_SHARED: dict[type[nn.Module], frozenset[str]] = {
    diffusers.UNet2DConditionModel: frozenset({"cross_attention_kwargs"}),
    diffusers.SD3Transformer2DModel: frozenset({"joint_attention_kwargs", "skip_layers"}),
    diffusers.FluxTransformer2DModel: frozenset(
        {"img_ids", "txt_ids", "joint_attention_kwargs", "controlnet_blocks_repeat"}
    ),
    diffusers.Flux2Transformer2DModel: frozenset({"img_ids", "txt_ids", "joint_attention_kwargs"}),
    diffusers.SanaTransformer2DModel: frozenset({"attention_kwargs"}),
    diffusers.QwenImageTransformer2DModel: frozenset({"attention_kwargs"}),
    diffusers.QwenImage21Transformer2DModel: frozenset({"attention_kwargs", "img_mask", "img_shapes"}),
    diffusers.ZImageTransformer2DModel: frozenset({"joint_attention_kwargs", "patch_size", "f_patch_size"}),
    diffusers.StableAudioDiTModel: frozenset({"rotary_embedding"}),
    AudioLDM2UNet2DConditionModel: frozenset({"cross_attention_kwargs"}),
    diffusers.AceStepTransformer1DModel: frozenset({"attention_kwargs"}),
}
"""Arguments of networks that all samples share; every other one has a row for each sample, or one for all."""

_LISTS = frozenset({"x", "cap_feats"})
"""Arguments of Z-Image's network that are lists of one tensor for each sample; other lists are of tensors with rows."""


def denoiser_of(pipe: DiffusionPipeline) -> nn.Module:
    """Return the transformer or the unet of a pipeline. Raises ValueError if it has neither."""
    network: nn.Module | None = getattr(pipe, "transformer", None) or getattr(pipe, "unet", None)
    if network is None:
        raise ValueError(
            f"{type(pipe).__name__} has neither a transformer nor a unet: wrap it as a genalign pipeline, and search"
            " with genalign.search.search"
        )
    return network


@contextmanager
def bounded_batches(pipe: DiffusionPipeline, size: int | None) -> Iterator[None]:
    """Within the context, call the denoiser on at most ``size`` rows at a time, and the autoencoder's decoder too.

    Guidance gives the denoiser two rows of a sample. None bounds nothing. Raises ValueError for a ``size`` below 1, or
    a network whose arguments are not known here.
    """
    if size is None:
        yield
        return
    if size < 1:
        raise ValueError(f"batch_size must be at least 1 sample, or None for whole batches, not {size}")
    network = denoiser_of(pipe)
    inner = getattr(network, "_orig_mod", network)  # of a compiled network
    kind = next((kind for kind in _SHARED if isinstance(inner, kind)), None)
    if kind is None:
        names = ", ".join(sorted(kind.__name__ for kind in _SHARED))
        raise ValueError(
            f"batch_size cannot divide the calls of {type(inner).__name__}, whose arguments are not known: leave it"
            f" out, and call the pipeline with fewer samples; it divides those of {names}"
        )
    signature = inspect.signature(type(inner).forward)
    with ExitStack() as stack:
        forward = _divided(network.forward, signature, size, _SHARED[kind])
        stack.enter_context(replaced(network, "forward", forward))
        if getattr(pipe, "vae", None) is not None:
            decode = pipe.vae.decode

            def decode_parts(latents: Tensor, *args: Any, **kwargs: Any) -> Any:
                return _joined([decode(part, *args, **kwargs) for part in torch.split(latents, size)])

            stack.enter_context(replaced(pipe.vae, "decode", decode_parts))
        yield


def _divided(
    method: Callable[..., Any], signature: inspect.Signature, size: int, shared: frozenset[str]
) -> Callable[..., Any]:
    """Return a network's forward method that calls ``method`` on at most ``size`` rows at a time."""

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind(None, *args, **kwargs).arguments  # None stands for self
        _, first, *_ = arguments
        count = len(arguments[first])
        if count <= size:
            return method(*args, **kwargs)
        del arguments[next(iter(arguments))]
        if arguments.get("kv_cache") is not None:
            raise ValueError("batch_size cannot divide the cache of a call: call the pipeline with use_kv_cache=False")
        common = {name: arguments.pop(name) for name in shared & arguments.keys()}
        for name, value in common.items():  # settings of the attention may hold rows of samples
            if isinstance(value, Mapping) and not all(isinstance(v, float | int | str | None) for v in value.values()):
                held = ", ".join(map(str, value))
                raise ValueError(f"batch_size cannot divide what {name} holds ({held}): leave it out")
        outputs = []
        for start in range(0, count, size):
            rows = slice(start, start + size)
            part = {name: _rows(value, rows, count, name) for name, value in arguments.items()}
            outputs.append(method(**part, **common))
        return _joined(outputs)

    return call


def _rows(value: Any, rows: slice, count: int, name: str) -> Any:
    """Select rows of every tensor, and every list of plain values, that has one for each of ``count`` samples."""
    if isinstance(value, Tensor):
        if value.ndim == 0 or len(value) == 1:
            return value
        if len(value) != count:
            raise ValueError(f"batch_size cannot divide {name}, of shape {tuple(value.shape)}, among {count} samples")
        return value[rows]
    if isinstance(value, Mapping):
        return {key: _rows(inner, rows, count, f"{name}[{key!r}]") for key, inner in value.items()}
    if isinstance(value, list | tuple):
        if value and isinstance(value[0], Tensor) and name not in _LISTS:
            return type(value)(_rows(inner, rows, count, name) for inner in value)
        return value[rows] if len(value) == count else value
    return value


def _joined(outputs: list[Any]) -> Any:
    """Join the outputs of batches: tensors, lists of samples, tuples of these, or the dataclasses of diffusers."""
    first = outputs[0]
    if isinstance(first, Tensor):
        return torch.cat(outputs)
    if isinstance(first, list):
        return [sample for output in outputs for sample in output]
    if isinstance(first, tuple):
        return tuple(_joined(list(column)) for column in zip(*outputs, strict=True))
    if is_dataclass(first) and not isinstance(first, type):
        return type(first)(
            **{field.name: _joined([getattr(output, field.name) for output in outputs]) for field in fields(first)}
        )
    return first
