"""Preference data: judgments of samples of one prompt, by a person, a judge or a verifier.

A dataset is a folder with a ``preferences.jsonl`` and the samples' files. A line is a judgment:

    {"prompt": "a red cube", "kind": "pair", "samples": [{"file": "images/00000.png"}, {"file": "images/00001.png"}],
     "scores": {"overall": [1, 0]}, "annotator": "ada"}

The scores are one number per sample, by dimension, and higher is better:

- "pair": the share of the preference, [1, 0] or [0, 1], and [0.5, 0.5] for a tie;
- "ranking": of two or more samples, the same number for a tie;
- "rating": a grade of each sample on a scale that all judgments share;
- "label": 1 for a good sample and 0 for a bad one.

A sample may also say its ``generator`` and ``seed``, and a judgment its ``reason``, the prompt's ``metadata``, and the
order in which the samples were ``shown``, such as [1, 0] where the second was on the left, or null where it is not
known, as in data that list the better sample first. A list of files stands for samples that say nothing else, and a
list of scores for the dimension "overall". In parquet, a sample may have its content under "bytes" in place of a file.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import json
import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from genalign.runtime.media import AUDIO_SUFFIXES, inside, read_image, read_waveform
from genalign.runtime.text_files import numbered_lines, parse_json
from genalign.types import Prompt

logger = logging.getLogger(__name__)

Kind = Literal["pair", "ranking", "rating", "label"]
"""What was asked about the samples of a judgment."""

PREFERENCES, COMPARISONS = "preferences.jsonl", "comparisons.jsonl"
"""The files of a dataset: its judgments, and the comparisons that are to be judged."""

OVERALL = "overall"
"""The dimension of a judgment that names none."""


@dataclass(frozen=True)
class JudgedSample:
    """A sample of a judgment.

    Attributes:
        content: The path of its file, or the bytes of an image's file.
        generator: The name of what generated it; None where the data do not say.
        seed: The seed that it was generated from; None where the data do not say.
    """

    content: Path | bytes
    generator: str | None = None
    seed: int | None = None

    @classmethod
    def from_entry(cls, entry: Any, folder: Path) -> Self:
        """Restore a sample from its entry in a judgment: a file in ``folder``, its content, or an object.

        An object has the file or the content under "file", or the content under "bytes" or the file under "path", and
        may have a "generator" and a "seed". Raises ValueError for anything else.
        """
        about = entry if isinstance(entry, Mapping) else {"file": entry}
        content = about.get("file") or about
        if isinstance(content, Mapping):
            content = content.get("bytes") or content.get("path")
        if not isinstance(content, str | bytes):
            raise ValueError(f'its sample {entry!r} names no file: give {{"file": ...}}')
        place = inside(folder, content) if isinstance(content, str) else content
        return cls(place, about.get("generator"), about.get("seed"))

    def read(self) -> Tensor:
        """Read the image (3, H, W) in [0, 1] or the waveform (C, L). Raises ValueError for a damaged file."""
        return self.read_with_rate()[0]

    def read_with_rate(self) -> tuple[Tensor, int | None]:
        """Read the sample and its sample rate in Hz; None for an image. Raises ValueError for a damaged file."""
        if isinstance(self.content, Path) and self.content.suffix.lower() in AUDIO_SUFFIXES:
            clip = read_waveform(self.content)
            return clip.waveform, clip.sample_rate
        if isinstance(self.content, Path):
            return read_image(self.content), None
        try:
            with Image.open(io.BytesIO(self.content), formats=("JPEG", "PNG", "WEBP")) as file:
                pixels = np.array(file.convert("RGB"))
        except (OSError, ValueError) as error:
            raise ValueError(f"the bytes of a sample are no image: {error}") from None
        return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255, None

    def digest(self) -> str:
        """Return the SHA-256 of the file's content. Raises FileNotFoundError where the file is missing."""
        if isinstance(self.content, bytes):
            return hashlib.sha256(self.content).hexdigest()
        with self.content.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def copy_to(self, folder: Path, stem: str) -> Path:
        """Copy the file as it is to ``folder / stem`` with its own suffix, and return the path."""
        if isinstance(self.content, Path):
            content, suffix = self.content.read_bytes(), self.content.suffix
        else:
            with Image.open(io.BytesIO(self.content), formats=("JPEG", "PNG", "WEBP")) as file:
                content, suffix = self.content, f".{str(file.format).lower()}"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{stem}{suffix}"
        path.write_bytes(content)
        return path


@dataclass(frozen=True)
class Judgment:
    """A judgment of samples of one prompt; without scores it is a comparison that is still to be judged.

    Attributes:
        prompt: What the samples were generated from.
        samples: The samples, in the order in which they were shown, unless ``shown`` says something else.
        kind: What was asked.
        scores: One number per sample, by dimension; see the module.
        annotator: The name of who judged; None where the data do not say.
        reason: What a judge wrote about it.
        shown: The indices of the samples in the order in which they were shown, from left to right; () for their own,
            None where it is not known.
    """

    prompt: Prompt
    samples: tuple[JudgedSample, ...]
    kind: Kind = "pair"
    scores: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    annotator: str | None = None
    reason: str | None = None
    shown: tuple[int, ...] | None = ()

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise ValueError("it has no prompt")
        if self.kind not in get_args(Kind):
            raise ValueError(f"its kind is {self.kind!r}: give one of {', '.join(get_args(Kind))}")
        least, most = {"pair": (2, 2), "ranking": (2, math.inf)}.get(self.kind, (1, math.inf))
        if not least <= len(self.samples) <= most:
            wanted = "two samples" if most == least else "two or more samples" if least == 2 else "one or more samples"
            raise ValueError(f"it has {len(self.samples)} samples: a {self.kind} is of {wanted}")
        if self.shown and sorted(self.shown) != list(range(len(self.samples))):
            raise ValueError(f"it was shown as {list(self.shown)}, which is no order of {len(self.samples)} samples")
        for dimension, scores in self.scores.items():
            self._require_scores(dimension, scores)

    def _require_scores(self, dimension: str, scores: Sequence[float]) -> None:
        """Raise ValueError for scores of a dimension that a judgment of this kind cannot have."""
        if len(scores) != len(self.samples):
            raise ValueError(f"it has {len(self.samples)} samples and {len(scores)} scores of {dimension!r}")
        if not all(map(math.isfinite, scores)):
            raise ValueError(f"its scores of {dimension!r} are {list(scores)}: leave out what was not judged")
        if self.kind == "pair" and (min(scores) < 0 or abs(sum(scores) - 1) > 1e-6):
            raise ValueError(
                f"its scores of {dimension!r} are {list(scores)}, so the winner is unknown: give [1, 0],"
                " [0, 1], or [0.5, 0.5] for a tie"
            )
        if self.kind == "label" and not all(0 <= score <= 1 for score in scores):
            raise ValueError(f"its labels of {dimension!r} are {list(scores)}: give 1 for good, 0 for bad")

    def overall(self) -> tuple[float, ...]:
        """Return the scores of the dimension "overall", or of the only one. Raises ValueError if there are others."""
        if OVERALL in self.scores:
            return self.scores[OVERALL]
        if len(self.scores) != 1:
            names = ", ".join(self.scores) or "none"
            raise ValueError(f"a judgment of {self.prompt.text!r} has no dimension {OVERALL!r}, but {names}: add it")
        return next(iter(self.scores.values()))

    def in_shown_order(self) -> Self:
        """Return the judgment with its samples and scores in the order in which they were shown, if that is known."""
        if not self.shown:
            return self
        scores = {name: tuple(values[index] for index in self.shown) for name, values in self.scores.items()}
        return replace(self, samples=tuple(self.samples[index] for index in self.shown), scores=scores, shown=())

    def as_dict(self, folder: Path) -> dict[str, Any]:
        """Return the judgment as JSON types, with files relative to ``folder``. Raises ValueError for bytes."""
        samples = []
        for sample in self.samples:
            if isinstance(sample.content, bytes):
                raise ValueError("a sample without a file cannot be listed: save it into the folder first")
            file = sample.content.relative_to(folder).as_posix()
            entry = {"file": file, "generator": sample.generator, "seed": sample.seed}
            samples.append({name: value for name, value in entry.items() if value is not None})
        line: dict[str, Any] = {"prompt": self.prompt.text, "kind": self.kind, "samples": samples}
        metadata = self.prompt.metadata and dict(self.prompt.metadata)
        rest: dict[str, Any] = {"metadata": metadata, "scores": dict(self.scores)}
        rest |= {"annotator": self.annotator, "reason": self.reason}
        line |= {name: value for name, value in rest.items() if value}
        return line if self.shown == () else line | {"shown": self.shown and list(self.shown)}

    @classmethod
    def from_dict(cls, line: Mapping[str, Any], folder: Path) -> Self:
        """Restore the result of ``as_dict``, or a judgment with samples' content. Raises ValueError for others."""
        text, samples, scores = line.get("prompt"), line.get("samples"), line.get("scores", {})
        if not isinstance(text, str):
            raise ValueError("it has no prompt")
        if not isinstance(samples, list):
            raise ValueError("it has no list of samples")
        if isinstance(scores, list):
            scores = {OVERALL: scores}
        shown = line.get("shown", ())
        return cls(
            Prompt(text, line.get("metadata")),
            tuple(JudgedSample.from_entry(entry, folder) for entry in samples),
            line.get("kind", "pair"),
            {name: tuple(map(float, values)) for name, values in scores.items()},
            line.get("annotator"),
            line.get("reason"),
            None if shown is None else tuple(map(int, shown)),
        )


def read_judgments(path: Path) -> list[Judgment]:
    """Read a dataset's folder, or its .jsonl file of judgments or comparisons.

    Raises:
        FileNotFoundError: there is no such file, or a sample that it lists is missing.
        ValueError: a line cannot be used, which is named, or there is none.
    """
    file = path / PREFERENCES if path.is_dir() else path
    if not file.is_file() and (file.parent / COMPARISONS).is_file():
        raise FileNotFoundError(f"there is no {file}: judge the comparisons with genalign reward label {file.parent}")
    if not file.is_file():
        raise FileNotFoundError(f"there is no {file}: give a folder with a {PREFERENCES}, or a file of judgments")
    judgments = list[Judgment]()
    for number, line in numbered_lines(file):
        where = f"{file}, line {number}"
        value = parse_json(line, where)
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} is no object: give one judgment a line")
        try:
            judgments.append(Judgment.from_dict(value, file.parent))
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{where} is no judgment: {error}") from None
    if not judgments:
        raise ValueError(f"{file} has no judgment")
    require_files(judgments, file)
    return judgments


def require_files(judgments: Iterable[Judgment], source: Path) -> None:
    """Raise FileNotFoundError where files of samples, which ``source`` lists, are missing."""
    files = [s.content for judgment in judgments for s in judgment.samples if isinstance(s.content, Path)]
    if missing := [file for file in files if not file.is_file()]:
        raise FileNotFoundError(
            f"there is no {missing[0]}, which {source} names ({len(missing)} of its {len(files)} files are missing)"
        )


def mend(file: Path) -> None:
    """Prepare a file of judgments for more: end its last line, or remove one that a killed process left incomplete.

    Raises ValueError for a file of another encoding than UTF-8.
    """
    content = file.read_bytes() if file.is_file() else b""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(content)  # a character that is cut off at the end is none
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not UTF-8, so no judgment can be appended: save it as UTF-8") from None
    last = content.rpartition(b"\n")[2]
    if not last:
        return
    try:
        json.loads(last)
    except ValueError:
        logger.warning("the last line of %s is incomplete, and is removed: %d bytes", file, len(last))
        os.truncate(file, len(content) - len(last))
    else:
        with file.open("ab") as end:
            end.write(b"\n")


def append_judgments(folder: Path, judgments: Sequence[Judgment], name: str = PREFERENCES) -> None:
    """Append judgments of samples in ``folder`` to one of its files."""
    lines = [json.dumps(judgment.as_dict(folder), ensure_ascii=False) + "\n" for judgment in judgments]
    if not lines:
        return
    with (folder / name).open("a", encoding="utf-8") as file:
        file.writelines(lines)
