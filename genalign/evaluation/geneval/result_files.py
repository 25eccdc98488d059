"""GenEval's files: prompts, the folder of images, the results of each image, and the summary.

PROMPTS.jsonl                      one object of metadata a line
IMAGES/00017/metadata.jsonl        line 17 of it
IMAGES/00017/samples/0000.png ...  its images
RESULTS.jsonl                      one image a line
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from genalign.evaluation.geneval.metadata import Request
from genalign.evaluation.geneval.scoring import Detection
from genalign.runtime.files import write_text
from genalign.runtime.media import save_images
from genalign.runtime.prompt_files import load_prompts
from genalign.types import Metadata, Prompt, PromptSet

_METADATA, _SAMPLES = "metadata.jsonl", "samples"
_IMAGE = re.compile(r"\d+\.png")


def read_prompts(path: Path) -> PromptSet:
    """The prompts of a metadata file, each checked. Raises FileNotFoundError, or ValueError naming the line."""
    found = load_prompts(path)
    for number, prompt in enumerate(found.prompts, start=1):
        try:
            Request.of(prompt)
        except ValueError as error:
            raise ValueError(f"{path}, prompt {number}: {error}") from None
    return found


def write_prompts(path: Path, prompts: PromptSet) -> None:
    """The metadata of each prompt, or its text alone where it has none, one JSON object a line."""
    write_text(path, "".join(f"{json.dumps(_row(prompt))}\n" for prompt in prompts.prompts))


def _row(prompt: Prompt) -> Metadata:
    return {"prompt": prompt.text} if prompt.metadata is None else prompt.metadata


@dataclass(frozen=True)
class Sample:
    """One image of a folder: the number of its prompt, its own number, and the prompt's metadata."""

    index: int
    number: int
    path: Path
    metadata: Metadata


def sample_name(index: int, number: int) -> str:
    """Where an image lies in its folder: "00017/samples/0003.png"."""
    return f"{index:05d}/{_SAMPLES}/{number:04d}.png"


def write_samples(folder: Path, index: int, prompt: Prompt, images: Tensor, first: int = 0) -> list[str]:
    """The images (n, 3, H, W) in [0, 1] of prompt number ``index``, and its metadata; their names in ``folder``.

    They are numbered from ``first``.
    """
    names = [sample_name(index, first + number) for number in range(len(images))]
    (folder / names[0]).parent.mkdir(parents=True, exist_ok=True)
    write_text(folder / f"{index:05d}" / _METADATA, json.dumps(_row(prompt)))
    save_images(images, [folder / name for name in names])
    return names


def read_samples(folder: Path) -> list[Sample]:
    """The images of a folder, by prompt and by number, whatever number of digits their names have.

    Raises FileNotFoundError for a folder that is not there or without images, and for a prompt without metadata or
    images; ValueError for metadata that is not JSON, or two images of one number.
    """
    found = [sample for prompt in sorted(folder.glob("*")) if prompt.is_dir() for sample in _samples(prompt)]
    if not found:
        raise FileNotFoundError(f"{folder} has no images at NNNNN/samples/NNNN.png, which is GenEval's layout")
    made = sorted(found, key=lambda sample: (sample.index, sample.number))
    for one, other in pairwise(made):
        if (one.index, one.number) == (other.index, other.number):
            raise ValueError(f"{one.path} and {other.path} are the same image of the same prompt: remove one")
    return made


def _samples(folder: Path) -> list[Sample]:
    """Those of one prompt; none of a folder whose name is not a number."""
    if not folder.name.isdecimal():
        return []
    metadata = _metadata(folder / _METADATA)
    names = [path for path in (folder / _SAMPLES).glob("*.png") if _IMAGE.fullmatch(path.name)]
    if not names:
        raise FileNotFoundError(f"{folder / _SAMPLES} has no images: make them, or remove {folder}")
    return [Sample(int(folder.name), int(path.stem), path, metadata) for path in names]


def _metadata(path: Path) -> Metadata:
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}: write the prompt's line of the prompt file there")
    try:
        found: Metadata = json.loads(path.read_text(encoding="utf-8"))
        Request.parse(found)
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not a line of GenEval's prompt file: {error}") from None
    return found


@dataclass(frozen=True)
class Result:
    """One line of a results file. ``details`` are the boxes [x1, y1, x2, y2, score] of every class, best first."""

    filename: str
    tag: str
    prompt: str
    correct: bool
    reason: str
    metadata: Metadata
    details: Mapping[str, Sequence[Sequence[float]]]

    @classmethod
    def of(cls, filename: str, prompt: Prompt, correct: bool, reason: str, detections: Sequence[Detection]) -> Result:
        """The verdict of GenEval's rule on a prompt with metadata, by the detections that counted."""
        names = dict.fromkeys(detection.name for detection in detections)
        details = {name: [[*d.box, d.score] for d in detections if d.name == name] for name in names}
        return cls(filename, prompt.task, prompt.text, correct, reason, prompt.metadata or {}, details)

    def row(self) -> dict[str, Any]:
        """As GenEval writes it: metadata and details are JSON texts in the JSON."""
        return {
            "filename": self.filename,
            "tag": self.tag,
            "prompt": self.prompt,
            "correct": self.correct,
            "reason": self.reason,
            "metadata": json.dumps(self.metadata),
            "details": json.dumps(self.details),
        }


def write_results(path: Path, results: Sequence[Result]) -> None:
    """A results file that GenEval's ``summary_scores.py`` reads."""
    write_text(path, "".join(f"{json.dumps(result.row())}\n" for result in results))


def read_results(path: Path) -> list[Result]:
    """A results file, from here or from GenEval's ``evaluate_images.py``. Raises ValueError naming a line that is not
    one, FileNotFoundError where there is no file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no results file {path}: give what GenEval's evaluate_images.py wrote")
    lines = path.read_text(encoding="utf-8").splitlines()
    return [_result(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]


def _result(path: Path, number: int, line: str) -> Result:
    try:
        row = json.loads(line)
        return Result(
            filename=str(row["filename"]),
            tag=str(row["tag"]),
            prompt=str(row["prompt"]),
            correct=bool(row["correct"]),
            reason=str(row["reason"] or ""),
            metadata=dict(json.loads(row["metadata"])),
            details=_details(json.loads(row["details"])),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}, line {number}: not a result of GenEval ({error!r})") from None


def _details(boxes: Mapping[str, Any]) -> dict[str, list[list[float]]]:
    """Boxes of five numbers by class."""
    found = {name: [[float(value) for value in box] for box in of_class] for name, of_class in boxes.items()}
    if any(len(box) != 5 for of_class in found.values() for box in of_class):
        raise ValueError("a box is x1, y1, x2, y2, score")
    return found


def summary(results: Sequence[Result]) -> str:
    """What GenEval's ``summary_scores.py`` prints. Raises ValueError for no results."""
    if not results:
        raise ValueError("there are no results to sum up: score at least one image")
    prompts: dict[str, list[bool]] = {}
    tasks: dict[str, list[bool]] = {}
    for result in results:
        prompts.setdefault(json.dumps(result.metadata), []).append(result.correct)
        tasks.setdefault(result.tag, []).append(result.correct)
    lines = [
        "Summary",
        "=======",
        f"Total images: {len(results)}",
        f"Total prompts: {len(prompts)}",
        f"% correct images: {_mean([result.correct for result in results]):.2%}",
        f"% correct prompts: {_mean([any(made) for made in prompts.values()]):.2%}",
        "",
        "Task breakdown",
        "==============",
        *(f"{tag:<16} = {_mean(made):.2%} ({sum(made)} / {len(made)})" for tag, made in tasks.items()),
        "",
        f"Overall score (avg. over tasks): {_mean([_mean(made) for made in tasks.values()]):.5f}",
    ]
    return "\n".join(lines)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
