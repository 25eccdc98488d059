"""Comparisons of two samples of a prompt, and win rates within a group.

A comparison is any ``genalign.types.PairwiseReward``: ``rewards.remote.vlm_judges.PairwiseJudge``, ``BradleyTerry``, or
a function of two batches and their prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from genalign.types import AnyCallable, Prompt


@dataclass(frozen=True)
class BradleyTerry:
    """P(left is better) = sigmoid(scale (score of left - score of right)), by a reward of single samples.

    ``scale`` turns its scores into logits of a preference: 1 for PickScore and ImageReward, 100 for HPS.
    """

    reward: AnyCallable
    scale: float = 1.0

    def __call__(self, left: Tensor, right: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Compute preferences (B,) in [0, 1], differentiable where the reward is; NaN where a side has no score."""
        preferred: Tensor = torch.sigmoid(self.scale * (self.reward(left, prompts) - self.reward(right, prompts)))
        return preferred


@dataclass(frozen=True)
class WinRateReward:
    """The fraction of the other samples of its prompt that a sample beats, in [0, 1] (Pref-GRPO, arXiv 2508.20751).

    A group is all samples of a call that share one ``Prompt`` object, as a round's samples of a prompt do. A single
    sample has no score, so a reward server cannot serve this reward. G samples need G (G - 1) / 2 comparisons; a judge
    that is queried in both orders answers twice as many questions.
    """

    preference: AnyCallable

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Score samples (B, ...) as (B,), float32 on the CPU; NaN for a sample without a comparison."""
        count = len(prompts)
        pairs = [(i, j) for i in range(count) for j in range(i + 1, count) if prompts[i] is prompts[j]]
        if not pairs:
            return torch.full((len(samples),), torch.nan)
        left, right = (torch.tensor(side) for side in zip(*pairs, strict=True))
        preferred = self.preference(samples[left], samples[right], [prompts[i] for i, _ in pairs]).float().cpu()
        wins = torch.full((len(samples), len(samples)), torch.nan)
        wins[left, right], wins[right, left] = preferred, 1 - preferred
        return wins.nanmean(1)
