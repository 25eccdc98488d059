"""The page about a search: its scores, its cost, and how candidates were copied and pruned."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from markupsafe import Markup

from genalign.evaluation.report.curves import Axis, Point, line_chart, svg, ticks
from genalign.evaluation.report.html import write_page
from genalign.evaluation.report.samples import fitting, thumbnail
from genalign.evaluation.report.sections import flattened
from genalign.evaluation.report.words import SHARES, call_words, count, duration, number, percent, plain, scored, signed
from genalign.runtime.media import Thumbnail

_MAX_CARDS = 24
_WIDTH, _MARGIN = 240.0, 8.0  # of a tree in pixels
_ROW, _TREE_HEIGHT = 8.0, 200.0  # largest heights of one candidate and of all
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
    config = json.loads((folder / "config.json").read_text("utf-8")) if (folder / "config.json").is_file() else {}
    lineages = [json.loads((folder / "lineage" / f"{row['index']:05d}.json").read_text("utf-8")) for row in rows]
    cards = (
        (_thumbnails(folder, row), row, tree(lineage["lives"], lineage["chosen"]))
        for row, lineage in zip(rows[:_MAX_CARDS], lineages, strict=False)
    )
    return write_page(
        folder / "report.html",
        "search.html.j2",
        facts=_facts(rows),
        rewards=list(rows[0]["scores"]),
        settings=_settings(config, rows),
        curve=_curve(next(iter(rows[0]["scores"])), [lineage["lives"] for lineage in lineages]),
        cards=fitting(cards, lambda card: [item for _, item, _, _ in card[0]]),
        details=flattened(config),
    )


def _thumbnails(folder: Path, row: Json) -> list[tuple[str, Thumbnail, Json, int]]:
    """The pictures of a prompt with their captions, scores and NFE: what plain sampling makes, and the best sample."""
    best = ("best", thumbnail(folder, row["image"]), row["scores"], row["calls"].get("nfe", 0))
    base = row.get("plain")
    if not base:
        return [best]
    return [("plain", thumbnail(folder, base["image"]), base["scores"], base["calls"].get("nfe", 0)), best]


def _settings(config: Json, rows: Sequence[Json]) -> dict[str, str]:
    """What was searched for, with which strategy and model, in words."""
    strategy, sampling, budget = (config.get(name) or {} for name in ("strategy", "sampling", "budget"))
    finished = max(str(row.get("finished", "")) for row in rows)
    guidance = f", guidance {sampling['guidance']:g}" if sampling.get("guidance") is not None else ""
    settings = {
        "model": (config.get("model") or {}).get("path"),
        "adapter": config.get("lora"),
        "strategy": _call_text(strategy) if strategy else None,
        "budget per prompt": ", ".join(
            f"{budget[name]:g} {unit}"
            for name, unit in {"nfe": "NFE", "cost": "units of cost", "seconds": "s"}.items()
            if budget.get(name)
        ),
        "sampling": f"{sampling['num_steps']} steps{guidance}" if sampling else None,
        "rewards": ", ".join(plain(name) for name in rows[0]["scores"]),
        "seed": config.get("seed"),
        "prompts": len(rows),
        "finished": f"{datetime.fromisoformat(finished):%Y-%m-%d %H:%M} UTC" if finished else None,
    }
    return {name: str(value) for name, value in settings.items() if value not in (None, "")}


def _call_text(spec: Json) -> str:
    """A class with its settings, those that are not set left out: "Prune(steps=[1], keep=[0.5])"."""
    name = str(spec["class_path"]).rpartition(".")[2]
    arguments = {key: value for key, value in (spec.get("init_args") or {}).items() if value is not None}
    texts = (
        f"{key}={_call_text(value) if isinstance(value, dict) and 'class_path' in value else json.dumps(value)}"
        for key, value in arguments.items()
    )
    return f"{name}({', '.join(texts)})"


def _facts(rows: Sequence[Json]) -> dict[str, str]:
    """Mean scores with the gain over plain sampling and both costs, mean calls of a prompt, and the time of all."""
    facts, calls = dict[str, str](), Counter[str]()
    for name in rows[0]["scores"]:
        facts |= _score_facts(rows, name)
    for row in rows:
        calls.update(row["calls"])
    compared = [row["plain"] for row in rows if row.get("plain")]
    if compared:
        plain_nfe = sum(base["calls"]["nfe"] for base in compared)
        facts["NFE of plain sampling per prompt"] = count(plain_nfe / len(compared))
    words = {"nfe": "denoiser calls (NFE)", "decode": "VAE decodes"}
    order = sorted(calls, key=lambda call: (call not in words, call != "nfe", call))
    facts |= {f"{words.get(call) or call_words(call)} per prompt": count(calls[call] / len(rows)) for call in order}
    return facts | {"time": duration(sum(row["seconds"] for row in rows))}


def _score_facts(rows: Sequence[Json], name: str) -> dict[str, str]:
    """The mean score by one reward, and the mean gain over plain sampling where both were scored."""
    values = [row["scores"][name] for row in rows if row["scores"][name] is not None]
    facts = {plain(name): scored(name, math.fsum(values) / len(values)) if values else "failed"}
    pairs = [(row["scores"][name], row["plain"]["scores"][name]) for row in rows if row.get("plain")]
    gains = [best - base for best, base in pairs if best is not None and base is not None]
    if gains:
        points = " points" if name in SHARES else ""
        facts[f"{plain(name)}, gain over plain sampling"] = f"{signed(name, math.fsum(gains) / len(gains))}{points}"
    return facts


def tree(candidates: Sequence[Json], returned: int) -> Markup:
    """Draw the candidates of one prompt, a row each from its first step to its last; a copy hangs on its parent.

    The candidate that was ``returned`` and its ancestors stand out. The axis counts denoising steps.
    """
    steps = max(candidate["ended"] or 0 for candidate in candidates) or 1
    lineage, node = set[int](), returned
    while node is not None and node not in lineage:  # an edited file may hold a circle
        lineage.add(node)
        node = candidates[node]["parent"]
    row_height = min(_ROW, _TREE_HEIGHT / len(candidates))
    bottom, width = row_height * len(candidates) + 2, _WIDTH - 2 * _MARGIN
    lines = []
    for row, candidate in enumerate(candidates):
        y, kind = row_height * (row + 0.5), "returned" if row in lineage else "pruned"
        ended = candidate["ended"] or candidate["born"]
        x1, x2 = (_MARGIN + width * at / steps for at in (candidate["born"], ended))
        if candidate["parent"] is not None:
            lines.append((kind, x1, x1, row_height * (candidate["parent"] + 0.5), y))
        lines.append((kind, x1, x2, y, y))
    body = "".join(
        f'<line class="{kind}" x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}"/>'
        for kind, x1, x2, y1, y2 in sorted(lines, key=lambda line: line[0])
    )
    body += f'<line class="base" x1="{_MARGIN:g}" x2="{_WIDTH - _MARGIN:g}" y1="{bottom:.1f}" y2="{bottom:.1f}"/>'
    whole = [value for value in ticks(0, steps, 4) if value.is_integer()]
    body += "".join(
        f'<text class="mid" x="{_MARGIN + width * value / steps:.1f}" y="{bottom + 14:.1f}">{value:g}</text>'
        for value in whole
    )
    body += f'<text class="end" x="{_WIDTH - _MARGIN:g}" y="{bottom + 30:.1f}">denoising steps</text>'
    return svg(_WIDTH, bottom + 34, "tree", f"{len(candidates)} candidates over {steps} steps", body)


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
    return line_chart(
        finite,
        Axis("denoising steps per prompt", count),
        Axis(plain(reward), percent if reward in SHARES else number),
        "Best so far",
    )


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
