"""Text rendering: the text that a reader of characters sees in an image, against the quoted text of its prompt.

The rule is that of Flow-GRPO's OCR task (arXiv:2505.05470).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from rapidfuzz.distance import Levenshtein
from torch import Tensor

from genalign.evaluation.benchmarks.benchmark import (
    LEFT_OUT,
    MISSING,
    Benchmark,
    average,
    by_prompt,
    distinct_prompts,
    percent,
    require_metadata,
)
from genalign.evaluation.evaluate import SampleRecord
from genalign.evaluation.scorers import ExplainedScores
from genalign.runtime.media import eight_bits
from genalign.runtime.prompt_files import load_prompts
from genalign.types import Prompt, PromptSet

Reader = Callable[[Image.Image], str]
"""Reads the text of a picture, in reading order; "" where there is none."""

QUOTED = re.compile(r'"([^"]*)"|“([^”]*)”')
"""A text in double quotes, straight or curly."""


def read_ocr(paths: Sequence[Path]) -> PromptSet:
    """Read prompts that quote the text to draw, one per line or row.

    The first text in double quotes becomes ``text`` in the metadata, unless a row has its own. Raises ValueError for a
    prompt without quotes.
    """
    prompts: list[Prompt] = []
    for path in paths:
        for number, prompt in enumerate(load_prompts(path).prompts, start=1):
            metadata, match = dict(prompt.metadata or {}), QUOTED.search(prompt.text)
            text = metadata.get("text") or (match and (match[1] or match[2]))
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"{path}, prompt {number}: no text in double quotes to be drawn in {prompt.text!r}")
            prompts.append(Prompt(prompt.text, {**metadata, "tag": "ocr", "text": text, "prompt": prompt.text}))
    return distinct_prompts(paths[0].stem if paths else "ocr", prompts)


def edit_similarity(written: str, requested: str) -> float:
    """Compute 1 - d / n, in [0, 1], for the n letters of ``requested`` and the edit distance d, at most n.

    It is 1 where ``written`` contains ``requested``. Case and white space are ignored. Raises ValueError for n = 0.
    """
    text, target = ("".join(string.lower().split()) for string in (written, requested))
    if not target:
        raise ValueError("the requested text is empty: leave out prompts without a text")
    if target in text:
        return 1.0
    return 1 - min(Levenshtein.distance(text, target), len(target)) / len(target)


@dataclass(frozen=True)
class OcrScorer:
    """The ``edit_similarity`` of the text in an image to the text in its prompt's metadata."""

    reader: Reader

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> ExplainedScores:
        """Score images (B, 3, H, W) in [0, 1]; the details are the texts, None for an image that is not finite."""
        texts: list[str | None] = []
        for image, pixels in zip(samples, eight_bits(samples).permute(0, 2, 3, 1).cpu().numpy(), strict=True):
            texts.append(self.reader(Image.fromarray(pixels.copy())) if bool(image.isfinite().all()) else None)
        scores = [
            math.nan if text is None else edit_similarity(text, require_metadata(prompt, "text"))
            for text, prompt in zip(texts, prompts, strict=True)
        ]
        return ExplainedScores(torch.tensor(scores), [{"text": text} for text in texts])


def aggregate_ocr(records: Sequence[SampleRecord], prompts: PromptSet) -> dict[str, float]:
    """Average the similarities over images, then over prompts, and the share of images with the whole text."""
    groups = by_prompt(records, prompts)
    scores = [[row.scores["ocr"] for row in rows] for _, rows in groups]
    exact = [[float(score == 1) if math.isfinite(score) else None for score in group] for group in scores]
    unread = sum(not math.isfinite(score) for group in scores for score in group)
    return {
        "ocr": percent(map(average, scores)),
        "whole text": percent(map(average, exact)),
        MISSING: float(unread),
        LEFT_OUT: float(unread),
    }


OCR = Benchmark(
    name="ocr",
    read=read_ocr,
    needs=lambda prompts, judges: ("reader",),
    scorers=lambda judges: {"ocr": OcrScorer(judges.need("reader"))},
    aggregate=aggregate_ocr,
    rules=(
        "ocr-1: Flow-GRPO's edit similarity to the first quoted text; an image that cannot be read is left out, where"
        " the original counts 0; the reader stands for PaddleOCR 2.9.1"
    ),
)
