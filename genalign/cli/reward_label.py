"""``genalign reward label``: judgments of collected comparisons, by rewards or judges."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from genalign.cli import parsing
from genalign.cli.context import CommandContext, print_table, require_rate
from genalign.cli.generation_settings import require_positive
from genalign.reward_learning.annotators import agreement, side_choices
from genalign.reward_learning.labeling import Labeler, sample_rate, task_key, unlabeled
from genalign.reward_learning.preferences import (
    COMPARISONS,
    PREFERENCES,
    Judgment,
    Kind,
    append_judgments,
    mend,
    read_judgments,
)
from genalign.runtime.progress import Progress


@dataclass(frozen=True, kw_only=True)
class RewardLabel:
    """Judgments of the comparisons of a folder, by rewards or judges. Run the command again to resume it.

    Args:
        folder: Folder of a dataset, with the comparisons.jsonl of genalign reward collect; the judgments are added to
            its preferences.jsonl.
        by: What judges: a genalign.reward_learning.labeling.RewardLabeler, or a JudgeLabeler.
        kind: What is asked of each comparison: pair (each two of its samples), ranking (all of them), rating or label
            (each sample); null asks what the comparison says.
        per_comparison: Number of annotators who judge a comparison, drawn by the seed; null for all.
        batch_size: Number of judgments that are made at once, and then written.
        seed: Seed of the draw of annotators.
        device: Torch device that the samples are on when they are scored.
    """

    folder: str
    by: Labeler | None = None
    kind: Kind | None = None
    per_comparison: int | None = None
    batch_size: int = 32
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        require_positive(self, "per_comparison", "batch_size")


def reward_label_command(context: CommandContext, arguments: Sequence[str]) -> int:
    """Run ``genalign reward label``: make the judgments that are missing, and print how far annotators agree."""
    settings, _ = parsing.parse(RewardLabel, arguments, "reward label", "folder")
    if settings.by is None:
        raise parsing.ConfigurationError("by is not set: name what judges, as a labeler's class_path")
    return _label(settings, settings.by)


def _label(settings: RewardLabel, labeler: Labeler) -> int:
    """Make and write the judgments of a labeler, batch by batch, and print what was made and skipped."""
    folder = Path(settings.folder)
    comparisons = read_judgments(folder / COMPARISONS)
    require_rate({"by": labeler}, sample_rate(comparisons))
    tasks = unlabeled(comparisons, labeler.annotator_names, settings.kind, settings.per_comparison, settings.seed)
    mend(folder / PREFERENCES)
    judgments = read_judgments(folder) if _has_content(folder / PREFERENCES) else []
    if {"rating", "label"} <= {one.kind for one in (*judgments, *tasks)}:
        raise ValueError(f"{folder} would mix ratings, on a scale, with labels, of 0 and 1: use a folder for each")
    judged, earlier = {task_key(one) for one in judgments}, len(judgments)
    rest = [task for task in tasks if task_key(task) not in judged]
    with Progress().phase("judging", len(rest)) as advance:
        for first in range(0, len(rest), settings.batch_size):
            batch = rest[first : first + settings.batch_size]
            made = [one for one in labeler.label(batch, settings.device) if one is not None]
            append_judgments(folder, made)
            judgments += made
            advance(len(batch))
    count = len(judgments) - earlier
    if rest and not count:
        raise ValueError(f"none of {len(rest)} judgments could be made: the lines above say why")
    print(f"judgments: {folder / PREFERENCES}, {count} new and {earlier} earlier; {len(rest) - count} have no score")
    _print_annotators(judgments)
    return 0


def _has_content(file: Path) -> bool:
    return file.is_file() and file.stat().st_size > 0


def _print_annotators(judgments: Sequence[Judgment]) -> None:
    """Print the number of judgments of each annotator, who chooses one side, and how far annotators agree."""
    counts = Counter((one.annotator or "-", one.kind) for one in judgments)
    ties = Counter((one.annotator or "-", one.kind) for one in judgments if one.kind == "pair" and _is_tie(one))
    rows = [
        (name, kind, str(count), f"{ties[name, kind] / count:.2f}" if kind == "pair" else "-")
        for (name, kind), count in counts.items()
    ]
    print_table(("annotator", "kind", "judgments", "ties"), rows)
    for choices in side_choices(judgments):
        if choices.one_sided:
            print(choices)
    for dimension in dict.fromkeys(name for one in judgments for name in one.scores):
        for result in agreement(judgments, dimension):
            print(
                f"agreement on {dimension} ({result.kind}, {result.judged} judged by two or more):"
                f" {result.raw.text('.2f')}, Krippendorff's alpha {result.alpha.text('.2f')}"
            )


def _is_tie(judgment: Judgment) -> bool:
    """Whether all dimensions of a pair are ties."""
    return all(left == right for left, right in judgment.scores.values())
