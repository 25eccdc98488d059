"""What a verifier says of a sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Verdict:
    """Whether a sample shows what its prompt asks for.

    ``strict``: all that is asked for, and nothing else. ``relaxed``: GenEval's own rule, which overlooks surplus
    objects unless the prompt counts them. ``partial``: the mean of ``criteria``, in [0, 1]. ``criteria``: (name, value
    in [0, 1]) in an order that the world's verifier defines.
    """

    strict: bool
    relaxed: bool
    partial: float
    criteria: tuple[tuple[str, float], ...]


def verdict(criteria: Sequence[tuple[str, float]], relaxed: bool) -> Verdict:
    """The verdict by its criteria: strict where every one is 1."""
    return Verdict(
        strict=all(value == 1 for _, value in criteria),
        relaxed=relaxed,
        partial=sum(value for _, value in criteria) / len(criteria),
        criteria=tuple(criteria),
    )
