"""What a learned reward says of held-out judgments: accuracy with intervals, and the error of its probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from genalign.metrics.intervals import Estimate, mean_over_tasks
from genalign.reward_learning.examples import Item
from genalign.reward_learning.pair_measures import CalibrationBin


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
        loss: The loss without a correction of label noise and without other terms.
        accuracy: The share of pairs that are ordered right, over prompts, by dimension; None where nothing is decided.
        calibration: The expected calibration error of sigmoid(lead); None for grades.
        bins: The bins of the calibration error.
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


def prompt_numbers(items: Sequence[Item]) -> Tensor:
    """Return the number (N,) of each item's prompt, in order of first appearance."""
    numbers: dict[str, int] = {}
    return torch.tensor([numbers.setdefault(item.prompt.text, len(numbers)) for item in items], dtype=torch.long)


def accuracy_of_pairs(lead: Tensor, preferred: Tensor, prompt: Tensor) -> Estimate | None:
    """Estimate the share of decided pairs that scores order as they were judged, over prompts; None without any.

    Args:
        lead: The first item's score less the second's (N,); a lead of 0 counts half.
        preferred: The preference (N,) for the first item; ties and NaN are left out.
        prompt: The number (N,) of the prompt.
    """
    wanted = (preferred - 0.5).sign()
    decided = (~preferred.isnan()) & (wanted != 0)
    return _over_prompts(((lead.sign() * wanted) + 1)[decided] / 2, prompt[decided])


def accuracy_of_grades(scores: Tensor, values: Tensor, prompt: Tensor, within_prompts: bool) -> Estimate | None:
    """Estimate the share of pairs of different grades that scores order right, over prompts; None without any.

    Args:
        scores: Scores (N,).
        values: Grades (N,); NaN is left out.
        prompt: The number (N,) of the prompt.
        within_prompts: Whether only items of one prompt are compared, where any prompt has different grades.
    """
    compared = values[:, None] != values[None]
    compared &= ~(values.isnan()[:, None] | values.isnan()[None])
    same = prompt[:, None] == prompt[None]
    if within_prompts and bool((compared & same).any()):
        compared &= same
    right = ((scores[:, None] - scores[None]).sign() * (values[:, None] - values[None]).sign() + 1) / 2
    any_pair = compared.any(1)
    shares = (right.nan_to_num() * compared).sum(1)[any_pair] / compared.sum(1)[any_pair]
    return _over_prompts(shares, prompt[any_pair])


def _over_prompts(values: Tensor, prompt: Tensor) -> Estimate | None:
    if not len(values):
        return None
    _, place, counts = torch.unique(prompt, return_inverse=True, return_counts=True)
    means = torch.zeros(len(counts), dtype=torch.float64).index_add_(0, place, values.double()) / counts
    return mean_over_tasks({"all": means.clamp(0, 1).tolist()}, "share")


def expected_calibration_error(lead: Tensor, preferred: Tensor, bins: int = 10) -> float | None:
    """Average |confidence - accuracy| of sigmoid(lead), in bins of about equal numbers of decided pairs; None without.

    Args:
        lead: Leads (N,) in nats.
        preferred: Preferences (N,) for the first item; ties and NaN are left out.
        bins: Number of bins.
    """
    confidence, right, parts = _by_confidence(lead, preferred, bins)
    if not parts:
        return None
    gaps = [(confidence[part] - right[part]).mean().abs() * len(part) for part in parts]
    return float(torch.stack(gaps).sum() / len(right))


def calibration_bins(lead: Tensor, preferred: Tensor, prompt: Tensor, bins: int = 10) -> tuple[CalibrationBin, ...]:
    """Return the bins of ``expected_calibration_error``, with the accuracy and its interval over prompts.

    Args:
        lead: Leads (N,) in nats.
        preferred: Preferences (N,) for the first item; ties and NaN are left out.
        prompt: The number (N,) of the prompt.
        bins: Number of bins.
    """
    confidence, right, parts = _by_confidence(lead, preferred, bins)
    prompts = prompt[_decided(preferred)]
    accuracies = ((part, _over_prompts(right[part], prompts[part])) for part in parts)
    return tuple(
        CalibrationBin(float(confidence[part].mean()), accuracy, len(part)) for part, accuracy in accuracies if accuracy
    )


def _decided(preferred: Tensor) -> Tensor:
    return (~preferred.isnan()) & (preferred != 0.5)


def _by_confidence(lead: Tensor, preferred: Tensor, bins: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return confidence (n,), whether right (n,), and the bins as numbers, of the n decided pairs."""
    decided = _decided(preferred)
    right = ((preferred[decided] > 0.5) == (lead[decided] > 0)).double()
    confidence = lead[decided].double().abs().sigmoid()
    return confidence, right, [part for part in confidence.argsort().tensor_split(bins) if len(part)]
