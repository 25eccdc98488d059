"""Decided pairs, and what learns from them the taste of each annotator, a user of the reward or model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class AnnotatedPair:
    """A pair of samples of a prompt, of which an annotator preferred one.

    Attributes:
        prompt: The text.
        annotator: The name of who judged.
        preferred: Reads the sample (3, H, W) or (C, L) that was preferred.
        rejected: Reads the other one, of the same shape.
    """

    prompt: str
    annotator: str
    preferred: Callable[[], Tensor]
    rejected: Callable[[], Tensor]


@dataclass(frozen=True)
class UserAccuracy:
    """The share of comparisons that is predicted, by user: of those learned from, and of those held out.

    A user with few comparisons may have none that is held out.
    """

    seen: Mapping[str, float]
    held_out: Mapping[str, float]


class UserLearner(Protocol):
    """Learns users' tastes: a reward (``rewards.pal``), or embeddings (``rewards.user_embeddings``)."""

    def learn(self, comparisons: Iterable[AnnotatedPair], path: Path, known: Path | None = None) -> UserAccuracy:
        """Learn from pairs and write a file; with ``known``, add their annotators to the users of that file."""
