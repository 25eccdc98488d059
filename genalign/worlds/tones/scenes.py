"""Clips of tones, their sampling from a prompt's metadata, and their rendering."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from genalign.types import Metadata
from genalign.worlds.tones.instruments import LENGTH, NOISE, NOTES, PITCHED, SAMPLE_RATE, Array, tone

RAMP = 0.012  # seconds of a raised cosine at either end of an event
MARGIN = 0.02  # seconds of silence kept at either end of a clip
GAP = 0.09  # the shortest silence between two events, in seconds
DURATION = (0.12, 0.5)  # seconds
LEVEL = (-20.0, -12.0)  # RMS in dB of full scale
CONTRAST = (8.0, 12.0)  # dB between a quiet and a loud event; the verifier asks for 6
DETUNE = 8.0  # cents
_DRAWS = 1000  # of which a few are needed


@dataclass(frozen=True)
class Event:
    """One tone or noise burst.

    Attributes:
        timbre: The name of the timbre.
        note: The name of the note; None for noise.
        onset: The start in seconds.
        duration: The length in seconds.
        level: The RMS in dB of full scale.
        detune: The deviation from the note in cents.
        seed: The seed of the noise, or of the starting phase.
    """

    timbre: str
    note: str | None
    onset: float
    duration: float
    level: float
    detune: float
    seed: int


@dataclass(frozen=True)
class Clip:
    """Events in order of time on silence."""

    events: tuple[Event, ...]


def waveform(event: Event) -> Array:
    """The samples of one event, ramps included."""
    samples = round(event.duration * SAMPLE_RATE)
    rng = np.random.default_rng(event.seed)
    if event.note is None:
        steady = rng.standard_normal(samples)
        steady /= np.sqrt(np.mean(steady**2))
    else:
        frequency = NOTES[event.note] * 2 ** (event.detune / 1200)
        steady = tone(PITCHED[event.timbre], frequency, float(rng.uniform(0, 2 * np.pi)), samples)
    steady *= 10 ** (event.level / 20)
    ramp = round(RAMP * SAMPLE_RATE)
    rise = 0.5 - 0.5 * np.cos(np.pi * (np.arange(ramp) + 0.5) / ramp)
    steady[:ramp] *= rise
    steady[-ramp:] *= rise[::-1]
    return steady


def render(clips: Sequence[Clip]) -> Tensor:
    """Waveforms (B, 1, 12000) in [-1, 1] at 8 kHz, float32."""
    out = np.zeros((len(clips), LENGTH))
    for samples, clip in zip(out, clips, strict=True):
        for event in clip.events:
            start = round(event.onset * SAMPLE_RATE)
            wave = waveform(event)
            samples[start : start + len(wave)] += wave[: LENGTH - start]
    return torch.from_numpy(out).float().clamp_(-1, 1)[:, None]


def render_metadata(metadata: Sequence[Metadata], rng: np.random.Generator) -> Tensor:
    """Waveforms (B, 1, 12000) of random clips, for each of which its metadata (B) are exactly true."""
    return render([sample_clip(item, rng) for item in metadata])


def sample_clip(metadata: Metadata, rng: np.random.Generator) -> Clip:
    """A clip for which ``metadata`` are exactly true. Raises ValueError where none is found in 1000 draws.

    A tone whose pitch the prompt leaves open has any note, also one that no training prompt names with its timbre.
    """
    clauses = [clause for clause in metadata["events"] for _ in range(clause["count"])]
    most = int((LENGTH / SAMPLE_RATE - 2 * MARGIN + GAP) / (DURATION[0] + GAP))
    if not 1 <= len(clauses) <= most or (metadata.keys() & {"relation", "loudness"} and len(clauses) != 2):
        raise ValueError(f"no clip has {len(clauses)} events as in {metadata}: a clip has 1 to {most}, a comparison 2")
    notes = _notes(clauses, metadata.get("relation"), rng)
    times = _times(len(clauses), rng)
    levels = _levels(len(clauses), metadata.get("loudness"), rng)
    return Clip(
        tuple(
            Event(clause["class"], note, *time, level, float(rng.uniform(-DETUNE, DETUNE)), int(rng.integers(2**31)))
            for clause, note, time, level in zip(clauses, notes, times, levels, strict=True)
        )
    )


def _notes(clauses: Sequence[Metadata], relation: str | None, rng: np.random.Generator) -> list[str | None]:
    """The notes of the clauses, others at random; drawn again until the second is ``relation`` than the first."""
    for _ in range(_DRAWS):
        notes: list[str | None] = []
        for clause in clauses:
            if clause["class"] == NOISE:
                notes.append(None)
                continue
            notes.append(clause["pitch"] if "pitch" in clause else tuple(NOTES)[rng.integers(len(NOTES))])
        if relation is None:
            return notes
        first, second = (NOTES[note or "A4"] for note in notes)
        if second != first and (second > first) == (relation == "higher"):
            return notes
    raise ValueError(f"{_DRAWS} draws gave no second note {relation} than the first for {clauses}: change the notes")


def _times(count: int, rng: np.random.Generator) -> list[tuple[float, float]]:
    """Onsets and durations in seconds that fit a clip, with random gaps."""
    available = LENGTH / SAMPLE_RATE - 2 * MARGIN - (count - 1) * GAP
    shortest, longest = DURATION
    durations = rng.uniform(shortest, min(longest, available / count), count)
    slack = (available - durations.sum()) * rng.dirichlet(np.ones(count + 1))[:count]
    onsets = MARGIN + np.cumsum(slack) + np.concatenate([[0.0], np.cumsum(durations + GAP)[:-1]])
    return [(float(onset), float(duration)) for onset, duration in zip(onsets, durations, strict=True)]


def _levels(count: int, loudness: str | None, rng: np.random.Generator) -> list[float]:
    low, high = LEVEL
    if loudness is None:
        return [float(level) for level in rng.uniform(low, high, count)]
    loud = float(rng.uniform((low + high) / 2, high))
    quiet = loud - float(rng.uniform(*CONTRAST))
    return [quiet, loud] if loudness == "louder" else [loud, quiet]
