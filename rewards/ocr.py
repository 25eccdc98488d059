"""Rewards the text in an image, read by optical character recognition (OCR)."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from genalign.types import AnyCallable, Prompt
from rewards.backbones.pixels import pictures

Reader = Callable[[Image.Image], str]
"""Reads the text of a picture, in reading order; "" where there is none."""

_QUOTED = re.compile(r'"([^"]*)"|“([^”]*)”')


def rapidocr(picture: Image.Image, least_confidence: float = 0.5) -> str:
    """Read the lines of a picture with PP-OCR, from top to bottom, and drop lines of low confidence; a ``Reader``.

    Uses the package rapidocr (``pip install 'genalign[ocr]'``), whose wheel has the weights (Apache-2.0), on the CPU.
    Raises ModuleNotFoundError where it is not installed.
    """
    output = _engine()(picture, text_score=least_confidence)
    return "\n".join(output.txts or ())


@dataclass(frozen=True)
class OCRReward:
    """The ``edit_similarity`` of the text in an image to the text in its prompt, in [0, 1]; see ``requested_texts``.

    For several texts it is the mean. Flow-GRPO (arXiv 2505.05470) takes the first one only. ``reader`` is any
    ``Reader``.
    """

    reader: AnyCallable = rapidocr

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Score images (B, 3, H, W) in [0, 1] as (B,), float32 on the CPU, without a gradient.

        NaN for a prompt that requests no text, and for an image that is not finite.
        """
        scores = []
        for picture, prompt in zip(pictures(samples), prompts, strict=True):
            requested = requested_texts(prompt)
            if picture is None or not requested:
                scores.append(math.nan)
                continue
            written = self.reader(picture)
            scores.append(math.fsum(edit_similarity(written, text) for text in requested) / len(requested))
        return torch.tensor(scores)


def requested_texts(prompt: Prompt) -> tuple[str, ...]:
    """Return the texts that an image of ``prompt`` should show, without blank ones.

    They are its metadata's "text", a string or list, or else the parts in double quotes, straight or curly.
    """
    if prompt.metadata is not None and "text" in prompt.metadata:
        text = prompt.metadata["text"]
        texts = [text] if isinstance(text, str) else [str(part) for part in text]
    else:
        texts = [straight or curly for straight, curly in _QUOTED.findall(prompt.text)]
    return tuple(text for text in texts if text.strip())


def edit_similarity(written: str, requested: str) -> float:
    """Compute 1 - d / n, in [0, 1], for the n letters of ``requested`` and the edit distance d, at most n.

    It is 1 where ``written`` contains ``requested``. Case and white space are ignored (Flow-GRPO, arXiv 2505.05470).
    Raises ValueError for n = 0.
    """
    text, target = ("".join(string.lower().split()) for string in (written, requested))
    if not target:
        raise ValueError("the requested text is empty: leave out prompts without a text")
    if target in text:
        return 1.0
    return 1 - min(edit_distance(text, target), len(target)) / len(target)


def edit_distance(first: str, second: str) -> int:
    """Count the fewest letters to insert, delete or replace (Levenshtein, 1966)."""
    row = list(range(len(second) + 1))
    for i, letter in enumerate(first, start=1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(second, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (letter != other))
    return row[-1]


@functools.cache
def _engine() -> Any:
    try:
        from rapidocr import RapidOCR
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("OCR needs rapidocr and onnxruntime: pip install 'genalign[ocr]'") from error
    threads = "EngineConfig.onnxruntime.intra_op_num_threads"
    return RapidOCR(params={"Global.log_level": "critical", threads: torch.get_num_threads()})
