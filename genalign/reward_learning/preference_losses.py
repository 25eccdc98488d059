"""Losses of preferences: what a reward's scores should say about pairs, ratings and labels.

A loss of pairs takes the leads d (N, K), the first item's score less the second's, and a loss of grades the scores
(N, K). Targets that are NaN, dimensions that were not judged, are left out.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genalign.reward_learning.preferences import Kind

_MOST_GRADES = 20
_ROWS = 256  # that are compared with others at once


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Average values (...) where ``mask`` (...) is True; 0 where it is nowhere."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


def mean_over_blocks(blocks: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Average the values of blocks, each of values and a mask, where the masks are True; 0 where they are nowhere."""
    sums = [((values * mask).sum(), mask.sum()) for values, mask in blocks]
    total, count = (torch.stack(column).sum() for column in zip(*sums, strict=True))
    return total / count.clamp(min=1)


def compared_rows(group: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Split the comparison of all rows of a group with each other into blocks, whose size does not grow with N squared.

    A block is the numbers of some rows (n,), and of the rows (m,) that they are compared with: all of their groups.
    Each row is among the first in one block.

    Args:
        group: The number (N,) of the group of each row, on the CPU.
    """
    order = torch.argsort(group, stable=True)
    ordered = group[order]
    for start in range(0, len(order), _ROWS):
        rows = order[start : start + _ROWS]
        first = torch.searchsorted(ordered, group[rows[0]])
        end = torch.searchsorted(ordered, group[rows[-1]], right=True)
        yield rows, order[int(first) : int(end)]


class PreferenceLoss(ABC):
    """A loss, and the kinds of judgments that it learns from."""

    kinds: ClassVar[tuple[Kind, ...]]

    @property
    def has_origin(self) -> bool:
        """Whether it determines the scores themselves, and not only the differences between them."""
        return True


class PairLoss(PreferenceLoss):
    """A loss of pairs, by the share of the preference for the first item (1, 0, or 0.5 for a tie)."""

    kinds = ("pair", "ranking")

    @property
    def has_origin(self) -> bool:
        return False

    @abstractmethod
    def per_pair(self, lead: Tensor, preferred: Tensor, difference: Tensor) -> Tensor:
        """Compute the loss (N, K) of each pair.

        Args:
            lead: The first item's score less the second's (N, K).
            preferred: The share of the preference for the first item (N, K).
            difference: The first item's judged score less the second's (N, K).
        """


class GradeLoss(PreferenceLoss):
    """A loss of ratings or labels of single items."""

    @property
    def gives_probability(self) -> bool:
        """Whether sigmoid(score) is the probability that an item is good."""
        return False

    @abstractmethod
    def prepare(self, values: Tensor) -> GradeObjective:
        """Return the loss of scores, with what it measures of the training values (N, K).

        Raises ValueError for values that it cannot learn from.
        """


class GradeObjective(nn.Module, ABC):
    """A loss of scores (N, K), with the weights that it learns, if any."""

    @abstractmethod
    def forward(self, scores: Tensor, values: Tensor, prompt: Tensor) -> Tensor:
        """Compute the loss ().

        Args:
            scores: Scores (N, K) of items.
            values: Their grades (N, K).
            prompt: The number (N,) of the prompt of each, on the CPU.
        """


# Pairs


@dataclass(frozen=True)
class BradleyTerryLoss(PairLoss):
    """-log sigmoid(d) for the preferred item; a tie counts as half a win of each (Bradley and Terry, 1952)."""

    def per_pair(self, lead: Tensor, preferred: Tensor, difference: Tensor) -> Tensor:
        return preferred * F.softplus(-lead) + (1 - preferred) * F.softplus(lead)


@dataclass(frozen=True)
class MarginBradleyTerryLoss(PairLoss):
    """-log sigmoid(d - m): the preferred item leads by a margin m that grows with how much better it was judged.

    The margin of a pair is ``scale`` times the absolute difference of its scores; with
    ``EnsembleVote(adaptive_margin=True)`` it is the mean lead that an ensemble gives (Secrets of RLHF II,
    arXiv 2401.06080). A tie has no margin.

    Args:
        scale: Margin by unit of the difference.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.scale < 0:
            raise ValueError(f"scale must be at least 0, not {self.scale}")

    def per_pair(self, lead: Tensor, preferred: Tensor, difference: Tensor) -> Tensor:
        margin = self.scale * difference.abs()
        return preferred * F.softplus(margin - lead) + (1 - preferred) * F.softplus(margin + lead)


@dataclass(frozen=True)
class TiedBradleyTerryLoss(PairLoss):
    """Bradley-Terry with ties (Rao and Kupper, 1967): P(win) = sigmoid(d - m), P(loss) = sigmoid(-d - m).

    The loss of a tie is -log P(tie) = -log sigmoid(d - m) - log sigmoid(-d - m) - log(exp(2 m) - 1). The default
    margin, log 5, is that of VideoReward (arXiv 2501.13918); SoliReward (arXiv 2512.22170) takes 3.0 and leaves the
    last term, which is constant, out.

    Args:
        margin: The margin m.
        constant: Whether the loss of a tie has the last term, so it is a log probability.
    """

    margin: float = math.log(5)
    constant: bool = True

    def __post_init__(self) -> None:
        if self.margin < 0 or (self.constant and self.margin == 0):
            raise ValueError(
                f"a margin of {self.margin:g} gives ties no probability, whose log is infinite: take a positive one, or"
                " BradleyTerryLoss"
            )

    def per_pair(self, lead: Tensor, preferred: Tensor, difference: Tensor) -> Tensor:
        win, loss = F.softplus(self.margin - lead), F.softplus(self.margin + lead)
        tie = win + loss - (math.log(math.expm1(2 * self.margin)) if self.constant else 0.0)
        return torch.where((preferred - 0.5).abs() < 1e-6, tie, preferred * win + (1 - preferred) * loss)


# Ratings


@dataclass(frozen=True)
class CumulativeLogit(GradeLoss):
    """Ordinal regression: P(grade <= k) = sigmoid(c_k - score), with learned thresholds c_1 < c_2 < ... by dimension.

    This is McCullagh's proportional-odds model (1980). The grades are the distinct ratings of the training data, whose
    distances do not matter; another rating, of held-out data, has no probability and is left out. Scores are known up
    to a constant, which the thresholds take up.
    """

    kinds = ("rating",)

    @property
    def has_origin(self) -> bool:
        return False

    def prepare(self, values: Tensor) -> GradeObjective:
        grades = torch.unique(values[~values.isnan()])
        if not 2 <= len(grades) <= _MOST_GRADES:
            raise ValueError(
                f"the ratings have {len(grades)} different values, and ordinal regression takes 2 to {_MOST_GRADES}:"
                " take genalign.reward_learning.preference_losses.Regression"
            )
        return _Ordinal(grades, values)


class _Ordinal(GradeObjective):
    """Thresholds (K, grades - 1) as a first one and the logs of the steps between them; they start at the rates."""

    grades: Tensor

    def __init__(self, grades: Tensor, values: Tensor) -> None:
        super().__init__()
        self.register_buffer("grades", grades)
        judged = ~values.isnan()
        at_most = (values[..., None] <= grades[:-1]) & judged[..., None]
        rates = (at_most.sum(0) + 0.5) / (judged.sum(0)[:, None] + 1)
        thresholds = torch.logit(rates)
        self.first = nn.Parameter(thresholds[:, :1].clone())
        self.steps = nn.Parameter(thresholds.diff(dim=1).clamp(min=1e-2).log())

    def thresholds(self) -> Tensor:
        """Return the thresholds (K, grades - 1), ascending."""
        return torch.cat([self.first, self.first + self.steps.exp().cumsum(1)], dim=1)

    def forward(self, scores: Tensor, values: Tensor, prompt: Tensor) -> Tensor:
        """Compute -log P(grade), by sigmoid(b) - sigmoid(a) = sigmoid(b) sigmoid(-a) (1 - exp(a - b))."""
        thresholds = self.thresholds()
        place = torch.searchsorted(self.grades, values.contiguous())[..., None].clamp(max=len(self.grades) - 1)
        judged = self.grades[place[..., 0]] == values  # neither NaN nor a rating that training data do not have
        leads = thresholds - scores[..., None]  # (N, K, grades - 1)
        below = F.pad(F.logsigmoid(leads), (0, 1))
        above = F.pad(F.logsigmoid(-leads), (1, 0))
        between = F.pad(torch.log1p(-torch.exp(-thresholds.diff(dim=1))), (1, 1)).expand(len(scores), -1, -1)
        likelihood = (below + above + between).gather(-1, place).squeeze(-1)
        return masked_mean(-likelihood, judged)


@dataclass(frozen=True)
class Regression(GradeLoss):
    """Squared error of standardized ratings, plus Bradley-Terry on the items of one prompt whose ratings differ.

    Ratings are standardized by the mean and deviation of the training data, by dimension, and scores are in these
    units.

    Args:
        pairs: Weight of the pairs; 0 leaves them out.
    """

    pairs: float = 1.0

    kinds = ("rating",)

    def __post_init__(self) -> None:
        if self.pairs < 0:
            raise ValueError(f"pairs must be at least 0, not {self.pairs}")

    def prepare(self, values: Tensor) -> GradeObjective:
        judged = ~values.isnan()
        mean = values.nanmean(0)
        deviation = ((values - mean).nan_to_num() ** 2).sum(0).div(judged.sum(0)).sqrt()
        if bool((deviation == 0).any()):
            raise ValueError("all ratings of a dimension are equal: there is nothing to learn")
        return _Regression(mean, deviation, self.pairs)


class _Regression(GradeObjective):
    mean: Tensor
    deviation: Tensor

    def __init__(self, mean: Tensor, deviation: Tensor, pairs: float) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation)
        self.pairs = pairs

    def forward(self, scores: Tensor, values: Tensor, prompt: Tensor) -> Tensor:
        judged = ~values.isnan()
        target = ((values - self.mean) / self.deviation).nan_to_num()
        loss = masked_mean((scores - target).square(), judged)
        if not self.pairs:
            return loss
        return loss + self.pairs * mean_over_blocks(self._pairs(scores, target, judged, prompt))

    @staticmethod
    def _pairs(scores: Tensor, target: Tensor, judged: Tensor, prompt: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the losses of pairs of items, and which of them are of one prompt and decided, by blocks (n, m, K)."""
        for block in compared_rows(prompt):
            same = prompt[block[0]][:, None] == prompt[block[1]]
            rows, others, same = (part.to(scores.device, non_blocking=True) for part in (*block, same))
            better = (target[rows][:, None] > target[others]) & judged[rows][:, None] & judged[others]
            yield F.softplus(scores[others] - scores[rows][:, None]), better & same[..., None]


# Labels


@dataclass(frozen=True)
class LabelPool(GradeLoss):
    """Labels of single items: a cross entropy of each, and pairs of good and bad items across prompts (SoliReward).

    Pairs of two good items may count as ties, which keeps a few items from the top scores (arXiv 2512.22170). A label
    between 0 and 1 is a share of the votes; in pairs it counts as good above one half and as bad below.

    Args:
        quality: Weight of the cross entropy of sigmoid(score).
        pairs: Weight of -log sigmoid(d - margin) for a good and a bad item.
        ties: Weight of -log sigmoid(d - margin) - log sigmoid(-d - margin) for two good items.
        margin: The margin; SoliReward takes 3.0.
    """

    quality: float = 1.0
    pairs: float = 1.0
    ties: float = 0.0
    margin: float = 0.0

    kinds = ("label",)

    @property
    def has_origin(self) -> bool:
        return self.quality > 0

    @property
    def gives_probability(self) -> bool:
        return self.quality > 0

    def __post_init__(self) -> None:
        if min(self.quality, self.pairs, self.ties, self.margin) < 0 or not self.quality + self.pairs > 0:
            raise ValueError(f"weights and margin must be at least 0, and quality or pairs positive, not {self}")

    def prepare(self, values: Tensor) -> GradeObjective:
        if not bool(((values > 0.5).any(0) & (values < 0.5).any(0)).all()):
            raise ValueError("the labels of a dimension are all good or all bad: there is nothing to learn")
        return _Labels(self)


class _Labels(GradeObjective):
    def __init__(self, settings: LabelPool) -> None:
        super().__init__()
        self.settings = settings

    def forward(self, scores: Tensor, values: Tensor, prompt: Tensor) -> Tensor:
        own, judged, labels = self.settings, ~values.isnan(), values.nan_to_num()
        losses = F.binary_cross_entropy_with_logits(scores, labels, reduction="none")
        loss = own.quality * masked_mean(losses, judged)
        good, bad = values > 0.5, values < 0.5
        if own.pairs:
            wins = (
                (F.softplus(own.margin - lead), good[rows][:, None] & bad[others])
                for rows, others, lead in _leads(scores)
            )
            loss = loss + own.pairs * mean_over_blocks(wins)
        if own.ties:
            ties = (
                (
                    F.softplus(own.margin - lead) + F.softplus(own.margin + lead),
                    good[rows][:, None] & good[others] & (rows[:, None] != others)[..., None],
                )
                for rows, others, lead in _leads(scores)
            )
            loss = loss + own.ties * mean_over_blocks(ties)
        return loss


def _leads(scores: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield rows (n,), others (m,), and how far the scores (N, K) of rows lead those of others, (n, m, K)."""
    for block in compared_rows(torch.zeros(len(scores))):
        rows, others = (part.to(scores.device, non_blocking=True) for part in block)
        yield rows, others, scores[rows][:, None] - scores[others]
