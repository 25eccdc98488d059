"""``genalign learn-users``: people's tastes, learned from their comparisons."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from genalign.cli import parsing
from genalign.cli.context import CommandContext, print_table
from genalign.cli.preference_files import read_preferences
from genalign.reward_learning.users import UserComparison, UserLearner
from genalign.runtime.progress import Progress


@dataclass(frozen=True, kw_only=True)
class LearnUsers:
    """People's tastes, learned from comparisons that say who compared: a reward of each person, or their embeddings.

    Args:
        output: File to write, as in users.safetensors.
        preferences: A .jsonl or .parquet file of comparisons with a column user or user_id.
        learner: What is learned: a reward (rewards.pal.PALLearner), or embeddings for model.users
            (rewards.user_embeddings.MeanDifferenceLearner).
        known: A file of other users, to which these are added with all else frozen; null learns everything anew.
    """

    output: str
    preferences: str
    learner: UserLearner
    known: str | None = None


def learn_users_command(context: CommandContext, arguments: Sequence[str]) -> int:
    """Run ``genalign learn-users``: learn every user's taste, and print how well it predicts their comparisons."""
    settings, _ = parsing.parse(LearnUsers, arguments, "learn-users")
    path, progress = Path(settings.preferences), Progress()
    with progress.phase("learning"):
        comparisons = user_comparisons(path)
        known = None if settings.known is None else Path(settings.known)
        accuracy = settings.learner.learn(comparisons, Path(settings.output), known)
    counts = {comparison.user: 0 for comparison in comparisons}
    for comparison in comparisons:
        counts[comparison.user] += 1
    rows = [
        (user, str(count), f"{accuracy.seen[user]:.2f}", _share(accuracy.held_out.get(user)))
        for user, count in counts.items()
    ]
    print_table(("user", "comparisons", "predicted of those seen", "held out"), rows)
    print(f"users: {settings.output}")
    return 0


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def user_comparisons(path: Path) -> list[UserComparison]:
    """Read the comparisons of a file of preferences that are no ties, each of two images.

    Raises ValueError where one does not say who compared, or all are ties.
    """
    found = list(_decided(path))
    if not found:
        raise ValueError(f"{path} has ties alone, of which nothing is learned")
    return found


def _decided(path: Path) -> Iterator[UserComparison]:
    for number, images in groupby(read_preferences(path), key=lambda image: image.comparison):
        first, second, *others = images
        if others:
            raise ValueError(f"{path}, row {number} compares {2 + len(others)} images: give pairs")
        if first.user is None:
            raise ValueError(f"{path}, row {number} does not say who compared: add user or user_id to every row")
        if first.score != second.score:
            better, worse = (first, second) if first.score > second.score else (second, first)
            yield UserComparison(first.prompt, first.user, better.read, worse.read)
