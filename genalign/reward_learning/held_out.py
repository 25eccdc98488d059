"""What a learned reward says of held-out judgments in training: the accuracy on pairs and on grades, over prompts."""

from __future__ import annotations

from torch import Tensor

from genalign.metrics.intervals import Estimate, clustered_share
from genalign.reward_learning.measures import prompt_means
from genalign.reward_learning.pair_measures import pair_accuracy


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
    compared = values[:, None] != values[None]
    compared &= ~(values.isnan()[:, None] | values.isnan()[None])
    same = prompt[:, None] == prompt[None]
    if within_prompts and bool((compared & same).any()):
        compared &= same
    right = ((scores[:, None] - scores[None]).sign() * (values[:, None] - values[None]).sign() + 1) / 2
    any_pair = compared.any(1)
    if not bool(any_pair.any()):
        return None
    shares = (right.nan_to_num() * compared).sum(1)[any_pair] / compared.sum(1)[any_pair]
    return clustered_share(prompt_means(shares, prompt[any_pair]))
