"""What annotators are asked about the comparisons of a dataset, and what counts as an answer."""

from __future__ import annotations

import os
import random
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from genalign.diffusion.noise import derived_seed
from genalign.reward_learning.preferences import COMPARISONS, OVERALL, JudgedSample, Judgment, Kind, read_judgments

MEDIA_TYPES = {
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".webp": "image/webp",
    ".wav": "audio/wav",
    ".flac": "audio/flac",
}
"""The media types of the files that a browser shows or plays, by suffix."""

Key = tuple[str, Kind, tuple[str, ...]]
"""A question across files and restarts: its prompt, its kind and its samples' files, relative to the folder."""


@dataclass(frozen=True)
class LabelPageSettings:
    """What annotators are asked on the label page.

    Args:
        kind: "pair" asks which sample of a comparison is better, and for an order of more than two samples; "rating"
            asks for a grade of each sample by itself, "label" whether it is good or bad.
        dimensions: What is judged, each in an answer of its own.
        scale: The best grade of a rating; 1 is the worst.
        instructions: A text for annotators, such as the criteria.
        seed: Seed of the order in which an annotator sees the samples of a comparison.
    """

    kind: Literal["pair", "rating", "label"] = "pair"
    dimensions: tuple[str, ...] = (OVERALL,)
    scale: int = 5
    instructions: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("pair", "rating", "label"):
            raise ValueError(f"kind is {self.kind!r}: give pair, rating or label")
        if not self.dimensions or not all(name.strip() for name in self.dimensions):
            raise ValueError("dimensions are empty: name what is to be judged, such as overall")
        if len(set(self.dimensions)) < len(self.dimensions):
            raise ValueError(f"dimensions has a name twice: {', '.join(self.dimensions)}")
        if not 2 <= self.scale <= 10:
            raise ValueError(f"scale is {self.scale}: give a best grade from 2 to 10, which one key stands for")


@dataclass(frozen=True)
class LabelQuestion:
    """Samples of one prompt that annotators judge, as a judgment without scores, and its ``key``."""

    comparison: Judgment
    key: Key

    def order(self, annotator: str, seed: int) -> tuple[int, ...]:
        """Draw the order in which an annotator sees the samples, by ``seed``."""
        indices = list(range(len(self.comparison.samples)))
        random.Random(derived_seed(seed, "label page", annotator, *map(str, self.key))).shuffle(indices)
        return tuple(indices)

    def answered(
        self, annotator: str, order: tuple[int, ...], scores: Mapping[str, Sequence[float]], scale: int
    ) -> Judgment:
        """Return the annotator's judgment.

        Args:
            annotator: The annotator's name.
            order: The order in which the samples were shown.
            scores: One number per sample by dimension, in that order.
            scale: The best grade of a rating.

        Raises:
            ValueError: The scores are not those of a judgment of this kind.
        """
        count, own = len(order), dict[str, tuple[float, ...]]()
        for dimension, values in scores.items():
            numbers = isinstance(values, list) and all(type(value) in (int, float) for value in values)
            if not numbers or len(values) != count:
                raise ValueError(f"give {count} numbers for {dimension!r}")
            _require_answer(self.comparison.kind, values, scale)
            if self.comparison.kind == "ranking":
                levels = sorted(set(values))
                values = [levels.index(value) for value in values]
            own[dimension] = tuple(values[order.index(index)] for index in range(count))
        return replace(self.comparison, scores=own, annotator=annotator, reason=None, shown=order if count > 1 else ())


def _require_answer(kind: Kind, values: Sequence[float], scale: int) -> None:
    """Raise ValueError for numbers that are no answer to a question of a kind, of ratings up to ``scale``."""
    if kind == "pair" and list(values) not in ([1, 0], [0, 1], [0.5, 0.5]):
        raise ValueError("give [1, 0] or [0, 1] for a pair, or [0.5, 0.5] for a tie")
    if kind == "ranking" and not all(value in range(len(values)) for value in values):
        raise ValueError(f"give ranks from 0, the worst, to {len(values) - 1}")
    if kind == "rating" and not all(value in range(1, scale + 1) for value in values):
        raise ValueError(f"give a grade from 1 to {scale}")
    if kind == "label" and not all(value in (0, 1) for value in values):
        raise ValueError("give 1 for good or 0 for bad")


@dataclass(frozen=True)
class LabelQuestions:
    """The questions of a folder, and how many comparisons were left out.

    Attributes:
        folder: The dataset's folder.
        distinct: The questions, each once, in the order in which they are asked.
        comparisons: The number of comparisons that were read.
        repeated: The number of questions that were left out because an earlier one is the same.
        equal: The number of comparisons that were left out because two of their samples have equal files.
    """

    folder: Path
    distinct: tuple[LabelQuestion, ...]
    comparisons: int
    repeated: int
    equal: int


def read_questions(folder: Path, kind: Literal["pair", "rating", "label"]) -> LabelQuestions:
    """Read what is asked about the comparisons of ``folder``; ratings and labels are asked once for each sample.

    Raises:
        FileNotFoundError: There are no comparisons, or a file that they list is missing.
        ValueError: A line cannot be used, a file leads out of the folder or cannot be shown in a browser, or a
            comparison has one sample, of which there is no pair.
    """
    if not (folder / COMPARISONS).is_file():
        raise FileNotFoundError(f"there is no {folder / COMPARISONS}: genalign reward collect writes one")
    comparisons = read_judgments(folder / COMPARISONS)
    _require_servable(comparisons, folder)
    alone = sum(len(judgment.samples) == 1 for judgment in comparisons)
    if alone and kind == "pair":
        raise ValueError(
            f"{alone} of {len(comparisons)} comparisons in {folder / COMPARISONS} have one sample, which is compared"
            " with none: ask for ratings or labels instead (kind)"
        )
    usable = [judgment for judgment in comparisons if kind != "pair" or not _equal_files(judgment.samples)]
    if not usable:
        raise ValueError(f"all comparisons in {folder / COMPARISONS} have equal files: nothing can be asked")
    parts = [part for judgment in usable for part in _question_parts(judgment, kind)]
    questions: dict[Key, LabelQuestion] = {}
    for part in parts:
        key = key_of(part, folder)
        questions.setdefault(key, LabelQuestion(part, key))
    equal, repeated = len(comparisons) - len(usable), len(parts) - len(questions)
    return LabelQuestions(folder, tuple(questions.values()), len(comparisons), repeated, equal)


def _question_parts(comparison: Judgment, kind: Literal["pair", "rating", "label"]) -> list[Judgment]:
    """Return what is asked of a comparison, as judgments without scores: of all its samples, or of each by itself."""
    if kind == "pair":
        together: Kind = "ranking" if len(comparison.samples) > 2 else "pair"
        return [Judgment(comparison.prompt, comparison.samples, together)]
    return [Judgment(comparison.prompt, (sample,), kind) for sample in comparison.samples]


def key_of(judgment: Judgment, folder: Path) -> Key:
    """Return the key of the question that a judgment answers."""
    files = tuple(os.path.relpath(_path(sample), folder) for sample in judgment.samples)
    return judgment.prompt.text, judgment.kind, files


def annotator_name(value: Any) -> str:
    """Return an annotator's name in plain text, without spaces around it. Raises ValueError for anything else."""
    name = unicodedata.normalize("NFC", " ".join(value.split())) if isinstance(value, str) else ""
    if not name or len(name) > 64 or not name.isprintable():
        raise ValueError("give a name of 1 to 64 letters")
    return name


def _path(sample: JudgedSample) -> Path:
    assert isinstance(sample.content, Path)  # as every sample that is read from a .jsonl file
    return sample.content


def _require_servable(comparisons: Sequence[Judgment], folder: Path) -> None:
    """Raise ValueError for a file that leads out of the folder, or that no browser shows."""
    root = folder.resolve()
    for path in dict.fromkeys(_path(sample) for judgment in comparisons for sample in judgment.samples):
        if not path.resolve().is_relative_to(root):
            raise ValueError(f"{path} is a link that leads out of {folder}: copy the file into the folder")
        if path.suffix.lower() not in MEDIA_TYPES:
            raise ValueError(f"{path} is shown by no browser: save it as one of {', '.join(MEDIA_TYPES)}")


def _equal_files(samples: Sequence[JudgedSample]) -> bool:
    """Return whether two samples have equal files; only those of one size are read."""
    sizes = [_path(sample).stat().st_size for sample in samples]
    digests = [sample.digest() for sample, size in zip(samples, sizes, strict=True) if sizes.count(size) > 1]
    return len(set(digests)) < len(digests)
