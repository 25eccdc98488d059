"""Results of GenEval's own ``evaluate_images.py`` in place of a detector.

They contain boxes and scores but no colors. The reasons imply the colors that a rule depends on: a satisfied color
clause has no reason, and a violated one counts the colors of the objects that were checked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from genalign.evaluation.evaluate import SampleRecord, load_evaluation
from genalign.evaluation.folder import EvaluationFolder, ModelIdentity, manifest
from genalign.evaluation.geneval.evaluation_files import sample_score, write_geneval_files
from genalign.evaluation.geneval.metadata import PromptSpec
from genalign.evaluation.geneval.result_files import ImageResult
from genalign.evaluation.geneval.scoring import Detection, GenEvalScore, score_detections
from genalign.types import Prompt, PromptSet

VERIFIER = "GenEval's evaluate_images.py"
"""The verifier in the protocol of an evaluation by the original's results."""


def result_detections(result: ImageResult) -> tuple[Detection, ...]:
    """Return the objects of an image, the most confident of each class first, with the colors that the results imply.

    Raises ValueError for a reason that cannot be parsed.
    """
    spec = PromptSpec.from_metadata(result.metadata)
    detections: list[Detection] = []
    for name, boxes in result.details.items():
        colors = _implied_colors(spec, name, result.reason, len(boxes))
        detections += [
            Detection(name, (x1, y1, x2, y2), score, color)
            for (x1, y1, x2, y2, score), color in zip(boxes, colors, strict=True)
        ]
    return tuple(detections)


def _implied_colors(spec: PromptSpec, name: str, reason: str, count: int) -> Sequence[str | None]:
    """Return the colors of the ``count`` objects of a class, best first; None for objects that no rule checked.

    Their order among the checked objects is unknown, and no rule depends on it.
    """
    clauses = [clause for clause in spec.include if clause.name == name and clause.color is not None]
    if len(clauses) > 1:
        raise ValueError(f"{spec.prompt!r} asks for {name} in two colors: the results do not say which is which")
    if not clauses or count < clauses[0].count:
        return [None] * count
    clause = clauses[0]
    start = f"expected {clause.color} {name}>={clause.count}, found "
    colors = [str(clause.color)] * clause.count
    if line := next((line for line in reason.splitlines() if line.startswith(start)), None):
        counts = re.findall(r"(\d+) (\w+)", line.partition("; and ")[2])
        colors = [color for number, color in counts for _ in range(int(number))]
        if len(colors) != clause.count:
            raise ValueError(f"the reason {line!r} does not count {clause.count} colors: is it GenEval's?")
    return [*colors, *[None] * (count - len(colors))]


def result_score(result: ImageResult) -> GenEvalScore:
    """Score an image that the original judged, with the original's ``correct`` as ``relaxed``.

    ``strict`` and ``partial`` follow from its boxes and colors. Raises ValueError if they contradict ``correct``, as
    they do for results made with another position_threshold.
    """
    score = score_detections(result_detections(result), PromptSpec.from_metadata(result.metadata))
    if score.relaxed != result.correct:
        theirs, ours = ("correct", "wrong") if result.correct else ("wrong", "correct")
        raise ValueError(
            f"{result.filename} is {theirs} by the results and {ours} by its boxes: were they made with other options"
            " than GenEval's defaults?"
        )
    return replace(score, reason=result.reason)


def results_by_image(results: Sequence[ImageResult]) -> Mapping[tuple[int, int], ImageResult]:
    """Index results by the numbers of prompt and image in their file names, such as ".../00017/samples/0003.png".

    Raises ValueError for another file name, or for two results of one image.
    """
    indexed: dict[tuple[int, int], ImageResult] = {}
    for result in results:
        if (key := _image_key(result.filename)) in indexed:
            raise ValueError(f"there are two results for {result.filename}: give the results of one run")
        indexed[key] = result
    return indexed


def _image_key(name: str) -> tuple[int, int]:
    """Parse the numbers of prompt and image from a file name."""
    match = re.search(r"(\d+)/samples/(\d+)\.png$", name)
    if match is None:
        raise ValueError(f"{name!r} is no image of GenEval's layout: .../NNNNN/samples/NNNN.png")
    return int(match[1]), int(match[2])


def rescore(folder: Path, results: Sequence[ImageResult]) -> Path:
    """Score the images of a finished evaluation by the original's results, in its subfolder ``original``.

    Raises ValueError for an image without a result, or a result whose metadata is not its prompt's; FileNotFoundError
    if there is no finished evaluation.
    """
    evaluation = load_evaluation(folder)
    source, target = EvaluationFolder(folder), EvaluationFolder(folder / "original")
    prompts, indexed = source.prompts(), results_by_image(results)
    records = [_rescored(record, prompts[record.task, record.prompt], indexed) for record in evaluation.records]

    old = source.manifest()
    assert old is not None, "a finished evaluation has a manifest"
    protocol = replace(evaluation.protocol, verifier=VERIFIER)
    target.begin(
        manifest(protocol, ModelIdentity(**old["subject"])), PromptSet(protocol.suite, tuple(prompts.values()))
    )
    target.add(0, records, {}, {})
    with target.claims.exclusive():
        write_geneval_files(target, target.finish(protocol, 1))
    return target.path


def _rescored(record: SampleRecord, prompt: Prompt, results: Mapping[tuple[int, int], ImageResult]) -> SampleRecord:
    result = results.get(_image_key(str(record.image)))
    if result is None:
        raise ValueError(f"the results have no {record.image}: run evaluate_images.py on the whole folder")
    if PromptSpec.from_metadata(result.metadata) != PromptSpec.from_prompt(prompt):
        raise ValueError(f"{result.filename} was judged as {result.prompt!r}, but its prompt is {prompt.text!r}")
    score = sample_score(result_score(result))
    return replace(record, image=f"../{record.image}", scores=score.scores, details=score.details)
