"""What a GenEval evaluation adds to any other: its judge as a scorer, its layout of images, and its result files.

OUTPUT/images/00017/metadata.jsonl, samples/0000.png, ...   the images of prompt 17, in GenEval's layout
OUTPUT/results.jsonl, summary.txt                           what GenEval's own scripts write
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

from torch import Tensor

from genalign.evaluation.evaluate import Evaluation, SampleSpec
from genalign.evaluation.folder import EvaluationFolder
from genalign.evaluation.geneval.judge import Judge
from genalign.evaluation.geneval.result_files import ImageResult, summary, write_results, write_samples
from genalign.evaluation.geneval.scoring import Detection, GenEvalScore
from genalign.evaluation.scorers import SampleScore
from genalign.evaluation.sources import SourceBatch
from genalign.runtime.files import write_text
from genalign.types import Prompt

GENEVAL = "geneval"
"""The name of the judge's details in records: the reason and the detections."""


def verifier_description(judge: Judge) -> str:
    """Return a judge's description as the text that a protocol records."""
    return json.dumps(judge.description, sort_keys=True)


@dataclass(frozen=True)
class GenEvalScorer:
    """GenEval's scores of images: its own rule first; reason and detections are the details."""

    judge: Judge
    score_names: tuple[str, ...] = ("relaxed", "strict", "partial")

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> list[SampleScore]:
        """Score images (B, 3, H, W) in [0, 1]."""
        return [sample_score(score) for score in self.judge(samples, prompts)]


def sample_score(score: GenEvalScore | None) -> SampleScore:
    """Convert an image's score; None, of an image that could not be judged, is NaN."""
    if score is None:
        return SampleScore(dict.fromkeys(GenEvalScorer.score_names, math.nan))
    scores = {"relaxed": float(score.relaxed), "strict": float(score.strict), "partial": score.partial}
    detections = [asdict(item) for item in score.detections]
    return SampleScore(scores, {GENEVAL: {"reason": score.reason, "detections": detections}})


class GenEvalLayout:
    """Saves the images of ``specs`` in GenEval's layout, prompts numbered in order, in the subfolder ``images``."""

    def __init__(self, specs: Sequence[SampleSpec]) -> None:
        keys = dict.fromkeys((spec.prompt.task, spec.prompt.text) for spec in specs)
        self._index = {key: index for index, key in enumerate(keys)}

    def __call__(self, batch: SourceBatch, folder: Path, first: int) -> list[str]:
        names: list[str] = []
        for key, group in groupby(batch.specs, key=lambda spec: (spec.prompt.task, spec.prompt.text)):
            specs = list(group)
            images = batch.samples[len(names) : len(names) + len(specs)]
            index, number = self._index[key], specs[0].sample
            names += write_samples(folder / "images", index, specs[0].prompt, images, number)
        return [f"images/{name}" for name in names]


def write_geneval_files(folder: EvaluationFolder, evaluation: Evaluation) -> str:
    """Write results.jsonl and summary.txt of a finished evaluation, and return the summary."""
    results, prompts = list[ImageResult](), folder.prompts()
    for record in evaluation.records:
        if math.isfinite(record.scores["relaxed"]):
            details, prompt = record.details[GENEVAL], prompts[record.task, record.prompt]
            detections = [Detection(**{**item, "box": tuple(item["box"])}) for item in details["detections"]]
            correct = bool(record.scores["relaxed"])
            file = str(record.image)
            results.append(ImageResult.from_detections(file, prompt, correct, details["reason"], detections))
    write_results(folder.path / "results.jsonl", results)
    text = summary(results)
    write_text(folder.path / "summary.txt", text + "\n")
    return text
