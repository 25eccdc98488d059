"""What a learned reward says of held-out judgments: accuracy with intervals, and the error of its probabilities."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from genalign.metrics.intervals import Estimate, mean_over_tasks
from genalign.reward_learning.examples import Item


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
    decided = (~preferred.isnan()) & (preferred != 0.5)
    if not bool(decided.any()):
        return None
    right = ((preferred[decided] > 0.5) == (lead[decided] > 0)).double()
    confidence = lead[decided].double().abs().sigmoid()
    order = confidence.argsort()
    parts = [part for part in order.tensor_split(bins) if len(part)]
    gaps = [(confidence[part] - right[part]).mean().abs() * len(part) for part in parts]
    return float(torch.stack(gaps).sum() / len(order))
