"""``genalign reward label``: judgments of collected comparisons, by people on a page, by rewards or by judges."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from genalign.cli import parsing
from genalign.cli.context import CommandContext, print_table, require_rate
from genalign.cli.generation_settings import require_positive
from genalign.reward_learning.annotators import agreement, side_choices
from genalign.reward_learning.label_page import LabelPageSettings, serve_labels
from genalign.reward_learning.labeling import Labeler, sample_rate, task_key, unlabeled
from genalign.reward_learning.preferences import (
    COMPARISONS,
    OVERALL,
    PREFERENCES,
    Judgment,
    Kind,
    append_judgments,
    mend,
    read_judgments,
)
from genalign.runtime.progress import Progress


@dataclass(frozen=True, kw_only=True)
class LabelPage:
    """The page of people who judge.

    Args:
        dimensions: What is judged, each in an answer of its own.
        scale: The best grade of a rating; 1 is the worst.
        instructions: A text for annotators, such as the criteria.
        host: Address to listen on; one that other machines reach needs a token.
        port: Port to listen on.
        token_variable: Environment variable that holds the token that annotators must have.
    """

    dimensions: tuple[str, ...] = (OVERALL,)
    scale: int = 5
    instructions: str = ""
    host: str = "127.0.0.1"
    port: int = 8322
    token_variable: str = "GENALIGN_TOKEN"


@dataclass(frozen=True, kw_only=True)
class RewardLabel:
    """Judgments of the comparisons of a folder: by people, on a page in the browser, or by rewards or judges.

    Run the command again to resume it.

    Args:
        folder: Folder of a dataset, with the comparisons.jsonl of genalign reward collect; the judgments are added to
            its preferences.jsonl.
        by: What judges: a genalign.reward_learning.labeling.RewardLabeler, or a JudgeLabeler; null serves the page.
        kind: What is asked of each comparison: pair (each two of its samples), ranking (all of them), rating or label
            (each sample); null asks what the comparison says. On the page, more than two samples are ranked.
        per_comparison: Number of annotators who judge a comparison, drawn by the seed; null for all.
        batch_size: Number of judgments that are made at once, and then written.
        seed: Seed of the draw of annotators.
        device: Torch device that the samples are on when they are scored.
        page: What people are asked, and where the page is served.
    """

    folder: str
    by: Labeler | None = None
    kind: Kind | None = None
    per_comparison: int | None = None
    batch_size: int = 32
    seed: int = 0
    device: str = "cpu"
    page: LabelPage = field(default_factory=lambda: LabelPage())

    def __post_init__(self) -> None:
        require_positive(self, "per_comparison", "batch_size")


def reward_label_command(context: CommandContext, arguments: Sequence[str]) -> int:
    """Run ``genalign reward label``: serve the page, or make the judgments that are missing.

    Prints how far annotators agree.
    """
    settings, _ = parsing.parse(RewardLabel, arguments, "reward label", "folder")
    if settings.by is not None:
        return _label(settings, settings.by)
    page, folder = settings.page, Path(settings.folder)
    kind: Literal["pair", "rating", "label"] = settings.kind if settings.kind in ("rating", "label") else "pair"
    labels = LabelPageSettings(kind, page.dimensions, page.scale, page.instructions, settings.seed)
    serve_labels(folder, labels, page.host, page.port, os.environ.get(page.token_variable) or None, page.token_variable)
    if _has_content(folder / PREFERENCES):
        _print_annotators(read_judgments(folder))
    return 0


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
            new = [one for one in labeler.label(batch, settings.device) if one is not None]
            append_judgments(folder, new)
            judgments += new
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
