"""Comparisons of two samples of a prompt: win rates within a group, and preference over reference images.

A comparison is any ``genalign.types.PairwiseReward``: ``rewards.remote.vlm_judges.PairwiseJudge`` and
``WrittenPairwiseJudge``, ``BradleyTerry``, or a function of two batches and their prompts. It must not depend on which
sample comes first, and judges do: put one of your own into ``BothOrders``.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from genalign.scoring.judge_orders import both_orders, probabilities
from genalign.types import AnyCallable, Prompt
from rewards.backbones.reference_images import References

logger = logging.getLogger(__name__)


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
class BothOrders:
    """A judge of two samples that is asked about each pair in both orders, since judges favor one position.

    ``judge`` returns P(left is better), shown left first, as any comparison. A pair in which each order prefers another
    sample is a tie, 1/2; a pair without an answer in one order is NaN. Each call logs how many pairs were consistent,
    and the position bias, as a warning where fewer than half are. ``name`` is the judge's in the log.
    """

    judge: AnyCallable
    name: str = "the judge"

    def __call__(self, left: Tensor, right: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Compare two batches (B, ...) as preferences (B,) for the left, float32 on the CPU.

        Raises ValueError for batches of different shapes, and for probabilities outside of [0, 1].
        """
        if left.shape != right.shape:
            shapes = f"{tuple(left.shape)} and {tuple(right.shape)}"
            raise ValueError(f"both sides must be samples (B, ...) of one shape, not {shapes}")
        preferred, consistency = both_orders(self.judge(left, right, prompts), self.judge(right, left, prompts))
        if consistency.pairs:
            logger.log(
                logging.WARNING if consistency.share < 0.5 else logging.INFO,
                "%s prefers the same sample in both orders in %d of %d pairs, the others are ties; position bias %+.3f"
                " (0 is none, 0.5 is always the first)",
                self.name,
                consistency.consistent,
                consistency.pairs,
                consistency.bias,
            )
        return preferred


def hard_wins(preferred: Tensor, margin: float = 0.05) -> Tensor:
    """Round preferences (n,) in [0, 1] to 1, a win, above 1/2 + margin, 0 below 1/2 - margin, and 1/2, a tie.

    NaN stays NaN. Raises ValueError for a preference outside of [0, 1].
    """
    preferred = probabilities(preferred)
    won = torch.where(preferred > 0.5 + margin, 1.0, torch.where(preferred < 0.5 - margin, 0.0, 0.5))
    return torch.where(preferred.isnan(), torch.nan, won).float()


def compared_pairs(size: int, opponents: int | None = None) -> list[tuple[int, int]]:
    """List the pairs i < j of a group of ``size`` samples that are compared: all of them, or those near on a circle.

    With ``opponents``, an even number, each sample meets the opponents / 2 next ones on either side, modulo ``size``.
    """
    everyone = range(size)
    if opponents is None or opponents >= size - 1:
        return list(itertools.combinations(everyone, 2))
    near = {(i, (i + offset) % size) for i in everyone for offset in range(1, opponents // 2 + 1)}
    return sorted((min(pair), max(pair)) for pair in near)


@dataclass(frozen=True)
class WinRateReward:
    """The fraction of the other samples of its prompt that a sample beats, in [0, 1] (Pref-GRPO, arXiv 2508.20751).

    A win counts 1, a tie 1/2, and a pair without an answer not at all. Wins are hard. A mean of the preferences
    themselves would keep gaps of any size, which the division by the group's standard deviation makes as large as real
    ones; removing such illusory advantages is the purpose of the method.

    A group is all samples of a call that share one ``Prompt`` object, as a round's samples of a prompt do; it must be
    whole (``genalign.types.GroupReward``). A single sample has no score, so a reward server cannot serve this reward. G
    samples need G (G - 1) / 2 comparisons, or with ``opponents`` G opponents / 2; a judge that is queried in both
    orders answers twice as many questions.

    Args:
        preference: The comparison of two samples, any ``genalign.types.PairwiseReward``.
        margin: The largest distance from 1/2 at which a preference is a tie, in [0, 0.5).
        opponents: The number of other samples that each sample meets, even; null for all of its group.
    """

    compares_group: ClassVar[bool] = True
    preference: AnyCallable
    margin: float = 0.05
    opponents: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.margin < 0.5:
            raise ValueError(f"the margin of ties must be in [0, 0.5), not {self.margin}")
        if self.opponents is not None and (self.opponents < 2 or self.opponents % 2):
            raise ValueError(f"opponents must be an even number of at least 2, or null for all, not {self.opponents}")

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Score samples (B, ...) as (B,), float32 on the CPU; NaN for a sample without a comparison, with a warning.

        Raises ValueError where no prompt has two samples, and for preferences outside of [0, 1].
        """
        groups: dict[int, list[int]] = {}
        for row, prompt in enumerate(prompts):
            groups.setdefault(id(prompt), []).append(row)
        pairs = [(rows[i], rows[j]) for rows in groups.values() for i, j in compared_pairs(len(rows), self.opponents)]
        if not pairs:
            raise ValueError(
                f"a win rate needs 2 samples or more of a prompt, but each of these {len(groups)} prompts has one, such"
                f" as {prompts[0].text!r}: raise group_size (in an evaluation, the samples per prompt)"
            )
        left, right = (torch.tensor(side) for side in zip(*pairs, strict=True))
        preferred = self.preference(samples[left], samples[right], [prompts[i] for i, _ in pairs])
        won = hard_wins(preferred, self.margin)
        wins = torch.full((len(samples), len(samples)), torch.nan)
        wins[left, right], wins[right, left] = won, 1 - won
        rates = wins.nanmean(1)
        if unscored := rates.isnan().nonzero()[:, 0].tolist():
            logger.warning(
                "win rates: %d of %d samples, such as one of %r, were compared with no other sample of their prompt (%d"
                " of %d comparisons have no answer); their scores are NaN",
                len(unscored),
                len(samples),
                prompts[unscored[0]].text,
                int(won.isnan().sum()),
                len(pairs),
            )
        return rates


@dataclass(frozen=True, eq=False)
class ReferencePreference:
    """The probability that a sample is better than the reference image of its prompt (RewardDance, arXiv 2509.08826).

    Of several references of a prompt it is the mean, without those that have no answer. Samples that all beat their
    references score alike: choose better references then.

    Args:
        preference: The comparison of two images, any ``genalign.types.PairwiseReward``.
        references: ``ReferencesByPrompt`` of ``rewards.backbones.reference_images``, such as the best of n samples of
            the base model.
    """

    preference: AnyCallable
    references: References

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Score images (B, 3, H, W) in [0, 1] as (B,), float32 on the CPU; NaN where no comparison has an answer.

        Raises ValueError for a prompt without a reference, and for references of another size than the samples.
        """
        if len(samples) != len(prompts):
            raise ValueError(f"there must be one prompt per image, not {len(prompts)} for {len(samples)} images")
        pairs = [(place, row) for place, prompt in enumerate(prompts) for row in self.references.rows(prompt)]
        rows = {row: index for index, row in enumerate(dict.fromkeys(row for _, row in pairs))}
        images = self.references.images.load(list(rows)).to(samples)
        if images.shape[1:] != samples.shape[1:]:
            sizes = f"{tuple(images.shape[1:])}, the samples {tuple(samples.shape[1:])}"
            raise ValueError(f"the references are {sizes}: give size=(height, width) where the references are read")
        place, index = torch.tensor([[place, rows[row]] for place, row in pairs]).unbind(1)
        compared = [prompts[number] for number in place.tolist()]
        preferred = probabilities(self.preference(samples[place], images[index], compared)).float()
        return torch.stack([preferred[place == number].nanmean() for number in range(len(samples))])

    def require_references(self, prompt: Prompt) -> None:
        """Raise ValueError where there is no reference for ``prompt``."""
        self.references.rows(prompt)
