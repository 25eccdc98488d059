"""``genalign learn-users``: people's tastes, learned from their comparisons."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from genalign.cli import parsing
from genalign.cli.context import CommandContext, print_table
from genalign.reward_learning.preference_formats import read_preferences
from genalign.reward_learning.users import AnnotatedPair, UserLearner
from genalign.runtime.progress import Progress


@dataclass(frozen=True, kw_only=True)
class LearnUsers:
    """People's tastes, learned from comparisons that say who compared: a reward of each person, or their embeddings.

    Args:
        output: File to write, as in users.safetensors.
        preferences: Pairs that say who judged: our own folder or .jsonl file, or a .json, .jsonl or .parquet file in a
            published layout, with a column user or user_id.
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
        comparisons = annotated_pairs(path)
        earlier = None if settings.known is None else Path(settings.known)
        accuracy = settings.learner.learn(comparisons, Path(settings.output), earlier)
    counts, held_out = Counter(comparison.annotator for comparison in comparisons), accuracy.held_out
    rows = [
        (user, str(count), f"{accuracy.seen[user]:.2f}", f"{held_out[user]:.2f}" if user in held_out else "-")
        for user, count in counts.items()
    ]
    print_table(("user", "comparisons", "predicted of those seen", "held out"), rows)
    print(f"users: {settings.output}")
    return 0


def annotated_pairs(path: Path) -> list[AnnotatedPair]:
    """Read the pairs that are no ties, with who judged them.

    Raises ValueError where a judgment is no pair, one does not say who judged, or all are ties.
    """
    pairs = list[AnnotatedPair]()
    for number, judgment in enumerate(read_preferences(path), start=1):
        where = f"{path}, judgment {number}"
        if judgment.kind != "pair":
            raise ValueError(f"{where} is a {judgment.kind} of {len(judgment.samples)} samples: give pairs")
        if judgment.annotator is None:
            raise ValueError(f"{where} does not say who compared: add annotator, user or user_id to every one")
        first, second = judgment.overall()
        if first != second:
            better, worse = judgment.samples if first > second else reversed(judgment.samples)
            pairs.append(AnnotatedPair(judgment.prompt.text, judgment.annotator, better.read, worse.read))
    if not pairs:
        raise ValueError(f"{path} has ties alone, of which nothing is learned")
    return pairs
