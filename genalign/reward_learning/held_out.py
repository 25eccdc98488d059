"""What a learned reward says of held-out judgments in training: the accuracy on pairs and on grades, over prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from genalign.metrics.intervals import Estimate, clustered_share
from genalign.reward_learning.measures import prompt_means
from genalign.reward_learning.pair_measures import CalibrationBin, pair_accuracy
from genalign.reward_learning.preference_losses import compared_rows


@dataclass(frozen=True)
class NuisanceCorrelations:
    """Pearson's correlations of a nuisance, over items; ``own`` is with the output that takes it up.

    Both are 0 where the nuisance is constant.
    """

    score: float
    own: float


@dataclass(frozen=True)
class HeldOutMetrics:
    """Measures on held-out judgments.

    Attributes:
        loss: The loss without a correction of label noise and without other terms; of grades, the mean of the members'
            own, since each learns thresholds of its own.
        accuracy: The share of pairs that are ordered right, over prompts, by dimension; None where nothing is decided.
        calibration: The expected calibration error of sigmoid(lead) of pairs, or of sigmoid(score) of labels; None
            where a score gives no probability.
        bins: The bins of the calibration error of pairs.
        members: The accuracy of each member of an ensemble, by dimension; empty for a single member.
        nuisances: Correlations of the nuisances that are kept out of the reward, by name.
    """

    loss: float
    accuracy: Mapping[str, Estimate | None]
    calibration: float | None
    bins: tuple[CalibrationBin, ...] = ()
    members: Mapping[str, Sequence[Estimate | None]] = field(default_factory=dict)
    nuisances: Mapping[str, NuisanceCorrelations] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Convert to JSON types, without what is empty."""
        parts: dict[str, Any] = {
            "bins": [one.as_dict() for one in self.bins],
            "members": {name: [one and one.as_dict() for one in own] for name, own in self.members.items()},
            "nuisances": {name: asdict(own) for name, own in self.nuisances.items()},
        }
        accuracy = {name: own and own.as_dict() for name, own in self.accuracy.items()}
        whole = {"loss": self.loss, "accuracy": accuracy, "calibration": self.calibration}
        return whole | {name: part for name, part in parts.items() if part}


def accuracy_of_pairs(lead: Tensor, preferred: Tensor, prompt: Tensor) -> Estimate | None:
    """Estimate the share of decided pairs that scores order as they were judged, over prompts; None without any.

    Args:
        lead: The first item's score less the second's (N,); a lead of 0 counts half.
        preferred: The preference (N,) for the first item; ties and NaN are left out.
        prompt: The number (N,) of the prompt.
    """
    decided = ~preferred.isnan() & (preferred != 0.5)
    if not bool(decided.any()):
        return None
    return pair_accuracy(lead[decided], preferred[decided], prompt[decided]).accuracy


def accuracy_of_grades(scores: Tensor, values: Tensor, prompt: Tensor, within_prompts: bool) -> Estimate | None:
    """Estimate the share of pairs of different grades that scores order right, over prompts; None without any.

    Args:
        scores: Scores (N,).
        values: Grades (N,); NaN is left out.
        prompt: The number (N,) of the prompt.
        within_prompts: Whether only items of one prompt are compared, where any prompt has different grades.
    """
    graded = ~values.isnan()
    scores, values, prompt = scores[graded], values[graded], prompt[graded]

    def shares_within(group: Tensor) -> Tensor:
        shares = torch.full((len(values),), torch.nan)
        for rows, others in compared_rows(group):
            lead, gap = (own[rows][:, None] - own[others] for own in (scores, values))
            right = (lead.sign() * gap.sign() + 1) / 2
            compared = (gap != 0) & (group[rows][:, None] == group[others])
            shares[rows] = (right * compared).sum(1) / compared.sum(1)  # NaN without a comparison
        return shares

    shares = shares_within(prompt if within_prompts else torch.zeros_like(prompt))
    if within_prompts and bool(shares.isnan().all()):
        shares = shares_within(torch.zeros_like(prompt))
    return None if bool(shares.isnan().all()) else clustered_share(prompt_means(shares, prompt))
