"""The parts of a benchmark: how its files are read, which models judge its images, and the numbers that it reports.

This package contains no prompts of a benchmark: users bring the files that its authors published.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genalign.evaluation.evaluate import SampleRecord
from genalign.evaluation.scorers import Scorer
from genalign.scoring.descriptions import describe
from genalign.types import AnyCallable, Prompt, PromptSet

_log = logging.getLogger(__name__)

MISSING, LEFT_OUT = "missing answers", "images left out"
"""The names of the counts that every ``Benchmark.aggregate`` reports."""


_EXAMPLES: Mapping[str, str] = {
    "questions": "rewards.blip_vqa.BlipVqa",
    "answers": '"{class_path: rewards.vqa.AnswerModel, init_args: {model: FOLDER_OR_HUB_ID}}"',
    "checklist": (
        '"{class_path: rewards.remote.vlm_judges.ChecklistJudge, init_args: {endpoint: {url: URL, model: NAME}}}"'
    ),
    "reader": "rewards.ocr.rapidocr",
    "detector": "rewards.backbones.detectors.GroundingDino",
    "similarity": '"{class_path: rewards.clip.ClipReward, init_args: {model: openai/clip-vit-base-patch32}}"',
    "depth": "rewards.backbones.depth.DepthModel",
    "faces": "my_module.faces",
    "style": "my_module.styles",
    "style_train": "FOLDER",
    "style_test": "FOLDER",
}


@dataclass(frozen=True)
class Judges:
    """The models that judge images. A benchmark needs a few of them; the others may be absent.

    Args:
        questions: Probabilities of "yes", a ``genalign.evaluation.benchmarks.tifa.QuestionJudge``, such as
            ``rewards.vqa.YesNoModel``.
        answers: Probabilities of given answers, a ``genalign.evaluation.benchmarks.geneval2.AnswerJudge``, such as
            ``rewards.vqa.AnswerModel``.
        checklist: Marks of test points, a ``genalign.evaluation.benchmarks.unigenbench.ChecklistJudge``, such as
            ``rewards.remote.vlm_judges.ChecklistJudge``.
        reader: The text in a picture, such as ``rewards.ocr.rapidocr``.
        detector: Boxes of objects, such as ``rewards.backbones.detectors.Owlv2``.
        similarity: Cosines of images and texts, a reward function such as ``rewards.clip.ClipReward``.
        depth: How near each pixel of images (B, 3, H, W) is, (B, H, W), such as ``rewards.backbones.depth.DepthModel``.
        faces: Features (B, d) of whose face an image shows, NaN where it shows none.
        style: Features (B, d) of an image's style.
        style_train: Folder of the images that a style benchmark compares with.
        style_test: Folder of further images by the same artists.
    """

    questions: AnyCallable | None = None
    answers: AnyCallable | None = None
    checklist: AnyCallable | None = None
    reader: AnyCallable | None = None
    detector: AnyCallable | None = None
    similarity: AnyCallable | None = None
    depth: AnyCallable | None = None
    faces: AnyCallable | None = None
    style: AnyCallable | None = None
    style_train: Path | None = None
    style_test: Path | None = None

    def need(self, name: str) -> Any:
        """Return the judge ``name``. Raises ValueError where it is absent."""
        judge = getattr(self, name)
        if judge is None:
            raise ValueError(
                f"this benchmark needs judges.{name}: name one, as in --judges.{name} {_EXAMPLES[name]}"
                " (docs/benchmarks.md)"
            )
        return judge


@dataclass(frozen=True)
class Benchmark:
    """A benchmark with its own files, rules and numbers.

    Args:
        name: Name in commands and files.
        read: Reads the files that the user brings, as prompts with metadata. Raises FileNotFoundError or ValueError.
        needs: Returns the names of the ``Judges`` that prompts need, given which are there.
        scorers: Builds the functions that score images, by name; the first one's score stands for the image.
        aggregate: Turns the records of all images and their prompts into the benchmark's numbers, its headline first,
            and last the counts ``MISSING`` and ``LEFT_OUT``. A missing answer is never counted as a wrong one.
        rules: A version of the rules, with what differs from the original. Part of the protocol's hash.
        images: Images of each prompt in the published protocol.
    """

    name: str
    read: Callable[[Sequence[Path]], PromptSet]
    needs: Callable[[PromptSet, Judges], Sequence[str]]
    scorers: Callable[[Judges], Mapping[str, Scorer]]
    aggregate: Callable[[Sequence[SampleRecord], PromptSet], dict[str, float]]
    rules: str
    images: int = 1

    def verifier(self, prompts: PromptSet, judges: Judges) -> str:
        """Describe rules and judges for ``EvaluationProtocol.verifier``, whose hash thus covers both.

        Raises ValueError for a judge that is needed and absent.
        """
        described = {name: describe(judges.need(name)) for name in self.needs(prompts, judges)}
        return f"{self.rules} | {json.dumps(described, sort_keys=True, default=str)}"


def distinct_prompts(name: str, prompts: Sequence[Prompt]) -> PromptSet:
    """Build a set with the first row of every text of a task, since records know prompts by their text.

    Logs how many rows are left out. Raises ValueError for no row.
    """
    if not prompts:
        raise ValueError(f"there are no prompts of {name}: give the files that its authors published")
    first: dict[tuple[str, str], Prompt] = {}
    for prompt in prompts:
        first.setdefault((prompt.task, prompt.text), prompt)
    if repeated := len(prompts) - len(first):
        _log.warning("%d rows of %s repeat the text of another row and are left out", repeated, name)
    return PromptSet(name, tuple(first.values()))


def by_prompt(records: Iterable[SampleRecord], prompts: PromptSet) -> list[tuple[Prompt, list[SampleRecord]]]:
    """Group records by their prompt, in the order of the set; prompts without a record are left out.

    Raises ValueError for a record of another set.
    """
    groups: dict[tuple[str, str], tuple[Prompt, list[SampleRecord]]] = {}
    for prompt in prompts.prompts:
        groups.setdefault((prompt.task, prompt.text), (prompt, []))
    for record in records:
        if (record.task, record.prompt) not in groups:
            raise ValueError(
                f"the prompt {record.prompt!r} ({record.task}) is not in {prompts.name}: give its own files"
            )
        groups[record.task, record.prompt][1].append(record)
    return [(prompt, rows) for prompt, rows in groups.values() if rows]


def require_metadata(prompt: Prompt, key: str) -> Any:
    """Return an entry of a prompt's metadata. Raises ValueError for a prompt of another benchmark."""
    if prompt.metadata is None or key not in prompt.metadata:
        raise ValueError(f"the prompt {prompt.text!r} has no {key!r} in its metadata: read the benchmark's own files")
    return prompt.metadata[key]


def average(values: Iterable[float | None]) -> float:
    """Compute the mean of the values that are there; NaN for none."""
    finite = [value for value in values if value is not None and math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else math.nan


def percent(values: Iterable[float | None]) -> float:
    """Compute ``average`` in percent."""
    return 100 * average(values)


def answers_of(record: SampleRecord, name: str, count: int) -> Sequence[float | None]:
    """Return the ``count`` answers in the details of a scorer: None for a missing one, and for all if it failed."""
    return record.details.get(name) or [None] * count


def missing_counts(answers: Iterable[float | None], scores: Iterable[float]) -> dict[str, float]:
    """Count the answers that are missing, and the images without a score."""
    return {
        MISSING: float(sum(answer is None for answer in answers)),
        LEFT_OUT: float(sum(not math.isfinite(score) for score in scores)),
    }
