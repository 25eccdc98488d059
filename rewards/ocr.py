"""Whether an image shows the text that its prompt asks for, by optical character recognition."""

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

from genalign.types import Prompt
from rewards.backbones.pixels import pictures

Reader = Callable[[Image.Image], str]
"""Everything that is written in a picture, in reading order; "" where there is nothing."""

_QUOTED = re.compile(r'"([^"]*)"|“([^”]*)”')


def rapidocr(picture: Image.Image, least_confidence: float = 0.5) -> str:
    """The lines of a picture by PP-OCR, from top to bottom, without those that it is less sure of; a ``Reader``.

    By the package rapidocr (``pip install 'genalign[ocr]'``), whose wheel has the weights (Apache-2.0), on the CPU.
    Raises ModuleNotFoundError where it is not installed.
    """
    found = _engine()(picture, text_score=least_confidence)
    return "\n".join(found.txts or ())


@dataclass(frozen=True)
class OCRReward:
    """``edit_similarity`` of what an image shows to what its prompt wants written, in [0, 1]; see ``wanted_texts``.

    For several texts it is the mean. Flow-GRPO (arXiv 2505.05470) looks for the first alone.
    """

    reader: Callable = rapidocr  # type: ignore[type-arg]  # bare: configurations name any Reader

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores (B,), float32 on the CPU, of images (B, 3, H, W) in [0, 1]; no gradient. NaN for a prompt that wants
        no text, and for an image that is not finite."""
        pairs = zip(pictures(samples), prompts, strict=True)
        return torch.tensor([self._score(picture, wanted_texts(prompt)) for picture, prompt in pairs])

    def _score(self, picture: Image.Image | None, wanted: Sequence[str]) -> float:
        if picture is None or not wanted:
            return math.nan
        written = self.reader(picture)
        return math.fsum(edit_similarity(written, text) for text in wanted) / len(wanted)


def wanted_texts(prompt: Prompt) -> tuple[str, ...]:
    """The texts that an image of ``prompt`` is to show: its metadata's "text", a string or a list of them, or else what
    stands in double quotes, straight or curly. Blank ones are left out."""
    if prompt.metadata is not None and "text" in prompt.metadata:
        given = prompt.metadata["text"]
        texts = [given] if isinstance(given, str) else [str(text) for text in given]
    else:
        texts = [straight or curly for straight, curly in _QUOTED.findall(prompt.text)]
    return tuple(text for text in texts if text.strip())


def edit_similarity(written: str, wanted: str) -> float:
    """1 - d / n, in [0, 1], for n letters of ``wanted`` and the edit distance d, at most n; 1 where ``written`` has
    ``wanted`` in it. Neither case nor white space counts (Flow-GRPO, arXiv 2505.05470). ValueError for n = 0.
    """
    found, target = ("".join(text.lower().split()) for text in (written, wanted))
    if not target:
        raise ValueError("there is no text to look for: leave out samples whose prompt wants none")
    if target in found:
        return 1.0
    return 1 - min(edit_distance(found, target), len(target)) / len(target)


def edit_distance(first: str, second: str) -> int:
    """The least number of letters to insert, remove or replace (Levenshtein, 1966)."""
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
        raise ModuleNotFoundError("reading text needs rapidocr and onnxruntime: pip install 'genalign[ocr]'") from error
    threads = "EngineConfig.onnxruntime.intra_op_num_threads"
    return RapidOCR(params={"Global.log_level": "critical", threads: torch.get_num_threads()})
