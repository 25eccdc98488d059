"""GenEval's files: prompts, the folder of images, the results of each image, and the summary.

PROMPTS.jsonl                      one object of metadata per line
IMAGES/00017/metadata.jsonl        line 17 of it
IMAGES/00017/samples/0000.png ...  its images
RESULTS.jsonl                      one image per line
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from genalign.evaluation.geneval.metadata import PromptSpec
from genalign.evaluation.geneval.scoring import Detection
from genalign.runtime.files import write_text
from genalign.runtime.media import save_images
from genalign.runtime.prompt_files import load_prompts
from genalign.runtime.text_files import numbered_lines, read_json
from genalign.types import Metadata, Prompt, PromptSet

_METADATA, _SAMPLES = "metadata.jsonl", "samples"


def read_prompts(path: Path) -> PromptSet:
    """Read and check a metadata file. Raises FileNotFoundError, or ValueError that names an invalid prompt."""
    prompts = load_prompts(path)
    for number, prompt in enumerate(prompts.prompts, start=1):
        try:
            PromptSpec.from_prompt(prompt)
        except ValueError as error:
            raise ValueError(f"{path}, prompt {number}: {error}") from None
    return prompts


def write_prompts(path: Path, prompts: PromptSet) -> None:
    """Write each prompt's metadata, or its text if it has none, as one JSON object per line."""
    write_text(path, "".join(f"{json.dumps(_metadata(prompt))}\n" for prompt in prompts.prompts))


def _metadata(prompt: Prompt) -> Metadata:
    return {"prompt": prompt.text} if prompt.metadata is None else prompt.metadata


@dataclass(frozen=True)
class SampleFile:
    """One image file: the ``index`` of its prompt, its ``number`` among that prompt's images, and the metadata."""

    index: int
    number: int
    path: Path
    metadata: Metadata


def sample_name(index: int, number: int) -> str:
    """Return an image's path in its folder, such as "00017/samples/0003.png"."""
    return f"{index:05d}/{_SAMPLES}/{number:04d}.png"


def write_samples(folder: Path, index: int, prompt: Prompt, images: Tensor, first: int = 0) -> list[str]:
    """Write images of one prompt and its metadata.

    Args:
        folder: The root folder.
        index: The prompt's number.
        prompt: The prompt.
        images: Images (n, 3, H, W) in [0, 1].
        first: The number of the first image.

    Returns:
        The n paths relative to ``folder``.
    """
    names = [sample_name(index, first + number) for number in range(len(images))]
    (folder / names[0]).parent.mkdir(parents=True, exist_ok=True)
    write_text(folder / f"{index:05d}" / _METADATA, json.dumps(_metadata(prompt)))
    save_images(images, [folder / name for name in names])
    return names


def read_samples(folder: Path) -> list[SampleFile]:
    """List the images of a folder by prompt and number, whatever number of digits their names have.

    Raises FileNotFoundError for a folder that is missing or has no images, and for a prompt without metadata or
    images; ValueError for metadata that is not JSON, or two images of one number.
    """
    folders = [path for path in sorted(folder.glob("*")) if path.is_dir() and path.name.isdecimal()]
    samples = [sample for path in folders for sample in _prompt_samples(path)]
    if not samples:
        raise FileNotFoundError(f"{folder} has no images at NNNNN/samples/NNNN.png, which is GenEval's layout")
    samples.sort(key=lambda sample: (sample.index, sample.number))
    for one, other in pairwise(samples):
        if (one.index, one.number) == (other.index, other.number):
            raise ValueError(f"{one.path} and {other.path} are the same image of the same prompt: remove one")
    return samples


def _prompt_samples(folder: Path) -> list[SampleFile]:
    """List the images in the folder of one prompt."""
    path = folder / _METADATA
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}: write the prompt's line of the prompt file there")
    try:
        metadata: Metadata = read_json(path)
        PromptSpec.from_metadata(metadata)
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not a line of GenEval's prompt file: {error}") from None
    images = [path for path in (folder / _SAMPLES).glob("*.png") if re.fullmatch(r"\d+\.png", path.name)]
    if not images:
        raise FileNotFoundError(f"{folder / _SAMPLES} has no images: generate them, or remove {folder}")
    return [SampleFile(int(folder.name), int(path.stem), path, metadata) for path in images]


@dataclass(frozen=True)
class ImageResult:
    """One line of a results file. ``details`` are the boxes [x1, y1, x2, y2, score] of every class, best first."""

    filename: str
    tag: str
    prompt: str
    correct: bool
    reason: str
    metadata: Metadata
    details: Mapping[str, Sequence[Sequence[float]]]

    @classmethod
    def from_detections(
        cls, filename: str, prompt: Prompt, correct: bool, reason: str, detections: Sequence[Detection]
    ) -> ImageResult:
        """Build the result of one image.

        Args:
            filename: The image's file.
            prompt: The prompt with its metadata.
            correct: Whether GenEval's rule accepts the image.
            reason: The rule's explanation.
            detections: The detections that counted.
        """
        names = dict.fromkeys(detection.name for detection in detections)
        details = {name: [[*d.box, d.score] for d in detections if d.name == name] for name in names}
        return cls(filename, prompt.task, prompt.text, correct, reason, prompt.metadata or {}, details)

    def as_row(self) -> dict[str, Any]:
        """Convert to GenEval's format, in which metadata and details are JSON texts within the JSON."""
        return asdict(self) | {"metadata": json.dumps(self.metadata), "details": json.dumps(self.details)}


def write_results(path: Path, results: Sequence[ImageResult]) -> None:
    """Write a results file that GenEval's ``summary_scores.py`` reads."""
    write_text(path, "".join(f"{json.dumps(result.as_row())}\n" for result in results))


def read_results(path: Path) -> list[ImageResult]:
    """Read a results file from ``write_results`` or from GenEval's ``evaluate_images.py``.

    Raises FileNotFoundError, or ValueError that names an invalid line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no results file {path}: give the one that GenEval's evaluate_images.py wrote")
    return [_parse_result(path, number, line) for number, line in numbered_lines(path)]


def _parse_result(path: Path, number: int, line: str) -> ImageResult:
    try:
        row = json.loads(line)
        details = {
            name: [[float(value) for value in box] for box in boxes]
            for name, boxes in json.loads(row["details"]).items()
        }
        if any(len(box) != 5 for boxes in details.values() for box in boxes):
            raise ValueError("a box is x1, y1, x2, y2, score")
        return ImageResult(
            filename=str(row["filename"]),
            tag=str(row["tag"]),
            prompt=str(row["prompt"]),
            correct=bool(row["correct"]),
            reason=str(row["reason"] or ""),
            metadata=dict(json.loads(row["metadata"])),
            details=details,
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}, line {number}: not a result of GenEval ({error!r})") from None


def summary(results: Sequence[ImageResult]) -> str:
    """Format the text that GenEval's ``summary_scores.py`` prints. Raises ValueError for no results."""
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
        f"% correct images: {np.mean([result.correct for result in results]):.2%}",
        f"% correct prompts: {np.mean([any(correct) for correct in prompts.values()]):.2%}",
        "",
        "Task breakdown",
        "==============",
        *(f"{tag:<16} = {np.mean(rows):.2%} ({sum(rows)} / {len(rows)})" for tag, rows in tasks.items()),
        "",
        f"Overall score (avg. over tasks): {np.mean([np.mean(rows) for rows in tasks.values()]):.5f}",
    ]
    return "\n".join(lines)
