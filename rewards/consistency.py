"""Consistency between images (PaCo-RL, arXiv 2512.04784): between samples of one prompt, or panels of one image.

The paper compares pairs by a judge that answers whether both show one subject, such as a
``genalign.types.PairwiseReward`` of ``rewards.remote.vlm_judges``; ``FeatureCosine`` needs none. A reward that asks for
consistency alone is maximized by blank images: train it beside one of the prompt, by
``genalign.algorithms.multi_reward_credit.LogTamed``.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from genalign.types import AnyCallable, Prompt


@dataclass(frozen=True)
class FeatureCosine:
    """The cosine of two samples' features, as a comparison; ``features`` is any ``genalign.types.FeatureFunction``."""

    features: AnyCallable

    def __call__(self, left: Tensor, right: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Compare samples (B, ...) and (B, ...) as (B,), differentiable; NaN where one has NaN."""
        return F.cosine_similarity(self.features(left).float(), self.features(right).float(), dim=-1)


@dataclass(frozen=True)
class GroupConsistencyReward:
    """How consistent a sample is with the other samples of its prompt, on average: all should share one subject.

    A group is all samples of a call that share one ``Prompt`` object, as a round's samples of a prompt do; it must be
    whole (``genalign.types.GroupReward``). A single sample has no score, so a reward server cannot serve this reward.
    Each of G (G - 1) / 2 pairs is compared once.

    Args:
        compare: Compares two batches, symmetrically: ``FeatureCosine``, or a judge of pairs.
    """

    compares_group: ClassVar[bool] = True
    compare: AnyCallable

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Score samples (B, ...) as (B,), differentiable where ``compare`` is; NaN without a comparison.

        Raises ValueError where no prompt has two samples.
        """
        groups: dict[int, list[int]] = {}
        for row, prompt in enumerate(prompts):
            groups.setdefault(id(prompt), []).append(row)
        pairs = [pair for rows in groups.values() for pair in itertools.combinations(rows, 2)]
        if not pairs:
            raise ValueError(
                "consistency needs 2 samples or more of a prompt, but each of these prompts has one, such as"
                f" {prompts[0].text!r}: raise group_size (in an evaluation, the samples per prompt)"
            )
        left, right = (torch.tensor(side, device=samples.device) for side in zip(*pairs, strict=True))
        values = self.compare(samples[left], samples[right], [prompts[i] for i, _ in pairs])
        answered = values.isfinite()
        sums, counts = values.new_zeros(len(samples)), values.new_zeros(len(samples))
        for side in (left.to(values.device), right.to(values.device)):
            sums = sums.index_add(0, side, torch.where(answered, values, 0.0))
            counts = counts.index_add(0, side, answered.to(values.dtype))
        return torch.where(counts > 0, sums / counts.clamp(min=1), torch.nan)


@dataclass(frozen=True)
class PanelConsistencyReward:
    """How consistent the panels of an image are, which is a grid of them: the mean over all pairs of panels.

    Args:
        compare: Compares two batches, symmetrically: ``FeatureCosine``, or a judge of pairs.
        rows: Number of rows of panels.
        columns: Number of columns of panels.
    """

    compare: AnyCallable
    rows: int = 2
    columns: int = 2

    def __post_init__(self) -> None:
        if min(self.rows, self.columns) < 1 or self.rows * self.columns < 2:
            raise ValueError(f"a grid has two panels or more, not {self.rows} x {self.columns}")

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Score images (B, 3, H, W) as (B,), differentiable where ``compare`` is.

        Raises ValueError for images that do not divide into the panels.
        """
        height, width = samples.shape[-2:]
        if height % self.rows or width % self.columns:
            raise ValueError(f"images of {height} x {width} do not divide into {self.rows} x {self.columns} panels")
        strips = samples.reshape(*samples.shape[:2], self.rows, height // self.rows, self.columns, -1)
        panels = strips.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)  # (B, panels, 3, h, w)
        pairs = list(itertools.combinations(range(panels.shape[1]), 2))
        compared = [self.compare(panels[:, i], panels[:, j], prompts) for i, j in pairs]
        return torch.stack(compared).mean(0)
