"""Adapts reward functions written for flow_grpo or TRL."""

from __future__ import annotations

import asyncio
import inspect
import numbers
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from genalign.runtime.media import eight_bits
from genalign.types import AnyCallable, Prompt


@dataclass(frozen=True)
class Adapted:
    """A reward from ``function(images, prompts, **metadata)``, which returns one number per image, None for no score.

    Args:
        function: The function of B images and the texts of their prompts, which may be ``async``. If it returns a pair,
            the first element is the scores.
        images: The form of the images: a list of PIL images ("pil"), the tensor (B, 3, H, W) in [0, 1] ("tensor"), or
            uint8 (B, H, W, 3) in numpy ("numpy"). Waveforms come only as a tensor.
        metadata: The form of the prompts' metadata: "columns", a keyword with a list of B values for each key (TRL), or
            "rows", a third argument with a list of B dictionaries (flow_grpo).
    """

    function: AnyCallable
    images: Literal["pil", "tensor", "numpy"] = "pil"
    metadata: Literal["columns", "rows"] = "columns"

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Score samples as (B,) in float32; NaN for None, and for a sample with values that are not finite.

        Raises ValueError for any other result than B numbers.
        """
        texts, rows = [prompt.text for prompt in prompts], [dict(prompt.metadata or {}) for prompt in prompts]
        images = self._convert(samples)
        if self.metadata == "rows":
            result = self.function(images, texts, rows)
        else:
            names = dict.fromkeys(name for row in rows for name in row)
            if reserved := {"images", "prompts"} & set(names):
                name = reserved.pop()
                raise ValueError(f'the metadata key {name!r} is an argument of the function already: use "rows"')
            result = self.function(images, texts, **{name: [row.get(name) for row in rows] for name in names})
        if inspect.iscoroutine(result):  # in a thread of its own: this one may have a running event loop
            with ThreadPoolExecutor(1) as thread:
                result = thread.submit(asyncio.run, result).result()
        scores = _scores(result[0] if isinstance(result, tuple) else result, len(samples))
        return scores.masked_fill(~samples.isfinite().flatten(1).all(1).to(scores.device), torch.nan)

    def _convert(self, samples: Tensor) -> Any:
        """Convert images (B, 3, H, W) in [0, 1] to the function's form."""
        if self.images == "tensor":
            return samples
        if samples.ndim != 4 or samples.shape[1] != 3:
            raise ValueError(f'samples {tuple(samples.shape)} are not images (B, 3, H, W): give them as "tensor"')
        array = eight_bits(samples).permute(0, 2, 3, 1).cpu().numpy()
        return array if self.images == "numpy" else [Image.fromarray(image) for image in array]


def _scores(result: Any, count: int) -> Tensor:
    """Convert a function's result to scores (B,) in float32, NaN for None."""
    if not isinstance(result, Tensor | list | tuple | np.ndarray):
        kind = type(result).__name__
        raise ValueError(f"the function returned a {kind}: return a list with a number, or None, for each")
    if isinstance(result, Tensor):
        scores = result.float()
    else:
        values = [value.item() if isinstance(value, Tensor | np.generic) else value for value in result]
        if wrong := [value for value in values if not (value is None or isinstance(value, numbers.Real))]:
            raise ValueError(f"the function returned {wrong[0]!r} for an image: return a number, or None for no score")
        scores = torch.tensor([torch.nan if value is None else float(value) for value in values])
    if scores.shape != (count,):
        shape = tuple(scores.shape)
        raise ValueError(f"the function returned {shape} for {count} images: return one number, or None, for each")
    return scores
