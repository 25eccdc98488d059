"""Comparisons by users, and what learns each user's taste from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class UserComparison:
    """A comparison of two samples of a prompt by a user.

    Attributes:
        prompt: The text.
        user: The name of the user.
        preferred: Reads the sample (3, H, W) or (C, L) that was preferred.
        rejected: Reads the other one, of the same shape.
    """

    prompt: str
    user: str
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

    def learn(self, comparisons: Iterable[UserComparison], path: Path, known: Path | None = None) -> UserAccuracy:
        """Learn from comparisons and write a file; with ``known``, add these users to those of that file."""
