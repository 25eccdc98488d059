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
from torch import Tensor

from genalign.types import AnyCallable, Prompt


@dataclass(frozen=True)
class Adapted:
    """``function(images, prompts, **metadata)``, which returns one number per image, or None for no score.

    ``images`` are given as a list of PIL images ("pil"), as the tensor (B, 3, H, W) in [0, 1] that they are
    ("tensor"), or as uint8 (B, H, W, 3) in numpy ("numpy"); waveforms only as a tensor. ``prompts`` are texts.
    ``metadata`` says how the prompts' metadata are given: as "columns", a keyword with a list of B values for each key
    (TRL), or as "rows", a third argument with a list of B dictionaries (flow_grpo). Where a pair is returned, its
    first element is the scores. The function may be ``async``.
    """

    function: AnyCallable
    images: Literal["pil", "tensor", "numpy"] = "pil"
    metadata: Literal["columns", "rows"] = "columns"

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores (B,) in float32; NaN for None, and for a sample with values that are not finite.

        Raises ValueError for any other result than B numbers.
        """
        texts, rows = [prompt.text for prompt in prompts], [dict(prompt.metadata or {}) for prompt in prompts]
        images = self._images(samples)
        if self.metadata == "rows":
            result = self.function(images, texts, rows)
        else:
            result = self.function(images, texts, **_columns(rows))
        if inspect.iscoroutine(result):  # in a thread of its own: this one may have a running event loop
            with ThreadPoolExecutor(1) as thread:
                result = thread.submit(asyncio.run, result).result()
        scores = _scores(result[0] if isinstance(result, tuple) else result, len(samples))
        return scores.masked_fill(~samples.isfinite().flatten(1).all(1).to(scores.device), torch.nan)

    def _images(self, samples: Tensor) -> Any:
        if self.images == "tensor":
            return samples
        if samples.ndim != 4 or samples.shape[1] != 3:
            raise ValueError(f'samples {tuple(samples.shape)} are not images (B, 3, H, W): give them as "tensor"')
        pixels = (samples.detach().float().nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8)
        array = pixels.permute(0, 2, 3, 1).cpu().numpy()
        if self.images == "numpy":
            return array
        from PIL import Image

        return [Image.fromarray(image) for image in array]


def _columns(rows: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """A list of values for every key that any row has, None for rows without it."""
    names = dict.fromkeys(name for row in rows for name in row)
    if reserved := {"images", "prompts"} & set(names):
        raise ValueError(f'the metadata key {reserved.pop()!r} is an argument of the function already: use "rows"')
    return {str(name): [row.get(name) for row in rows] for name in names}


def _scores(result: Any, count: int) -> Tensor:
    if isinstance(result, Tensor):
        return _of_shape(result.float(), count)
    if not isinstance(result, list | tuple | np.ndarray):
        raise ValueError(
            f"the function returned a {type(result).__name__}: return a list with a number, or None, for each"
        )
    values = [value.item() if isinstance(value, Tensor | np.generic) else value for value in result]
    if wrong := [value for value in values if not (value is None or isinstance(value, numbers.Real))]:
        raise ValueError(f"the function returned {wrong[0]!r} for an image: return a number, or None where it has none")
    return _of_shape(torch.tensor([torch.nan if value is None else float(value) for value in values]), count)


def _of_shape(scores: Tensor, count: int) -> Tensor:
    if scores.shape != (count,):
        raise ValueError(
            f"the function returned {tuple(scores.shape)} for {count} images: return a list with one number, or None,"
            " for each"
        )
    return scores
