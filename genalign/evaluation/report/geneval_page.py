"""The page about a GenEval evaluation, alone or against another model's."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from genalign.evaluation.evaluate import ELSEWHERE, Evaluation
from genalign.evaluation.geneval.compare_models import Paired, compared, finished
from genalign.evaluation.geneval.result_files import Result, read_results
from genalign.evaluation.geneval.upstream_results import VERIFIER
from genalign.evaluation.paired import ranked
from genalign.evaluation.report import sections
from genalign.evaluation.report.html import page
from genalign.evaluation.report.reading import Comparison, Run
from genalign.evaluation.report.samples import fitting, thumbnail
from genalign.evaluation.report.sections import Cell, Fact, flattened
from genalign.evaluation.report.words import count, interval, percent, plain, scored
from genalign.runtime.files import write_text
from genalign.runtime.media import Thumbnail

_WRONG_SHOWN = 24
_OVERALL = "mean over tasks"
_SOURCE = "What is in an image is said by the detector named below, so that this is GenEval-style and not GenEval."
_ORIGINAL = "What is in an image is said by GenEval's own script."
_BY_NOISE = "the same prompts from the same initial noise"
_BY_NUMBER = "the same prompts, and images of the same number, whose noises are not known"


@dataclass(frozen=True)
class _Row:
    """A task and its scores."""

    task: str
    images: int
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class _Wrong:
    """An image, and what is wrong with it."""

    image: Thumbnail
    prompt: str
    reason: str


def write_geneval(folder: Path, against: Path | None = None) -> Path:
    """Write ``report.html`` into the folder of a finished evaluation; its path. ``against`` is that of another model.

    Raises FileNotFoundError where an evaluation is not finished, ValueError where the two cannot be compared.
    """
    evaluation, results = finished(folder), read_results(folder / "results.jsonl")
    manifest = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    overall = evaluation.overall["relaxed"]
    text = page("geneval.html.j2").render(
        name=folder.resolve().name,
        title=f"Correct images on {evaluation.protocol.suite}",
        score=scored("relaxed", overall.mean),
        interval=interval("relaxed", overall, scored),
        source=_ORIGINAL if evaluation.protocol.verifier == VERIFIER else _SOURCE,
        tiles=_tiles(evaluation, results),
        scores=[plain(name) for name in evaluation.score_names],
        rows=_rows(evaluation),
        wrong=_wrong(folder, results),
        hash=manifest["hash"],
        protocol_hash=manifest["protocol_hash"],
        subject=flattened(manifest["subject"]),
        protocol=flattened(manifest["protocol"]),
        **_against(folder, evaluation, against),
    )
    path = folder / "report.html"
    write_text(path, text)
    return path


def _tiles(evaluation: Evaluation, results: Sequence[Result]) -> list[Fact]:
    prompts: dict[str, bool] = {}
    for result in results:
        prompts[result.prompt] = prompts.get(result.prompt, False) or result.correct
    return [
        Fact("images", count(len(evaluation.records))),
        Fact("prompts", count(len(prompts))),
        Fact("images right", percent(_share([result.correct for result in results]))),
        Fact("prompts right at least once", percent(_share(list(prompts.values())))),
        Fact("not judged", count(evaluation.failed)),
    ]


def _share(values: Sequence[bool]) -> float:
    return sum(values) / max(1, len(values))


def _rows(evaluation: Evaluation) -> list[_Row]:
    estimates = {**evaluation.tasks, _OVERALL: evaluation.overall}
    return [
        _Row(
            plain(task),
            next(iter(found.values())).n,
            tuple(Cell(scored(name, value.mean), interval(name, value, scored)) for name, value in found.items()),
        )
        for task, found in estimates.items()
    ]


def _wrong(folder: Path, results: Sequence[Result]) -> list[_Wrong]:
    """The first images that are wrong, of every task in turn, as many as the page has room for."""
    tasks: dict[str, list[Result]] = {}
    for result in results:
        if not result.correct:
            tasks.setdefault(result.tag, []).append(result)
    first = _in_turn(tasks.values())[:_WRONG_SHOWN]
    cards = (_Wrong(thumbnail(folder, result.filename), result.prompt, result.reason) for result in first)
    return fitting(cards, lambda card: (card.image,))


def _in_turn(groups: Iterable[Sequence[Result]]) -> list[Result]:
    """The first of every group, then the second of every group, and so on."""
    return [item for layer in zip_longest(*groups) for item in layer if item is not None]


def _against(folder: Path, after: Evaluation, other: Path | None) -> dict[str, Any]:
    """What the page says about the comparison; empty where there is none."""
    if other is None:
        return dict.fromkeys(("against", "pairing", "tables", "win_rates", "regressions", "improvements"), ())
    before = finished(other)
    found, pairs = compared(before, after), ranked(before, after)
    run = Run(folder, (), None, None, before, after, Comparison(found.gain, found.tasks, pairs), ())
    return {
        "against": other.resolve().name,
        "pairing": _BY_NUMBER if after.protocol.kernel == ELSEWHERE else _BY_NOISE,
        "tables": sections.tables(run),
        "win_rates": _win_rates(found),
        "regressions": sections.losses(pairs, other, folder),
        "improvements": sections.wins(pairs, other, folder),
    }


def _win_rates(found: Paired) -> list[Fact]:
    return [
        Fact(
            f"prompts won, {plain(name)}",
            f"{percent(wins.rate.mean)} ({interval(name, wins.rate, lambda _, value: percent(value))}), ties"
            f" {percent(wins.ties)} as half, sign test p = {wins.p_value:.3g}",
        )
        for name, wins in found.wins.items()
    ]
