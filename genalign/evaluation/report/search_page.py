"""The page about a search: its scores, its cost, and how candidates were copied and pruned."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from genalign.evaluation.report.curves import Axis, Point, line_chart, svg
from genalign.evaluation.report.html import write_page
from genalign.evaluation.report.samples import fitting, thumbnail
from genalign.evaluation.report.words import call_words, count, duration, number, plain

_MAX_CARDS = 24
_WIDTH, _ROW = 220.0, 7.0  # of a tree, and of one candidate in it, in pixels
Json = Mapping[str, Any]


def write_search(folder: Path) -> Path:
    """Write ``report.html`` into a search's folder, and return its path.

    Raises FileNotFoundError if no prompt is finished.
    """
    path = folder / "scores.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = sorted(map(json.loads, lines), key=lambda row: int(row["index"]))
    if not rows:
        raise FileNotFoundError(f"{folder} has no finished prompt")
    lineages = [json.loads((folder / "lineage" / f"{row['index']:05d}.json").read_text("utf-8")) for row in rows]
    cards = (
        (thumbnail(folder, row["image"]), row, tree(lineage["lives"], lineage["chosen"]))
        for row, lineage in zip(rows[:_MAX_CARDS], lineages, strict=False)
    )
    return write_page(
        folder / "report.html",
        "search.html.j2",
        facts=_facts(rows),
        curve=_curve(next(iter(rows[0]["scores"])), [lineage["lives"] for lineage in lineages]),
        cards=fitting(cards, lambda card: card[:1]),
        prompts=len(rows),
    )


def _facts(rows: Sequence[Json]) -> dict[str, str]:
    """Mean scores, failed ones left out, mean calls of a prompt, and the time of all prompts."""
    facts, calls = {}, Counter[str]()
    for name in rows[0]["scores"]:
        values = [row["scores"][name] for row in rows if row["scores"][name] is not None]
        facts[plain(name)] = number(math.fsum(values) / len(values)) if values else "failed"
    for row in rows:
        calls.update(row["calls"])
    facts |= {f"{call_words(call)} per prompt": count(n / len(rows)) for call, n in sorted(calls.items())}
    return facts | {"time": duration(sum(row["seconds"] for row in rows))}


def tree(candidates: Sequence[Json], returned: int) -> Markup:
    """Draw the candidates of one prompt, a row each from its first step to its last; a copy hangs on its parent.

    The candidate that was ``returned`` and its ancestors stand out.
    """
    steps = max(candidate["ended"] or 0 for candidate in candidates) or 1
    lineage, number = set[int](), returned
    while number is not None:
        lineage.add(number)
        number = candidates[number]["parent"]
    lines = []
    for row, candidate in enumerate(candidates):
        y, kind = _ROW * (row + 0.5), "returned" if row in lineage else "pruned"
        x1, x2 = (_WIDTH * at / steps for at in (candidate["born"], candidate["ended"] or candidate["born"]))
        if candidate["parent"] is not None:
            lines.append((kind, x1, x1, _ROW * (candidate["parent"] + 0.5), y))
        lines.append((kind, x1, x2, y, y))
    body = "".join(
        f'<line class="{kind}" x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}"/>'
        for kind, x1, x2, y1, y2 in lines
    )
    return svg(_WIDTH, _ROW * len(candidates), "tree", f"{len(candidates)} candidates over {steps} steps", body)


def _curve(reward: str, prompts: Sequence[Sequence[Json]]) -> Markup:
    """Draw the best first reward so far, a mean over prompts, against the steps spent on a prompt.

    Candidates count in the order of their numbers; the curve starts when every prompt has a finished one.
    """
    tracks = [_best_so_far(candidates) for candidates in prompts]
    points = []
    for steps in sorted({spent for track in tracks for spent, _ in track}):
        best = [max((score for spent, score in track if spent <= steps), default=-math.inf) for track in tracks]
        points.append(Point(steps, math.fsum(best) / len(best)))
    finite = [point for point in points if math.isfinite(point.y)]
    if not finite:
        return Markup()
    return line_chart(finite, Axis("steps of candidates", count), Axis(plain(reward), number), "Best so far")


def _best_so_far(candidates: Sequence[Json]) -> list[tuple[int, float]]:
    """After each candidate, the steps that were spent and the best score so far, minus infinity without one."""
    last = max(candidate["ended"] or 0 for candidate in candidates)
    spent, best, track = 0, -math.inf, []
    for candidate in candidates:
        spent += (candidate["ended"] or candidate["born"]) - candidate["born"]
        scores = candidate["scores"]
        if candidate["ended"] == last and scores and scores[-1][1][0] is not None:
            best = max(best, float(scores[-1][1][0]))
        track.append((spent, best))
    return track
