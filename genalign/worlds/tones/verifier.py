"""The verifier of the tones world, exact and without learned weights."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from torch import Tensor

from genalign.types import Metadata
from genalign.worlds.tones.detection import ToneDetection, detect
from genalign.worlds.tones.instruments import NOISE, NOTES, PITCHED, TIMBRES
from genalign.worlds.verification import Verification, summarize

__all__ = ["VERIFIER_VERSION", "ToneDetection", "Verification", "detect", "verify", "verify_detections"]

VERIFIER_VERSION = "tones-1"
MIN_CONTRAST = 6.0  # dB between a quiet and a loud event
MIN_INTERVAL = 2 ** (1 / 12)  # between a low and a high tone
MAX_EVENT = 0.6  # seconds; scenes have events of up to 0.5, and hiss that fills a clip is none


def verify(waveforms: Tensor, metadata: Sequence[Metadata]) -> list[Verification]:
    """Verify clips (B, 1, 12000) at 8 kHz against the metadata (B) of their prompts.

    Raises:
        ValueError: for unequal lengths, NaN samples, or metadata of another world.
    """
    if len(waveforms) != len(metadata):
        raise ValueError(f"{len(waveforms)} waveforms but {len(metadata)} metadata: give one for each waveform")
    return [verify_detections(detections, item) for detections, item in zip(detect(waveforms), metadata, strict=True)]


def verify_detections(detections: Sequence[ToneDetection], metadata: Metadata) -> Verification:
    """Score events in order of time against ``metadata``: events, relation, loudness (see ``tones.prompts``).

    With n requested and m detected events, and c the length of the longest common subsequence of their timbres: count =
    max(0, 1 - |n - m| / n) c / m and kind = c / max(n, m), both 0 for m = 0. Where the prompt names it: note, the share
    of the requested notes that sound at their place in their timbre, 0 for m != n; relation and loudness, 1 or 0, 0
    unless every timbre is in its place. Relaxed ignores surplus events, unless the prompt counts their timbre.
    """
    clauses = [clause for clause in metadata["events"] for _ in range(clause["count"])]
    for clause in clauses:
        if clause["class"] not in TIMBRES:
            raise ValueError(f"{clause['class']!r} is not one of this world's timbres: {', '.join(TIMBRES)}")
        if clause.get("pitch", "A4") not in NOTES:
            raise ValueError(f"{clause['pitch']!r} is not one of this world's notes: {', '.join(NOTES)}")
    n, m = len(clauses), len(detections)
    common = _common_length(
        [clause["class"] for clause in clauses], [detection.sound.timbre for detection in detections]
    )
    criteria = [("count", max(0.0, 1 - abs(n - m) / n) * common / max(m, 1)), ("kind", common / max(n, m))]
    criteria += _details(detections, clauses, metadata)
    recognized = bool(detections) and all(map(_is_recognized, detections))
    return summarize(criteria, _relaxed(detections, clauses, metadata), recognized)


def _is_recognized(detection: ToneDetection) -> bool:
    """Whether an event is of this world: a noise burst, or a note in a known timbre, and not longer than any."""
    sound = detection.sound
    is_note = sound.timbre in PITCHED and sound.note is not None
    return (is_note or sound.timbre == NOISE) and detection.offset - detection.onset <= MAX_EVENT


def _common_length(first: Sequence[str], second: Sequence[str]) -> int:
    """The length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for name in first:
        before = row
        row = [0]
        for k, other in enumerate(second):
            row.append(before[k] + 1 if name == other else max(before[k + 1], row[k]))
    return row[-1]


def _details(
    detections: Sequence[ToneDetection], clauses: Sequence[Metadata], metadata: Metadata
) -> list[tuple[str, float]]:
    """The criteria beyond number and kind that the prompt names."""
    in_place = _in_place(detections, clauses)
    details = []
    if any("pitch" in clause for clause in clauses):
        details.append(("note", _note(detections, clauses)))
    if "relation" in metadata:
        low, high = detections[:: 1 if metadata["relation"] == "higher" else -1] if in_place else (None, None)
        right = low and high and high.sound.frequency / low.sound.frequency >= MIN_INTERVAL
        details.append(("relation", float(bool(right))))
    if "loudness" in metadata:
        quiet, loud = detections[:: 1 if metadata["loudness"] == "louder" else -1] if in_place else (None, None)
        right = quiet and loud and loud.level - quiet.level >= MIN_CONTRAST
        details.append(("loudness", float(bool(right))))
    return details


def _in_place(detections: Sequence[ToneDetection], clauses: Sequence[Metadata]) -> bool:
    return [detection.sound.timbre for detection in detections] == [clause["class"] for clause in clauses]


def _note(detections: Sequence[ToneDetection], clauses: Sequence[Metadata]) -> float:
    if len(detections) != len(clauses):
        return 0.0
    right = [
        (clause["class"], clause["pitch"]) == (detection.sound.timbre, detection.sound.note)
        for detection, clause in zip(detections, clauses, strict=True)
        if "pitch" in clause
    ]
    return sum(right) / len(right)


def _relaxed(detections: Sequence[ToneDetection], clauses: Sequence[Metadata], metadata: Metadata) -> bool:
    """Whether a subsequence of the events matches the prompt."""
    timbres = [detection.sound.timbre for detection in detections]
    if any(clause["count"] > 1 and timbres.count(clause["class"]) > clause["count"] for clause in metadata["events"]):
        return False
    return any(
        _in_place(subset, clauses) and all(value == 1 for _, value in _details(subset, clauses, metadata))
        for subset in combinations(detections, len(clauses))
    )
