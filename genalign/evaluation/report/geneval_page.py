"""The page about a GenEval evaluation, alone or against that of another model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from genalign.evaluation.evaluate import EXTERNAL, Evaluation
from genalign.evaluation.geneval.compare_models import ModelComparison, compare_models, load_finished
from genalign.evaluation.geneval.result_files import ImageResult, read_results
from genalign.evaluation.geneval.upstream_results import VERIFIER
from genalign.evaluation.paired import pairs_by_gain
from genalign.evaluation.report import sections
from genalign.evaluation.report.html import page
from genalign.evaluation.report.reading import Comparison
from genalign.evaluation.report.samples import fitting, thumbnail
from genalign.evaluation.report.sections import OVERALL, flattened
from genalign.evaluation.report.summary import Fact
from genalign.evaluation.report.words import count, interval, percent, plain
from genalign.runtime.files import write_text
from genalign.runtime.media import Thumbnail

_MAX_WRONG = 24
_DETECTOR = "The detector named below finds the objects, so the score is GenEval-style and not GenEval's own."
_ORIGINAL = "GenEval's own script judged the images."
_BY_NOISE = "the same prompts from the same initial noise"
_BY_NUMBER = "the same prompts, and images of the same number, whose noises are not known"


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
    manifest = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    text = page("geneval.html.j2").render(
        name=folder.resolve().name,
        title=f"Correct images on {evaluation.protocol.suite}",
        overall=evaluation.overall["relaxed"],
        source=_ORIGINAL if evaluation.protocol.verifier == VERIFIER else _DETECTOR,
        tiles=_tiles(evaluation, results),
        scores=evaluation.score_names,
        tasks={**evaluation.tasks, OVERALL: evaluation.overall},
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


def _tiles(evaluation: Evaluation, results: Sequence[ImageResult]) -> list[Fact]:
    prompts: dict[str, bool] = {}
    for result in results:
        prompts[result.prompt] = prompts.get(result.prompt, False) or result.correct
    correct = sum(result.correct for result in results)
    return [
        Fact("images", count(len(evaluation.records))),
        Fact("prompts", count(len(prompts))),
        Fact("correct images", percent(correct / max(1, len(results)))),
        Fact("prompts with a correct image", percent(sum(prompts.values()) / max(1, len(prompts)))),
        Fact("not judged", count(evaluation.failed)),
    ]


def _wrong(folder: Path, results: Sequence[ImageResult]) -> list[tuple[Thumbnail, ImageResult]]:
    """The first wrong images with their results, one of every task in turn, as many as fit on the page."""
    tasks: dict[str, list[ImageResult]] = {}
    for result in results:
        if not result.correct:
            tasks.setdefault(result.tag, []).append(result)
    in_turn = [result for layer in zip_longest(*tasks.values()) for result in layer if result]
    cards = ((thumbnail(folder, result.filename), result) for result in in_turn[:_MAX_WRONG])
    return fitting(cards, lambda card: card[:1])


def _against(folder: Path, after: Evaluation, other: Path | None) -> dict[str, Any]:
    """The template's values about the comparison with another model; empty without one."""
    if other is None:
        return dict.fromkeys(("against", "pairing", "tables", "win_rates", "regressions", "improvements"))
    before = load_finished(other)
    comparison, pairs = compare_models(before, after), pairs_by_gain(before, after)
    tables = sections.tables(before, after, Comparison(comparison.gain, comparison.tasks, pairs))
    return {
        "against": other.resolve().name,
        "pairing": _BY_NUMBER if after.protocol.kernel == EXTERNAL else _BY_NOISE,
        "tables": {"relaxed": tables.pop("relaxed"), **tables},  # the score of the headline comes first
        "win_rates": _win_rates(comparison),
        "regressions": sections.regressions(pairs, other, folder),
        "improvements": sections.improvements(pairs, other, folder),
    }


def _win_rates(comparison: ModelComparison) -> list[Fact]:
    return [
        Fact(
            f"prompts won, {plain(name)}",
            f"{percent(wins.rate.mean)} ({interval(name, wins.rate, lambda _, value: percent(value))}), ties"
            f" {percent(wins.ties)} as half, sign test p = {wins.p_value:.3g}",
        )
        for name, wins in comparison.wins.items()
    ]
