"""The original's own outputs in place of a detector: what GenEval's ``evaluate_images.py`` found and said.

Its results name boxes and scores but no colours. Its reasons give the colours wherever a rule looks at them: a colour
clause that is right says nothing, and one that is wrong counts the colours of the objects it looked at.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from genalign.evaluation.folder import manifest
from genalign.evaluation.geneval.compare_models import finished
from genalign.evaluation.geneval.judge import Judgement
from genalign.evaluation.geneval.metadata import Clause, Request
from genalign.evaluation.geneval.result_files import Result
from genalign.evaluation.geneval.run_evaluation import GenEvalFolder, prompt_row, sample_row
from genalign.evaluation.geneval.scoring import Detection, Verdict, verdict
from genalign.types import Prompt

VERIFIER = "GenEval's evaluate_images.py"
"""Who judged, in the protocol of an evaluation by the original's results."""

_PART = re.compile(r"(\d+) (\w+)")


def detections_of(result: Result) -> tuple[Detection, ...]:
    """The objects of an image, the most certain of each class first, with the colours that the results imply.

    Raises ValueError for a reason that cannot be read.
    """
    request = Request.parse(result.metadata)
    found: list[Detection] = []
    for name, boxes in result.details.items():
        objects = [Detection(name, (x1, y1, x2, y2), score) for x1, y1, x2, y2, score in boxes]
        colors = _colors(request, name, result.reason, len(objects))
        found += [replace(item, color=color) for item, color in zip(objects, colors, strict=True)]
    return tuple(found)


def _colors(request: Request, name: str, reason: str, count: int) -> Sequence[str | None]:
    """The colours of the best objects of a class; None for those that nobody looked at. Which of them has which colour
    is not known, and no rule asks for it.
    """
    clauses = [clause for clause in request.include if clause.name == name and clause.color is not None]
    if len(clauses) > 1:
        raise ValueError(f"{request.prompt!r} asks for {name} in two colours: the results do not say which are which")
    if not clauses or count < clauses[0].count:
        return [None] * count
    looked = _looked_at(clauses[0], reason)
    return [*looked, *[None] * (count - len(looked))]


def _looked_at(clause: Clause, reason: str) -> list[str]:
    """The colours of the ``count`` objects that a colour clause was judged by."""
    start = f"expected {clause.color} {clause.name}>={clause.count}, found "
    lines = [line for line in reason.splitlines() if line.startswith(start)]
    if not lines:
        return [str(clause.color)] * clause.count
    _, _, parts = lines[0].partition("; and ")
    colors = [color for number, color in _PART.findall(parts) for _ in range(int(number))]
    if len(colors) != clause.count:
        raise ValueError(f"the reason {lines[0]!r} does not count {clause.count} colours: is it GenEval's?")
    return colors


def verdict_of(result: Result) -> Verdict:
    """The verdict on an image that the original judged, with its own ``correct`` as ``relaxed``.

    ``strict`` and ``partial`` follow from its boxes and colours. Raises ValueError where these contradict ``correct``,
    as they do for results made with another position_threshold.
    """
    found = verdict(detections_of(result), Request.parse(result.metadata))
    if found.relaxed != result.correct:
        said, ours = ("correct", "wrong") if result.correct else ("wrong", "correct")
        raise ValueError(
            f"{result.filename} is {said} by the results and {ours} by its boxes: were they made with other options"
            " than GenEval's defaults?"
        )
    return replace(found, reason=result.reason)


def by_sample(results: Sequence[Result]) -> Mapping[tuple[int, int], Result]:
    """Results by the numbers of prompt and image in their file names, as in ".../00017/samples/0003.png".

    Raises ValueError for another name, or for two results of one image.
    """
    found: dict[tuple[int, int], Result] = {}
    for result in results:
        if (key := _numbers(result.filename)) in found:
            raise ValueError(f"there are two results for {result.filename}: give those of one run")
        found[key] = result
    return found


def _numbers(name: str) -> tuple[int, int]:
    """Those of prompt and image in a file's name."""
    match = re.search(r"(\d+)/samples/(\d+)\.png$", name)
    if match is None:
        raise ValueError(f"{name!r} is no image of GenEval's layout: .../NNNNN/samples/NNNN.png")
    return int(match[1]), int(match[2])


def rescored(folder: Path, results: Sequence[Result]) -> Path:
    """Another evaluation of the same images, by the original's results, in the folder ``original`` of a finished one.

    Raises ValueError for an image without a result, or a result of other metadata than its prompt's; FileNotFoundError
    where there is no finished evaluation.
    """
    protocol = replace(finished(folder).protocol, verifier=VERIFIER)
    source, target = GenEvalFolder(folder), GenEvalFolder(folder / "original")
    found, rows = by_sample(results), source.rows(len(list((folder / "prompts").glob("*.json"))))
    rescored_rows = [_rescored_row(row, found) for row in rows]
    target.begin(manifest(protocol, source.subject()))
    for row in rescored_rows:
        target.write(row["index"], row)
    with target.claims.exclusive():
        target.finish(protocol, len(rows))
    return target.path


def _rescored_row(row: Mapping[str, Any], results: Mapping[tuple[int, int], Result]) -> dict[str, Any]:
    prompt = Prompt(row["prompt"], row["metadata"])
    samples: list[dict[str, Any]] = []
    for sample in row["samples"]:
        result = results.get(_numbers(sample["image"]))
        if result is None:
            raise ValueError(f"the results have no {sample['image']}: judge all of its folder")
        if Request.parse(result.metadata) != Request.of(prompt):
            raise ValueError(f"{result.filename} was judged as {result.prompt!r}, but it is of {prompt.text!r}")
        judged = Judgement(verdict_of(result), detections_of(result))
        samples.append(sample_row(f"../{sample['image']}", sample["seed"], judged))
    return prompt_row(row["index"], prompt, samples)
