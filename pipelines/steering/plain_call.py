"""The call of a pipeline that a user makes, seen from inside: its arguments, and the plain call to compare it with."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline, Flux2KleinPipeline
from torch import Tensor

Arguments = dict[str, Any]
_PER_PROMPT = ("num_images_per_prompt", "num_waveforms_per_prompt")
_CALLBACKS = ("callback", "callback_steps", "callback_on_step_end", "callback_on_step_end_tensor_inputs")


@contextmanager
def wrapped_call(pipe: DiffusionPipeline, around: Callable[[Callable[..., Any], Arguments], Any]) -> Iterator[None]:
    """Let ``pipe(...)`` return ``around(call, arguments)`` in the context, where ``call(**arguments)`` is the call.

    Python looks ``__call__`` up on the class alone, so the pipeline has a subclass of its own as long.
    """
    kind = type(pipe)
    signature = inspect.signature(kind.__call__)

    @functools.wraps(kind.__call__)
    def call(self: DiffusionPipeline, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs).arguments
        extra = bound.pop("kwargs", {})  # of a pipeline that takes any
        _, *arguments = bound.items()
        return around(functools.partial(kind.__call__, self), {**dict(arguments), **extra})

    pipe.__class__ = type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})
    try:
        yield
    finally:
        pipe.__class__ = kind


def copied_generators(arguments: Mapping[str, Any]) -> list[torch.Generator] | None:
    """Copy the generators of a call in their present state; None if it has none."""
    generators = arguments.get("generator")
    if generators is None:
        return None
    listed = generators if isinstance(generators, list) else [generators]
    return [torch.Generator(one.device).set_state(one.get_state()) for one in listed]


def call_latents(pipe: DiffusionPipeline, latents: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """Return latents (N, ...) of the scheduler as a call of the pipeline with these ``arguments`` takes them."""
    if not isinstance(pipe, Flux2KleinPipeline):
        return latents
    factor = int(pipe.vae_scale_factor)  # the call takes patches that are not yet a sequence
    sides = [arguments.get(side) or pipe.default_sample_size * factor for side in ("height", "width")]
    height, width = (side // (2 * factor) for side in sides)
    return latents.transpose(1, 2).reshape(len(latents), -1, height, width)


def plain_arguments(
    pipe: DiffusionPipeline,
    arguments: Arguments,
    firsts: Sequence[int],
    samples: int,
    latents: Tensor,
    generators: Sequence[torch.Generator] | None,
) -> Arguments:
    """Return the arguments of a call that makes the first sample of each prompt alone, up to its latents.

    Args:
        pipe: The pipeline.
        arguments: The arguments of the call for all samples.
        firsts: The place of each prompt's first sample.
        samples: The number of samples of the call.
        latents: The initial latents of the first samples, as the scheduler has them.
        generators: The call's generators as they were before it: one, or one for each sample.
    """
    names = inspect.signature(type(pipe).__call__).parameters
    count = next((int(arguments[name]) for name in _PER_PROMPT if arguments.get(name)), 1)
    rows, plain = samples // count, {name: value for name, value in arguments.items() if name not in _CALLBACKS}
    if rows != len(firsts):  # prompts or embeddings are repeated for the samples of a prompt
        for name, value in plain.items():
            own = "prompt" in name or "mask" in name or name == "lyrics"
            if own and isinstance(value, list | Tensor) and len(value) == rows:
                selected = [value[first // count] for first in firsts]
                plain[name] = torch.stack(selected) if isinstance(value, Tensor) else selected
    plain |= {name: 1 for name in _PER_PROMPT if name in names}
    if generators is not None:
        plain["generator"] = [generators[first] for first in firsts] if len(generators) == samples else generators[0]
    if "latents" in names:
        scale = getattr(pipe.scheduler, "init_noise_sigma", 1.0)  # pipelines multiply by it; flow schedulers have none
        plain["latents"] = call_latents(pipe, latents / scale, arguments)
    return {**plain, "output_type": "latent", "return_dict": False}
