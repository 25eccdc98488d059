"""The page about a search: what was found, what it cost, and how candidates came and went."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from genalign.evaluation.report.curves import Axis, Point, line_chart
from genalign.evaluation.report.html import page
from genalign.evaluation.report.samples import fitting, thumbnail
from genalign.evaluation.report.words import count, duration, number, plain
from genalign.runtime.files import write_text
from genalign.runtime.media import Thumbnail

_SHOWN = 24
_WIDTH, _ROW = 220.0, 7.0


@dataclass(frozen=True)
class _Card:
    """One prompt's sample, and the tree of its candidates."""

    prompt: str
    sample: Thumbnail
    scores: str
    tree: Markup


def write_search(folder: Path) -> Path:
    """Write ``report.html`` into a search's folder; its path. Raises FileNotFoundError where nothing is finished."""
    rows = _rows(folder)
    if not rows:
        raise FileNotFoundError(f"{folder} has no finished prompt")
    families = [json.loads((folder / "lineage" / f"{row['index']:05d}.json").read_text("utf-8")) for row in rows]
    cards = (_card(folder, row, family) for row, family in zip(rows[:_SHOWN], families, strict=False))
    path = folder / "report.html"
    text = page("search.html.j2").render(
        name=folder.resolve().name,
        facts=_facts(rows),
        curve=_curve(rows, families),
        cards=fitting(cards, lambda card: (card.sample,)),
        prompts=len(rows),
    )
    write_text(path, text)
    return path


def _rows(folder: Path) -> list[dict[str, Any]]:
    path = folder / "scores.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return sorted((json.loads(line) for line in lines), key=lambda row: int(row["index"]))


def _facts(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Means over prompts of the scores and of what was billed, and the time."""
    scores = [(plain(name), number(_mean([row["scores"][name] for row in rows]))) for name in rows[0]["scores"]]
    calls: Counter[str] = Counter()
    for row in rows:
        calls.update(row["calls"])
    billed = [(f"{plain(call)} a prompt", count(total / len(rows))) for call, total in sorted(calls.items())]
    return [*scores, *billed, ("time", duration(sum(row["seconds"] for row in rows)))]


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else math.nan


def _card(folder: Path, row: Mapping[str, Any], family: Mapping[str, Any]) -> _Card:
    scores = ", ".join(f"{plain(name)} {'failed' if v is None else number(v)}" for name, v in row["scores"].items())
    return _Card(row["prompt"], thumbnail(folder, row["image"]), scores, tree(family["lives"], family["chosen"]))


def tree(lives: Sequence[Mapping[str, Any]], chosen: int) -> Markup:
    """An SVG of one prompt's candidates, a row each from the step where it began to that where it ended; the one that
    was returned stands out, with those it was copied from, and a copy hangs on its parent.
    """
    steps = max(life["ended"] or 0 for life in lives) or 1
    ancestors = _ancestors(lives, chosen)
    parts = []
    for row, life in enumerate(lives):
        y, kind = _ROW * (row + 0.5), "kept" if row in ancestors else "gone"
        x1, x2 = (_WIDTH * at / steps for at in (life["born"], life["ended"] or life["born"]))
        if life["parent"] is not None:
            parts.append(_line(kind, x1, x1, _ROW * (life["parent"] + 0.5), y))
        parts.append(_line(kind, x1, x2, y, y))
    size = f"0 0 {_WIDTH:.0f} {_ROW * len(lives):.0f}"
    label = f"{len(lives)} candidates over {steps} steps"
    return Markup(f'<svg class="tree" viewBox="{size}" role="img" aria-label="{label}">{"".join(parts)}</svg>')


def _line(kind: str, x1: float, x2: float, y1: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}"/>'


def _ancestors(lives: Sequence[Mapping[str, Any]], chosen: int) -> set[int]:
    found, at = set(), chosen
    while at is not None:
        found.add(at)
        at = lives[at]["parent"]
    return found


def _curve(rows: Sequence[Mapping[str, Any]], families: Sequence[Mapping[str, Any]]) -> Markup:
    """The first reward of the best finished candidate so far against the steps that candidates took, candidates in the
    order of their numbers, a mean over prompts.
    """
    tracks = [_track(family["lives"]) for family in families]
    length = min(len(track) for track in tracks)
    points = [
        Point(_mean([track[i][0] for track in tracks]), _mean([track[i][1] for track in tracks])) for i in range(length)
    ]
    known = [point for point in points if math.isfinite(point.y)]
    reward = next(iter(rows[0]["scores"]))
    return line_chart(known, Axis("steps of candidates", count), Axis(plain(reward), number), "Best so far")


def _track(lives: Sequence[Mapping[str, Any]]) -> list[tuple[float, float | None]]:
    steps = max(life["ended"] or 0 for life in lives)
    spent, best, track = 0.0, None, []
    for life in lives:
        spent += (life["ended"] or life["born"]) - life["born"]
        if life["ended"] == steps and life["scores"] and life["scores"][-1][1][0] is not None:
            score = float(life["scores"][-1][1][0])
            best = score if best is None else max(best, score)
        track.append((spent, best))
    return track
