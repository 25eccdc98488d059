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
    """People's tastes, learned from comparisons with annotators: a reward for each person, or their embeddings.

    Args:
        output: File to write, as in users.safetensors.
        preferences: Pairs with their annotators: genalign's own folder or .jsonl file, or a .json, .jsonl or .parquet
            file in a published layout, with a column user or user_id.
        learner: What is learned: a reward (rewards.pal.PALLearner), or embeddings for model.users
            (rewards.user_embeddings.MeanDifferenceLearner).
        known: A file of other users, to which these are added with everything else frozen; null learns from scratch.
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
    print_table(("user", "comparisons", "accuracy (seen)", "accuracy (held out)"), rows)
    print(f"users: {settings.output}")
    return 0


def annotated_pairs(path: Path) -> list[AnnotatedPair]:
    """Read the pairs that are not ties, with their annotators.

    Raises ValueError if a judgment is not a pair or has no annotator, or if all are ties.
    """
    pairs = list[AnnotatedPair]()
    for number, judgment in enumerate(read_preferences(path), start=1):
        where = f"{path}, judgment {number}"
        if judgment.kind != "pair":
            raise ValueError(f"{where} is a {judgment.kind} of {len(judgment.samples)} samples: give pairs")
        if judgment.annotator is None:
            raise ValueError(f"{where} has no annotator: add annotator, user or user_id to every judgment")
        first, second = judgment.overall()
        if first != second:
            better, worse = judgment.samples if first > second else reversed(judgment.samples)
            pairs.append(AnnotatedPair(judgment.prompt.text, judgment.annotator, better.read, worse.read))
    if not pairs:
        raise ValueError(f"{path} contains only ties: give pairs with a preference")
    return pairs
