"""Preferences of which some are wrong: losses that allow for flips, and the vote of an ensemble on every pair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from genalign.reward_learning.examples import Item, Pairs
from genalign.reward_learning.preference_losses import PairLoss, PreferenceLoss

Change = Literal["drop", "flip", "soften"]


class NoiseCorrection(Protocol):
    """Turns a loss of pairs whose labels are right into one of pairs whose labels may be flipped."""

    def per_pair(self, loss: PairLoss, lead: Tensor, preferred: Tensor, difference: Tensor) -> Tensor:
        """Compute the loss (N, K) of each pair; the arguments are those of ``PairLoss.per_pair``."""


def _require_flips(flips: float) -> None:
    if not 0 <= flips < 0.5:
        raise ValueError(f"flips is the share of wrong labels, at least 0 and below 0.5, not {flips}")


@dataclass(frozen=True)
class Smoothing:
    """Label smoothing, (1 - e) l(d) + e l(-d): conservative, since no lead is pushed to infinity (as in cDPO).

    Args:
        flips: The share e of labels that are wrong.
    """

    flips: float = 0.1

    def __post_init__(self) -> None:
        _require_flips(self.flips)

    def per_pair(self, loss: PairLoss, lead: Tensor, preferred: Tensor, difference: Tensor) -> Tensor:
        as_labeled = loss.per_pair(lead, preferred, difference)
        return (1 - self.flips) * as_labeled + self.flips * loss.per_pair(lead, 1 - preferred, -difference)


@dataclass(frozen=True)
class FlipRobust:
    """The unbiased loss under flips, ((1 - e) l(d) - e l(-d)) / (1 - 2 e) (rDPO, arXiv 2403.00409).

    Its expectation over labels that are flipped with probability e is the loss of the right labels. It is not bounded
    below: train with few epochs or an early stop.

    Args:
        flips: The probability e of a flip.
    """

    flips: float = 0.1

    def __post_init__(self) -> None:
        _require_flips(self.flips)

    def per_pair(self, loss: PairLoss, lead: Tensor, preferred: Tensor, difference: Tensor) -> Tensor:
        as_labeled = loss.per_pair(lead, preferred, difference)
        flipped = loss.per_pair(lead, 1 - preferred, -difference)
        return ((1 - self.flips) * as_labeled - self.flips * flipped) / (1 - 2 * self.flips)


@dataclass(frozen=True)
class EnsembleVote:
    """An ensemble votes on every training pair before the reward is trained (Secrets of RLHF II, arXiv 2401.06080).

    The vote on a pair is the mean lead that the members give to the item that was preferred. The pairs with the least
    votes are changed, of those against which the ensemble votes. Unlike in the paper, a member is trained on a random
    half of the prompts and votes on the others, since heads on frozen features fit the pairs that they are trained on.

    Args:
        members: Number of members; each pair has about half as many votes.
        share: Largest share of the pairs to change.
        change: "drop" leaves a pair out, "flip" turns it, and "soften" makes its target the probability by the vote.
        adaptive_margin: Whether the votes for the other pairs, where positive, become their margins in
            ``MarginBradleyTerryLoss``.
    """

    members: int = 6
    share: float = 0.1
    change: Change = "drop"
    adaptive_margin: bool = False

    def __post_init__(self) -> None:
        if self.members < 2 or not 0 <= self.share <= 1 or self.change not in get_args(Change):
            raise ValueError(
                "an ensemble's vote needs 2 or more members, a share in [0, 1], and a change of"
                f" {', '.join(get_args(Change))}, not {self}"
            )

    def require_pairs(self, loss: PreferenceLoss) -> None:
        """Raise ValueError for a loss of grades."""
        if not isinstance(loss, PairLoss):
            raise ValueError(f"an ensemble votes on pairs, and {type(loss).__name__} learns from grades")


@dataclass(frozen=True)
class PairVotes:
    """What an ensemble says of N pairs in K dimensions, about the item that was preferred.

    Attributes:
        mean: Mean lead (N, K) over the members that vote; NaN for ties, what was not judged, and without a vote.
        deviation: Standard deviation (N, K) of the lead over them, that of the population.
        voters: Number (N,) of members that vote on a pair.
    """

    mean: Tensor
    deviation: Tensor
    voters: Tensor


def count_votes(leads: Tensor, pairs: Pairs) -> PairVotes:
    """Turn the leads (M, N, K) of first items, NaN where a member does not vote on a pair, into votes."""
    sign = (2 * pairs.preferred - 1).sign()
    favored = leads * torch.where(sign == 0, torch.nan, sign)
    voters, votes = (~leads.isnan()).any(-1).sum(0), (~favored.isnan()).sum(0)
    mean = favored.nanmean(0)
    deviation = ((favored - mean).nan_to_num() ** 2).sum(0).div(votes).sqrt()
    return PairVotes(mean, deviation, voters)


def apply_votes(pairs: Pairs, votes: PairVotes, settings: EnsembleVote) -> tuple[Pairs, Tensor]:
    """Change the pairs that an ensemble votes against most, and return them all with which were changed (N, K).

    Dropped pairs stay as pairs without a target (NaN), so rows keep their numbers.
    """
    against = votes.mean.nan_to_num(torch.inf)
    count = int(settings.share * int((~votes.mean.isnan()).sum()))
    least = torch.zeros_like(against, dtype=torch.bool)
    least.view(-1)[against.flatten().argsort(stable=True)[:count]] = True
    changed = least & (against < 0)
    match settings.change:
        case "drop":
            target = torch.full_like(pairs.preferred, torch.nan)
        case "flip":
            target = 1 - pairs.preferred
        case "soften":
            target = torch.where(pairs.preferred > 0.5, votes.mean, -votes.mean).sigmoid()
    difference = pairs.difference
    if settings.adaptive_margin:
        sign = (2 * pairs.preferred - 1).sign()
        difference = torch.where(votes.mean.isnan(), difference, sign * votes.mean.clamp(min=0))
    turned = torch.where(changed, -difference if settings.change == "flip" else difference, difference)
    return replace(pairs, preferred=torch.where(changed, target, pairs.preferred), difference=turned), changed


def changed_lines(
    pairs: Pairs, votes: PairVotes, changed: Tensor, items: Sequence[Item], dimensions: Sequence[str]
) -> list[dict[str, Any]]:
    """List the changed pairs as JSON types: items, annotator, dimension, label and votes."""
    lines = list[dict[str, Any]]()
    for row, column in changed.nonzero().tolist():
        first, second = (items[place] for place in pairs.rows[row].tolist())
        lines.append(
            {
                "prompt": first.prompt.text,
                "digests": [first.digest, second.digest],
                "dimension": dimensions[column],
                "annotator": pairs.annotators[row],
                "preferred": float(pairs.preferred[row, column]),
                "mean": float(votes.mean[row, column]),
                "deviation": float(votes.deviation[row, column]),
                "voters": int(votes.voters[row]),
            }
        )
    return lines
