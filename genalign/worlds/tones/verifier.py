"""The verdict on a clip of the tones world, exact and without learned weights."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from torch import Tensor

from genalign.types import Metadata
from genalign.worlds.tones.detection import Detection, detect
from genalign.worlds.tones.instruments import NOTES, TIMBRES
from genalign.worlds.verdict import Verdict, verdict

__all__ = ["VERIFIER_VERSION", "Detection", "Verdict", "detect", "judge", "verify"]

VERIFIER_VERSION = "tones-1"
MIN_CONTRAST = 6.0  # dB between a quiet and a loud event
MIN_INTERVAL = 2 ** (1 / 12)  # between a low and a high tone


def verify(waveforms: Tensor, metadata: Sequence[Metadata]) -> list[Verdict]:
    """A verdict for each clip (B, 1, 12000) at 8 kHz by its prompt's metadata (B).

    Raises:
        ValueError: for unequal lengths, NaN samples, or metadata of another world.
    """
    if len(waveforms) != len(metadata):
        raise ValueError(f"{len(waveforms)} waveforms but {len(metadata)} metadata: give one for each waveform")
    return [judge(detections, item) for detections, item in zip(detect(waveforms), metadata, strict=True)]


def judge(detections: Sequence[Detection], metadata: Metadata) -> Verdict:
    """Score events in order of time against ``metadata``: events, relation, loudness (see ``tones.prompts``).

    With n events asked for, m found, and c the length of the longest common subsequence of their timbres: count =
    max(0, 1 - |n - m| / n) c / m and kind = c / max(n, m), both 0 for m = 0. Where the prompt asks for it: note, the
    share of the asked notes that sound at their place in their timbre, 0 for m != n; relation and loudness, 1 or 0,
    0 unless every timbre is in its place. Relaxed overlooks surplus events, unless the prompt counts their timbre.
    """
    asked = [clause for clause in metadata["events"] for _ in range(clause["count"])]
    _check_vocabulary(asked)
    n, m = len(asked), len(detections)
    common = _common([clause["class"] for clause in asked], [detection.timbre for detection in detections])
    criteria = [("count", max(0.0, 1 - abs(n - m) / n) * common / max(m, 1)), ("kind", common / max(n, m))]
    return verdict(criteria + _details(detections, asked, metadata), _relaxed(detections, asked, metadata))


def _check_vocabulary(asked: Sequence[Metadata]) -> None:
    for clause in asked:
        if clause["class"] not in TIMBRES:
            raise ValueError(f"{clause['class']!r} is not one of this world's timbres: {', '.join(TIMBRES)}")
        if clause.get("pitch", "A4") not in NOTES:
            raise ValueError(f"{clause['pitch']!r} is not one of this world's notes: {', '.join(NOTES)}")


def _common(wanted: Sequence[str], found: Sequence[str]) -> int:
    """The length of the longest common subsequence."""
    row = [0] * (len(found) + 1)
    for name in wanted:
        before = row
        row = [0]
        for k, other in enumerate(found):
            row.append(before[k] + 1 if name == other else max(before[k + 1], row[k]))
    return row[-1]


def _details(detections: Sequence[Detection], asked: Sequence[Metadata], metadata: Metadata) -> list[tuple[str, float]]:
    """The criteria beyond number and kind that the prompt asks for."""
    in_place = _in_place(detections, asked)
    details = []
    if any("pitch" in clause for clause in asked):
        details.append(("note", _note(detections, asked)))
    if "relation" in metadata:
        details.append(("relation", float(in_place and _is_related(detections, metadata["relation"]))))
    if "loudness" in metadata:
        details.append(("loudness", float(in_place and _is_louder(detections, metadata["loudness"]))))
    return details


def _in_place(detections: Sequence[Detection], asked: Sequence[Metadata]) -> bool:
    return [detection.timbre for detection in detections] == [clause["class"] for clause in asked]


def _note(detections: Sequence[Detection], asked: Sequence[Metadata]) -> float:
    if len(detections) != len(asked):
        return 0.0
    right = [
        (clause["class"], clause["pitch"]) == (detection.timbre, detection.note)
        for detection, clause in zip(detections, asked, strict=True)
        if "pitch" in clause
    ]
    return sum(right) / len(right)


def _is_related(detections: Sequence[Detection], relation: str) -> bool:
    first, second = (detection.sound.frequency for detection in detections)
    return (second / first if relation == "higher" else first / second) >= MIN_INTERVAL


def _is_louder(detections: Sequence[Detection], loudness: str) -> bool:
    first, second = (detection.level for detection in detections)
    return (second - first if loudness == "louder" else first - second) >= MIN_CONTRAST


def _relaxed(detections: Sequence[Detection], asked: Sequence[Metadata], metadata: Metadata) -> bool:
    """Whether some of the events, in their order, are all that is asked for."""
    found = [detection.timbre for detection in detections]
    if any(clause["count"] > 1 and found.count(clause["class"]) > clause["count"] for clause in metadata["events"]):
        return False
    return any(
        _in_place(chosen, asked) and all(value == 1 for _, value in _details(chosen, asked, metadata))
        for chosen in combinations(detections, len(asked))
    )
