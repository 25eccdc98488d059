"""Judgments of pairs in both orders: a judge favors one position, and a preference that follows it is none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from genalign.types import Prompt


@dataclass(frozen=True)
class OneOrder:
    """The answers of a judge to n pairs, each in one order.

    Attributes:
        preferred: The probabilities (n,) that the sample that was shown first is better; NaN without an answer.
        written: What the judge wrote about each pair; None where it wrote nothing.
    """

    preferred: Tensor
    written: tuple[str | None, ...]


@runtime_checkable
class OneOrderJudge(Protocol):
    """A judge of pairs whose call asks in both orders, and that also tells its answers in one."""

    def in_one_order(self, left: Tensor, right: Tensor, prompts: Sequence[Prompt]) -> OneOrder:
        """Compare two batches (n, ...), the left samples shown first."""


@dataclass(frozen=True)
class Consistency:
    """The number of ``pairs`` judged in both orders, how many were ``consistent``, and the position bias.

    A pair is consistent if the same sample is preferred in both orders. ``bias`` is the mean preference for the sample
    that is shown first, less 1/2: 0 for none, 0.5 for a judge that always prefers the first, -0.5 the second.
    """

    pairs: int
    consistent: int
    bias: float

    @property
    def share(self) -> float:
        """The fraction of pairs that are consistent; NaN without a pair."""
        return self.consistent / self.pairs if self.pairs else float("nan")


def both_orders(first: Tensor, second: Tensor) -> tuple[Tensor, Consistency]:
    """Combine the judgments of both orders of n pairs; our rule, Pref-GRPO's code asks in one order.

    Args:
        first: p (n,), the probability that the left sample is better, which was shown first.
        second: q (n,), the probability that the right sample is better, which was shown first.

    Returns:
        The preferences (n,) for the left samples, float32: (p + 1 - q) / 2 if (p - 1/2) (1/2 - q) > 0, so the same
        sample is preferred in both orders, else 1/2, a tie; NaN where either is NaN. And how consistent the pairs with
        both judgments are.

    Raises:
        ValueError: a probability is outside of [0, 1].
    """
    p, q = probabilities(first), probabilities(second)
    judged = ~(p.isnan() | q.isnan())
    consistent = (p - 0.5) * (0.5 - q) > 0
    preferred = torch.where(consistent, (p + 1 - q) / 2, 0.5).masked_fill(~judged, torch.nan).float()
    bias = float(((p + q) / 2 - 0.5)[judged].detach().mean())
    return preferred, Consistency(int(judged.sum()), int(consistent.sum()), bias)


def probabilities(preferred: Tensor) -> Tensor:
    """Return preferences in float64 on the CPU. Raises ValueError for one outside of [0, 1]; NaN is none."""
    values = preferred.double().cpu()
    if bool(((values < 0) | (values > 1)).any()):
        raise ValueError("a comparison must return probabilities that the first sample is better, in [0, 1]")
    return values
