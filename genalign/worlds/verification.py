"""The result of verifying one sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Verification:
    """Whether a sample matches its prompt.

    ``strict``: everything the prompt names, and nothing else. ``relaxed``: GenEval's own rule, which ignores surplus
    objects unless the prompt counts them. ``partial``: the mean of ``criteria``, in [0, 1]. ``criteria``: (name, value
    in [0, 1]) in the order of the world's verifier. ``recognized``: something was detected, and everything that was is
    of this world, whether or not the prompt names it.
    """

    strict: bool
    relaxed: bool
    partial: float
    criteria: tuple[tuple[str, float], ...]
    recognized: bool

    def score(self, name: str) -> float:
        """Return the score "strict", "relaxed" or "partial", or the mean of the criteria of that name.

        A prompt that does not ask for a criterion has 1 of it.
        """
        if name in ("strict", "relaxed", "partial"):
            return float(getattr(self, name))
        values = [value for criterion, value in self.criteria if criterion == name]
        return sum(values) / len(values) if values else 1.0


def summarize(criteria: Sequence[tuple[str, float]], relaxed: bool, recognized: bool) -> Verification:
    """Summarize criteria (name, value in [0, 1]): strict where every one is 1."""
    return Verification(
        strict=all(value == 1 for _, value in criteria),
        relaxed=relaxed,
        partial=sum(value for _, value in criteria) / len(criteria),
        criteria=tuple(criteria),
        recognized=recognized,
    )
