"""The judgments of the label page: on the disk as they are made, and who has judged what."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from genalign.reward_learning.label_page.questions import (
    LabelPageSettings,
    LabelQuestion,
    LabelQuestions,
    key_of,
    read_questions,
)
from genalign.reward_learning.preferences import PREFERENCES, Judgment, append_judgments, mend, read_judgments
from genalign.runtime.files import sync

_UPCOMING = 3  # questions after the current one whose samples a browser may load in advance


class Superseded(ValueError):
    """An answer to a question that the annotator has answered already, as in another window."""


@dataclass(frozen=True)
class LabelProgress:
    """Where an annotator stands.

    Attributes:
        current: The index of the question that is asked; None where all are judged or skipped.
        dimensions: The dimensions in which it is still to be judged.
        upcoming: The indices of the questions after it.
        judged: The number of questions that are judged in all dimensions.
        skipped: The number of questions that are skipped.
        total: The number of questions.
        undoable: Whether there is something to undo.
    """

    current: int | None
    dimensions: tuple[str, ...]
    upcoming: tuple[int, ...]
    judged: int
    skipped: int
    total: int
    undoable: bool


@dataclass
class _Record:
    """What an annotator has done: the judged dimensions by question, what is skipped, and (question, skip) in order."""

    judged: dict[int, set[str]] = field(default_factory=dict)
    skipped: set[int] = field(default_factory=set)
    history: list[tuple[int, bool]] = field(default_factory=list)


class LabelStore:
    """The questions of a folder and their judgments, for several annotators (threads) at once.

    Every judgment is on the disk before ``judge`` returns. What was judged before a restart counts; what was skipped
    is asked again.

    Raises:
        FileNotFoundError: There are no comparisons, or a file that they list is missing.
        ValueError: The comparisons cannot be asked about, or ``preferences.jsonl`` has judgments that do not go
            together with these.
    """

    def __init__(self, folder: Path, settings: LabelPageSettings) -> None:
        self.settings = settings
        self.questions: LabelQuestions = read_questions(folder, settings.kind)
        self._folder, self._path = folder, folder / PREFERENCES
        self._lock = threading.Lock()
        self._index = {question.key: index for index, question in enumerate(self.questions.distinct)}
        self._records: dict[str, _Record] = {}
        mend(self._path)
        judgments = self.judgments()
        _require_compatible(judgments, settings, self._path)
        for judgment in judgments:
            index = self._index.get(key_of(judgment, folder))
            if judgment.annotator and index is not None:
                self._note(self._records.setdefault(judgment.annotator, _Record()), index, judgment)

    def question(self, index: int) -> LabelQuestion:
        """Return a question. Raises ValueError for an index that there is not."""
        if type(index) is not int or not 0 <= index < len(self.questions.distinct):
            raise ValueError(f"there is no question {index!r}")
        return self.questions.distinct[index]

    def judgments(self) -> list[Judgment]:
        """Read all judgments of the folder, those of other kinds and origins as well."""
        with self._lock:
            return read_judgments(self._path) if self._path.is_file() and self._path.read_bytes().strip() else []

    def progress(self, annotator: str) -> LabelProgress:
        """Return where an annotator stands."""
        with self._lock:
            record = self._records.get(annotator, _Record())
            total, open_ones = len(self.questions.distinct), list[int]()
            for index in range(total):
                if self._open(record, index) and index not in record.skipped:
                    open_ones.append(index)
                if len(open_ones) > _UPCOMING:
                    break
            current = open_ones[0] if open_ones else None
            judged = sum(not self._open(record, index) for index in record.judged)
            dimensions = () if current is None else self._open(record, current)
            skipped, undoable = len(record.skipped), bool(record.history)
            return LabelProgress(current, dimensions, tuple(open_ones[1:]), judged, skipped, total, undoable)

    def judge(self, annotator: str, index: int, scores: Mapping[str, Sequence[float]]) -> None:
        """Append a judgment.

        Args:
            annotator: The annotator's name.
            index: The index of the question.
            scores: One number per sample, in the order in which they are shown, for each dimension that is asked.

        Raises:
            ValueError: There is no such question, or the scores do not answer it.
            Superseded: The annotator has judged it already.
            OSError: The judgment cannot be written, such as for a full disk; nothing of it is left in the file.
        """
        question = self.question(index)
        order = question.order(annotator, self.settings.seed)
        judgment = question.answered(annotator, order, scores, self.settings.scale)
        with self._lock:
            record = self._records.setdefault(annotator, _Record())
            dimensions = self._open(record, index)
            if not dimensions:
                raise Superseded("this was judged already, perhaps in another window")
            if set(scores) != set(dimensions):
                raise ValueError(f"give scores of {', '.join(dimensions)}, and of nothing else")
            size = self._path.stat().st_size if self._path.is_file() else 0
            try:
                append_judgments(self._folder, [judgment])
                sync(self._path)
            except OSError:
                if self._path.is_file():
                    os.truncate(self._path, size)
                raise
            self._note(record, index, judgment)

    def skip(self, annotator: str, index: int) -> None:
        """Put a question off. Raises ValueError for an index that there is not."""
        self.question(index)
        with self._lock:
            record = self._records.setdefault(annotator, _Record())
            if self._open(record, index) and index not in record.skipped:
                record.skipped.add(index)
                record.history.append((index, True))

    def ask_skipped(self, annotator: str) -> None:
        """Ask again what an annotator has skipped."""
        with self._lock:
            record = self._records.setdefault(annotator, _Record())
            record.skipped.clear()
            record.history = [(index, skip) for index, skip in record.history if not skip]

    def undo(self, annotator: str) -> None:
        """Take back an annotator's last judgment or skip; a judgment's line is removed from the file.

        Raises ValueError where there is nothing to undo, or someone else has removed the line.
        """
        with self._lock:
            record = self._records.get(annotator, _Record())
            if not record.history:
                raise ValueError("there is nothing to undo")
            index, skip = record.history[-1]
            if skip:
                record.skipped.discard(index)
            else:
                dimensions = self._remove_last(annotator, index)
                record.judged[index] -= dimensions
            record.history.pop()

    def _open(self, record: _Record, index: int) -> tuple[str, ...]:
        """Return the dimensions in which a question is still to be judged."""
        judged = record.judged.get(index, set())
        return tuple(name for name in self.settings.dimensions if name not in judged)

    def _note(self, record: _Record, index: int, judgment: Judgment) -> None:
        record.judged.setdefault(index, set()).update(judgment.scores)
        record.skipped.discard(index)
        record.history.append((index, False))

    def _remove_last(self, annotator: str, index: int) -> set[str]:
        """Remove the last line by which an annotator judged a question, and return its dimensions.

        The other lines stay as they are. The file is replaced at once, so it is whole at every moment.
        """
        lines = self._path.read_bytes().splitlines(keepends=True)
        for place in range(len(lines) - 1, -1, -1):
            if not lines[place].strip():
                continue
            judgment = Judgment.from_dict(json.loads(lines[place].decode("utf-8-sig")), self._folder)
            if judgment.annotator == annotator and self._index.get(key_of(judgment, self._folder)) == index:
                break
        else:
            raise ValueError(f"the judgment is no longer in {PREFERENCES}")
        temporary = self._path.with_name(f"{PREFERENCES}.part")
        temporary.write_bytes(b"".join(lines[:place] + lines[place + 1 :]))
        shutil.copymode(self._path, temporary)
        sync(temporary)
        os.replace(temporary, self._path)
        sync(self._folder)
        return set(judgment.scores)


def _require_compatible(judgments: Sequence[Judgment], settings: LabelPageSettings, path: Path) -> None:
    """Raise ValueError where a folder's judgments have other grades than those that are asked for."""
    other = {"rating": "label", "label": "rating"}.get(settings.kind)
    if count := sum(judgment.kind == other for judgment in judgments):
        raise ValueError(
            f"{path} has {count} judgments of the kind {other!r}, which do not go together with those of the kind"
            f" {settings.kind!r}: copy the comparisons into a folder of their own"
        )
    if settings.kind != "rating":
        return
    grades = [
        value for judgment in judgments if judgment.kind == "rating" for value in sum(judgment.scores.values(), ())
    ]
    if grades and not 1 <= min(grades) <= max(grades) <= settings.scale:
        raise ValueError(
            f"{path} has ratings from {min(grades):g} to {max(grades):g}, which are not on a scale of 1 to"
            f" {settings.scale}: set scale, or copy the comparisons into a folder of their own"
        )
