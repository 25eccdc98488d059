"""``genalign reward label``: judgments of collected comparisons, by people on a page, by rewards or by judges."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from genalign.cli import parsing
from genalign.cli.context import CommandContext, print_table, require_rate
from genalign.cli.generation_settings import require_positive
from genalign.reward_learning.annotators import agreement, side_choices
from genalign.reward_learning.label_page import LabelPageSettings, serve_labels
from genalign.reward_learning.labeling import Labeler, missing_dimensions, sample_rate, unlabeled
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
from genalign.runtime.files import write_json
from genalign.runtime.progress import Progress
from genalign.runtime.text_files import read_json

LABELERS = "labelers.json"
"""The file in a dataset's folder that records the settings of each annotator of ``by``."""


@dataclass(frozen=True, kw_only=True)
class LabelPage:
    """The page on which people judge.

    Args:
        dimensions: What is judged, with a separate answer for each.
        scale: The best grade of a rating; 1 is the worst.
        instructions: A text for annotators, such as the criteria.
        host: Address to listen on; one that other machines can reach needs a token.
        port: Port to listen on.
        token_variable: Environment variable with the token that annotators need.
    """

    dimensions: tuple[str, ...] = (OVERALL,)
    scale: int = 5
    instructions: str = ""
    host: str = "127.0.0.1"
    port: int = 8322
    token_variable: str = "GENALIGN_TOKEN"


@dataclass(frozen=True, kw_only=True)
class RewardLabel:
    """Judgments of a folder's comparisons: by people, on a page in the browser, or by rewards or judges.

    Run the command again to resume it, to retry what a judge gave no answer to, or to judge more dimensions.

    Args:
        folder: Folder of a dataset, with the comparisons.jsonl of genalign reward collect; the judgments are added to
            its preferences.jsonl.
        by: The labeler: a genalign.reward_learning.labeling.RewardLabeler, or a JudgeLabeler; null serves the page.
            Other settings need other annotator names; dimensions and annotators may be added.
        kind: What is judged in each comparison: pair (each two of its samples), ranking (all of them), rating or label
            (each sample); null takes the comparison's own kind. On the page, more than two samples are ranked.
        per_comparison: Number of annotators who judge a comparison, drawn by the seed; null for all.
        batch_size: Number of judgments that are made at once, and then written.
        seed: Seed of the draw of annotators.
        device: Torch device of the samples when they are scored.
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
    """Run ``genalign reward label``: serve the page, or make the missing judgments.

    Prints how far annotators agree.
    """
    settings, plain = parsing.parse(RewardLabel, arguments, "reward label", "folder")
    if settings.by is not None:
        return _label(settings, settings.by, plain["by"])
    page, folder = settings.page, Path(settings.folder)
    kind: Literal["pair", "rating", "label"] = settings.kind if settings.kind in ("rating", "label") else "pair"
    labels = LabelPageSettings(kind, page.dimensions, page.scale, page.instructions, settings.seed)
    serve_labels(folder, labels, page.host, page.port, os.environ.get(page.token_variable) or None, page.token_variable)
    if _has_content(folder / PREFERENCES):
        _print_annotators(read_judgments(folder))
    return 0


def _label(settings: RewardLabel, labeler: Labeler, plain: Mapping[str, Any]) -> int:
    """Make and write the judgments of a labeler, batch by batch, and print the numbers of new and missing ones.

    ``plain`` are the labeler's settings as JSON types.
    """
    folder = Path(settings.folder)
    comparisons = read_judgments(folder / COMPARISONS)
    require_rate({"by": labeler}, sample_rate(comparisons))
    tasks = unlabeled(comparisons, labeler.annotator_names, settings.kind, settings.per_comparison, settings.seed)
    mend(folder / PREFERENCES)
    judgments = read_judgments(folder) if _has_content(folder / PREFERENCES) else []
    if {"rating", "label"} <= {one.kind for one in (*judgments, *tasks)}:
        raise ValueError(f"{folder} would mix ratings (on a scale) with labels (0 or 1): use separate folders")
    _record_labeler(folder, labeler.annotator_names, plain, {one.annotator for one in judgments})
    groups, earlier = missing_dimensions(tasks, judgments, labeler.dimensions), len(judgments)
    rest = sum(map(len, groups.values()))
    with Progress().phase("judging", rest) as advance:
        for dimensions, group in groups.items():
            for first in range(0, len(group), settings.batch_size):
                batch = group[first : first + settings.batch_size]
                new = [one for one in labeler.label(batch, settings.device, dimensions) if one is not None]
                append_judgments(folder, new)
                judgments += new
                advance(len(batch))
    count = len(judgments) - earlier
    if rest and not count:
        raise ValueError(f"all {rest} judgments failed; see the errors above")
    missing = Counter[str]()
    for dimensions, group in missing_dimensions(tasks, judgments, labeler.dimensions).items():
        missing.update(dict.fromkeys(dimensions, len(group)))
    text = "".join(f"; {number} have no score for {name}" for name, number in missing.items())
    print(f"judgments: {folder / PREFERENCES}, {count} new and {earlier} earlier{text}")
    _print_annotators(judgments)
    return 0


def _record_labeler(folder: Path, names: Sequence[str], labeler: Mapping[str, Any], judged_by: set[str | None]) -> None:
    """Record the settings of annotators; their dimensions may be more or fewer than before.

    Args:
        folder: The dataset's folder.
        names: The names under which the labeler judges.
        labeler: Its settings as JSON types.
        judged_by: The annotators of the judgments so far.

    Raises:
        ValueError: There are judgments under one of the names, with other settings or by someone else.
    """
    arguments = dict(labeler.get("init_args") or {})
    annotators = arguments.pop("annotators", None) or {}
    dimensions = {**(arguments.pop("rewards", None) or {}), **(arguments.pop("judges", None) or {})}
    recorded = read_json(folder / LABELERS) if (folder / LABELERS).is_file() else {}
    for name in names:
        own = {"class_path": labeler["class_path"], **arguments, "annotator": annotators.get(name)}
        earlier: dict[str, Any] = {}
        if name in judged_by:
            if name not in recorded:
                raise ValueError(f"{folder} has judgments of {name!r} by someone else: give the annotator another name")
            before, earlier = recorded[name]["settings"], recorded[name]["dimensions"]
            changed = [key for key in {**before, **own} if before.get(key) != own.get(key)]
            changed += [key for key in dimensions if key in earlier and earlier[key] != dimensions[key]]
            if changed:
                raise ValueError(
                    f"{folder} has judgments of {name!r} with another {', '.join(changed)}, see its {LABELERS}: give"
                    " the annotator another name"
                )
        recorded[name] = {"settings": own, "dimensions": {**earlier, **dimensions}}
    write_json(folder / LABELERS, recorded)


def _has_content(file: Path) -> bool:
    return file.is_file() and file.stat().st_size > 0


def _print_annotators(judgments: Sequence[Judgment]) -> None:
    """Print the number of judgments of each annotator, who always chooses one side, and how far annotators agree."""
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
