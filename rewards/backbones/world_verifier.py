"""Rewards by the exact verifiers of the embedded worlds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from genalign.evaluation.scorers import RECOGNIZED, ExplainedScores
from genalign.scoring.shared_results import SharedResults
from genalign.types import Metadata, Prompt, PromptSet
from genalign.worlds.verification import Verification

Verify = Callable[[Tensor, Sequence[Metadata]], list[Verification]]
Score = Literal["partial", "strict", "relaxed"]
SCORES: tuple[Score, ...] = ("strict", "partial", "relaxed")
"""The scores that evaluations report, in this order."""


_verified = SharedResults[list[Verification]]()


def scores(verify: Verify, score: str, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """Score samples by a world's verifier as (B,); arguments and errors are those of ``judge``."""
    return judge(verify, score, samples, prompts).scores


def judge(verify: Verify, score: str, samples: Tensor, prompts: Sequence[Prompt]) -> ExplainedScores:
    """Score samples by a world's verifier, and say of each whether it recognizes everything in it.

    Several scores of one batch verify it once.

    Args:
        verify: the exact check of samples against the metadata of their prompts.
        score: which of its scores to return, or the name of one of its criteria.
        samples: images or waveforms (B, ...).
        prompts: one for each sample, with metadata.

    Returns:
        The scores (B,), float32 on the CPU and NaN for a sample that is not finite, and the detail ``RECOGNIZED``.

    Raises:
        ValueError: a prompt has no metadata.
    """
    metadata = [require_metadata(prompt) for prompt in prompts]
    failed = ~samples.isfinite().flatten(1).all(1).cpu()
    verifications = _verified(verify, samples, prompts, lambda: verify(samples.nan_to_num(0.0, 0.0, 0.0), metadata))
    values = [verification.score(score) for verification in verifications]
    column = torch.tensor(values, dtype=torch.float32).masked_fill(failed, torch.nan)
    return ExplainedScores(column, [{RECOGNIZED: verification.recognized} for verification in verifications])


def require_metadata(prompt: Prompt) -> Metadata:
    """Return the prompt's metadata. Raises ValueError where it has none."""
    if prompt.metadata is None:
        raise ValueError(f"the prompt {prompt.text!r} has no metadata: this reward needs GenEval metadata")
    return prompt.metadata


def sample_metadata_by_task(prompts: PromptSet, count: int, rng: np.random.Generator) -> list[Metadata]:
    """Sample the metadata of ``count`` prompts: tasks in turn, and a random prompt of each."""
    tasks = list(prompts.by_task().values())
    return [require_metadata(tasks[i % len(tasks)][rng.integers(len(tasks[i % len(tasks)]))]) for i in range(count)]
