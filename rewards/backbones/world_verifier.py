"""A world's verifier as a reward: what the worlds' rewards share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from genalign.types import Metadata, Prompt, PromptSet
from genalign.worlds.verification import Verification

Score = Literal["partial", "strict", "relaxed"]
SCORES: tuple[Score, ...] = ("strict", "partial", "relaxed")
"""What evaluations report, the first one first."""


def scores(
    verify: Callable[[Tensor, Sequence[Metadata]], list[Verification]],
    score: Score,
    samples: Tensor,
    prompts: Sequence[Prompt],
) -> Tensor:
    """Scores (B,), float32 on the CPU, of ``samples`` (B, ...) by ``verify``; NaN for a sample that is not finite."""
    metadata = [metadata_of(prompt) for prompt in prompts]
    failed = ~samples.isfinite().flatten(1).all(1).cpu()
    verifications = verify(samples.nan_to_num(0.0, 0.0, 0.0), metadata)
    match score:
        case "partial":
            values = [verification.partial for verification in verifications]
        case "strict":
            values = [float(verification.strict) for verification in verifications]
        case "relaxed":
            values = [float(verification.relaxed) for verification in verifications]
    return torch.tensor(values, dtype=torch.float32).masked_fill(failed, torch.nan)


def metadata_of(prompt: Prompt) -> Metadata:
    """The prompt's metadata. Raises ValueError where it has none."""
    if prompt.metadata is None:
        raise ValueError(f"the prompt {prompt.text!r} has no metadata: this reward needs GenEval metadata")
    return prompt.metadata


def drawn_by_task(prompts: PromptSet, count: int, rng: np.random.Generator) -> list[Metadata]:
    """The metadata of ``count`` prompts, tasks in turn and a random prompt of each."""
    tasks = list(prompts.by_task().values())
    return [metadata_of(tasks[i % len(tasks)][rng.integers(len(tasks[i % len(tasks)]))]) for i in range(count)]
