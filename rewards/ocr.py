"""Rewards the text in an image, read by optical character recognition (OCR)."""

from __future__ import annotations

import functools
import math
import multiprocessing
import os
import signal
import sys
import types
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from genalign.evaluation.benchmarks.ocr import QUOTED, edit_similarity
from genalign.types import AnyCallable, Prompt
from rewards.backbones import text_engine
from rewards.backbones.pixels import pictures

_FEW_CORES = 2  # with which processes cost more than they gain


def rapidocr(picture: Image.Image, least_confidence: float = 0.5) -> str:
    """Read the lines of a picture with PP-OCR, from top to bottom, and drop lines of low confidence.

    Uses the package rapidocr (``pip install 'genalign[ocr]'``), whose wheel has the weights (Apache-2.0), on the CPU,
    with this rank's share of the cores as threads. Raises ModuleNotFoundError where it is not installed.
    """
    return text_engine.read(picture, least_confidence, cores_of_rank())


@dataclass(frozen=True)
class OCRReward:
    """The similarity of the text in an image to the text in its prompt, in [0, 1]; see ``requested_texts``.

    It is ``genalign.evaluation.benchmarks.ocr.edit_similarity``, and its mean for several texts, where Flow-GRPO (arXiv
    2505.05470) takes the first one only.

    Args:
        reader: The function that reads the text of a picture, any ``genalign.evaluation.benchmarks.ocr.Reader``.
        processes: The number of processes that read at once, each with one thread; 1 reads in this process. null takes
            the cores of this rank (those of the machine divided by its ranks), and 1 with two cores or fewer or with a
            reader of your own. More than 1 needs a reader that other processes can import.
    """

    reader: AnyCallable = rapidocr
    processes: int | None = None

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Score images (B, 3, H, W) in [0, 1] as (B,), float32 on the CPU, without a gradient.

        NaN for a prompt that requests no text, and for an image that is not finite.
        """
        listed, requested = pictures(samples), [requested_texts(prompt) for prompt in prompts]
        readable = {
            row: picture
            for row, (picture, texts) in enumerate(zip(listed, requested, strict=True))
            if picture is not None and texts
        }
        scores = [math.nan] * len(listed)
        for row, written in zip(readable, self._read(list(readable.values())), strict=True):
            texts = requested[row]
            scores[row] = math.fsum(edit_similarity(written, text) for text in texts) / len(texts)
        return torch.tensor(scores)

    def _read(self, listed: Sequence[Image.Image]) -> list[str]:
        """Read pictures, here or in processes. Raises RuntimeError if a process has died: call again."""
        processes = self.processes
        if processes is None:
            cores = cores_of_rank()
            processes = cores if self.reader is rapidocr and cores > _FEW_CORES else 1
        if processes == 1 or len(listed) < 2:
            return [self.reader(picture) for picture in listed]
        reader = text_engine.read if self.reader is rapidocr else self.reader
        pool = _pool(processes)
        try:
            return list(pool.map(reader, listed))
        except BrokenProcessPool as error:
            _pool.cache_clear()
            raise RuntimeError("a process that reads text has died; new ones start at the next call") from error


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


def cores_of_rank() -> int:
    """Return the cores that this process may use, divided by the ranks on this machine, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


@functools.cache
def _pool(processes: int) -> ProcessPoolExecutor:
    """Start processes that read pictures, once for all rewards; they end with this process."""
    context = multiprocessing.get_context("spawn")  # a fork would copy CUDA's state and the locks of threads
    pool = ProcessPoolExecutor(processes, context, text_engine.start, (context.Barrier(processes),))
    with _starting_children():
        for _ in range(processes):  # each of which starts a process, since none is idle before the last has started
            pool.submit(os.getpid)
    return pool


@contextmanager
def _starting_children() -> Iterator[None]:
    """Start child processes that no Ctrl-C of the terminal reaches, and that do not run the user's script again.

    A script without ``if __name__ == "__main__"`` would train once more in each of them.
    """
    mask, script = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}), sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
