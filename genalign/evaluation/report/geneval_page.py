"""The page about a GenEval evaluation, alone or against that of another model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from genalign.evaluation.evaluate import EXTERNAL, Evaluation
from genalign.evaluation.geneval.result_files import ImageResult, read_results
from genalign.evaluation.geneval.run_evaluation import load_finished
from genalign.evaluation.geneval.upstream_results import VERIFIER
from genalign.evaluation.paired import compare_models, pairs_by_gain
from genalign.evaluation.report import sections
from genalign.evaluation.report.html import write_page
from genalign.evaluation.report.reading import Comparison
from genalign.evaluation.report.samples import fitting, thumbnail
from genalign.evaluation.report.sections import OVERALL, flattened
from genalign.evaluation.report.words import count, percent, plain
from genalign.metrics.intervals import WinRate
from genalign.runtime.media import Thumbnail

_MAX_WRONG = 24


def write_geneval(folder: Path, against: Path | None = None) -> Path:
    """Write ``report.html`` into the folder of a finished evaluation, and return its path.

    Args:
        folder: The evaluation.
        against: The evaluation of another model, which is shown as "before".

    Raises:
        FileNotFoundError: an evaluation is not finished.
        ValueError: the two evaluations cannot be compared.
    """
    evaluation, results = load_finished(folder), read_results(folder / "results.jsonl")
    manifest, overall = json.loads((folder / "evaluation.json").read_text(encoding="utf-8")), evaluation.overall
    return write_page(
        folder / "report.html",
        "geneval.html.j2",
        evaluation=evaluation,
        overall=overall["relaxed"],
        original=evaluation.protocol.verifier == VERIFIER,
        external=evaluation.protocol.kernel == EXTERNAL,
        numbers=_tiles(evaluation, results),
        tasks={**evaluation.tasks, OVERALL: overall},
        wrong=_wrong(folder, results),
        manifest=manifest,
        subject=flattened(manifest["subject"]),
        protocol=flattened(manifest["protocol"]),
        **(_against(folder, evaluation, against) if against else {"against": ""}),
    )


def _tiles(evaluation: Evaluation, results: Sequence[ImageResult]) -> dict[str, str]:
    prompts = {result.prompt for result in results}
    correct = [result for result in results if result.correct]
    solved = {result.prompt for result in correct}
    return {
        "images": count(len(evaluation.records)),
        "prompts": count(len(prompts)),
        "correct images": percent(len(correct) / max(1, len(results))),
        "prompts with a correct image": percent(len(solved) / max(1, len(prompts))),
        "not judged": count(evaluation.failed),
    }


def _wrong(folder: Path, results: Sequence[ImageResult]) -> list[tuple[Thumbnail, ImageResult]]:
    """The first wrong images with their results, one of every task in turn, as many as fit on the page."""
    tasks: dict[str, list[ImageResult]] = {}
    for result in results:
        if not result.correct:
            tasks.setdefault(result.tag, []).append(result)
    in_turn = [result for layer in zip_longest(*tasks.values()) for result in layer if result]
    cards = ((thumbnail(folder, result.filename), result) for result in in_turn[:_MAX_WRONG])
    return fitting(cards, lambda card: card[:1])


def _against(folder: Path, after: Evaluation, other: Path) -> dict[str, Any]:
    """The template's values about the comparison with another model."""
    before = load_finished(other)
    comparison, pairs = compare_models(before, after), pairs_by_gain(before, after)
    tables = sections.tables(before, after, Comparison(comparison.gain, comparison.tasks, pairs))
    return {
        "against": other.resolve().name,
        "tables": {"relaxed": tables.pop("relaxed"), **tables},  # the score of the headline comes first
        "win_rates": {f"prompts won, {plain(name)}": _win_words(wins) for name, wins in comparison.wins.items()},
        **sections.extreme_pairs(pairs, other, folder),
    }


def _win_words(wins: WinRate) -> str:
    rate = wins.rate
    interval = f"{percent(rate.low)} to {percent(rate.high)}"
    return f"{percent(rate.mean)} ({interval}), ties {percent(wins.ties)} as half, sign test p = {wins.p_value:.3g}"
