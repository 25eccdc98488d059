"""Comparisons of two samples of a prompt, and the reward of groups that is made of them.

A comparison is any ``genalign.types.PairwiseReward``: ``rewards.remote.vlm_judges.PairwiseJudge``, ``BradleyTerry``, or a function
of two batches and their prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from genalign.types import Prompt


@dataclass(frozen=True)
class BradleyTerry:
    """P(left is better) = sigmoid(scale (score of left - score of right)), by a reward of single samples.

    ``scale`` brings its scores to logits of a preference: 1 for PickScore and ImageReward, 100 for HPS.
    """

    reward: Callable  # type: ignore[type-arg]  # bare, as below: configurations name any RewardFunction
    scale: float = 1.0

    def __call__(self, left: Tensor, right: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Preferences (B,) in [0, 1], differentiable where the reward is; NaN where either side has no score."""
        preferred: Tensor = torch.sigmoid(self.scale * (self.reward(left, prompts) - self.reward(right, prompts)))
        return preferred


@dataclass(frozen=True)
class WinRate:
    """How often a sample is preferred to the others of its prompt, in [0, 1] (Pref-GRPO, arXiv 2508.20751).

    A group is what shares one ``Prompt`` object within a call, as a round's samples of a prompt do. It is a reward of
    groups: alone a sample has no score, and a reward server cannot serve it. G samples are G (G - 1) / 2 comparisons;
    a judge that is asked in both orders answers twice as many questions.
    """

    preference: Callable  # type: ignore[type-arg]  # bare: any PairwiseReward

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores (B,), float32 on the CPU, of samples (B, ...); NaN for what could be compared with none."""
        pairs = _pairs(prompts)
        if not pairs:
            return torch.full((len(samples),), torch.nan)
        left, right = (torch.tensor(side) for side in zip(*pairs, strict=True))
        found = self.preference(samples[left], samples[right], [prompts[i] for i, _ in pairs]).float().cpu()
        wins = torch.full((len(samples), len(samples)), torch.nan)
        wins[left, right], wins[right, left] = found, 1 - found
        return wins.nanmean(1)


def _pairs(prompts: Sequence[Prompt]) -> list[tuple[int, int]]:
    count = len(prompts)
    return [(i, j) for i in range(count) for j in range(i + 1, count) if prompts[i] is prompts[j]]
