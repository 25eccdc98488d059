"""Rewards the text in an image, read by optical character recognition (OCR)."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from genalign.evaluation.benchmarks.ocr import QUOTED, edit_similarity
from genalign.types import AnyCallable, Prompt
from rewards.backbones.pixels import pictures


def rapidocr(picture: Image.Image, least_confidence: float = 0.5) -> str:
    """Read the lines of a picture with PP-OCR, from top to bottom, and drop lines of low confidence.

    Uses the package rapidocr (``pip install 'genalign[ocr]'``), whose wheel has the weights (Apache-2.0), on the CPU.
    Raises ModuleNotFoundError where it is not installed.
    """
    output = _engine()(picture, text_score=least_confidence)
    return "\n".join(output.txts or ())


@dataclass(frozen=True)
class OCRReward:
    """The similarity of the text in an image to the text in its prompt, in [0, 1]; see ``requested_texts``.

    It is ``genalign.evaluation.benchmarks.ocr.edit_similarity``, and its mean for several texts, where Flow-GRPO (arXiv
    2505.05470) takes the first one only. ``reader`` is any ``genalign.evaluation.benchmarks.ocr.Reader``.
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
        texts = [straight or curly for straight, curly in QUOTED.findall(prompt.text)]
    return tuple(text for text in texts if text.strip())


@functools.cache
def _engine() -> Any:
    try:
        from rapidocr import RapidOCR
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("OCR needs rapidocr and onnxruntime: pip install 'genalign[ocr]'") from error
    threads = "EngineConfig.onnxruntime.intra_op_num_threads"
    return RapidOCR(params={"Global.log_level": "critical", threads: torch.get_num_threads()})
