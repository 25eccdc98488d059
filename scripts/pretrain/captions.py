"""What the worlds' pretraining data share: prompts drawn by task, wrong captions, and rendering in parallel."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context

import numpy as np
import torch
from torch import Tensor

from genalign.types import Metadata, Prompt, PromptSet

Job = tuple[int, int, int]
Part = tuple[np.ndarray, list[Prompt]]


def in_chunks(chunk: Callable[[Job], Part], count: int, seed: int, workers: int) -> tuple[Tensor, tuple[Prompt, ...]]:
    """Draw ``count`` samples and their prompts by ``chunk((start, number, seed))`` in worker processes.

    The result is the same for any number of workers.
    """
    jobs = [(start, min(1000, count - start), seed) for start in range(0, count, 1000)]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        parts = list(pool.map(chunk, jobs))
    samples = torch.from_numpy(np.concatenate([samples for samples, _ in parts]))
    return samples, tuple(prompt for _, prompts in parts for prompt in prompts)


def draw_prompts(
    prompts: PromptSet, weights: Mapping[str, float], count: int, rng: np.random.Generator
) -> list[Prompt]:
    """``count`` prompts: a task by its weight, then any prompt of it."""
    groups = prompts.by_task()
    tasks = rng.choice(list(weights), count, p=list(weights.values()))
    return [groups[task][rng.integers(len(groups[task]))] for task in tasks]


@cache
def seen_texts(prompts: Callable[[str], PromptSet]) -> frozenset[str]:
    """The texts of a world's prompts that are seen in training."""
    return frozenset(prompt.text for prompt in prompts("iid").prompts)


def one_of(mistakes: Iterable[Prompt], seen: frozenset[str], otherwise: Prompt, rng: np.random.Generator) -> Prompt:
    """Draw one of the ``mistakes`` with a ``seen`` text: held-out compositions must not be learned wrong."""
    wrong = [prompt for prompt in mistakes if prompt.text in seen]
    return wrong[rng.integers(len(wrong))] if wrong else otherwise


def hidden_words(captions: int, length: int, generator: torch.Generator, share: float = 0.2) -> Tensor:
    """Mask (captions, length) bool of words to hide: a third of the words of a ``share`` of the captions.

    A model that reads every word beside the same others learns compositions by heart, and draws no new ones.
    """
    hide = torch.rand(captions, 1, generator=generator) < share
    return hide & (torch.rand(captions, length, generator=generator) < 1 / 3)


def require_metadata(prompt: Prompt) -> Metadata:
    """A world's prompt always has metadata."""
    assert prompt.metadata is not None, "every prompt of a world has metadata"
    return prompt.metadata
