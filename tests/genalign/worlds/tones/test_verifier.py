"""The verifier of the tones world against the renderer's truth, corrupted truth, and near misses."""

import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import signal
from torch import Tensor

from genalign.types import Metadata
from genalign.worlds import tones
from genalign.worlds.tones import scenes
from genalign.worlds.tones.detection import ToneDetection, detect
from genalign.worlds.tones.instruments import LENGTH, MAX_HARMONIC, NOISE, NOTES, PITCHED, SAMPLE_RATE, TIMBRES
from genalign.worlds.tones.prompts import attribution, counting, loudness, pitch, relation, single_tone, two_tone
from genalign.worlds.tones.scenes import Clip, Event, render, sample_clip
from genalign.worlds.tones.spectrum import Sound
from genalign.worlds.tones.verifier import verify, verify_detections
from tests.genalign.worlds.cases import Case, Corruption, Verified, strict_share, true_cases, untouched, verifications

WINDOW = torch.hann_window(512)
UNKNOWN_TIMBRES = {
    "hollow": {1: 0.1, 2: 1.0, 3: 1.0, 4: 0.1, 5: 1.0},
    "buzz": dict.fromkeys(range(3, MAX_HARMONIC + 1), 1.0),
    "nasal": {1: 0.05, 3: 1.0, 4: 1.0},
}


# ---------------------------------------------------------------------------------------------------- corruptions


def gained(waves: Tensor, rng: np.random.Generator) -> Tensor:
    decibels = rng.uniform(-12, 6, (len(waves), 1, 1))
    return waves * torch.from_numpy(10 ** (decibels / 20)).float()


def noisy(waves: Tensor, rng: np.random.Generator, snr: float = 20.0) -> Tensor:
    """White noise ``snr`` dB below the mean power of the sounding parts."""
    loud = waves.abs() > 1e-4
    power = (waves**2).sum((1, 2)) / loud.sum((1, 2))
    scale = (power * 10 ** (-snr / 10)).sqrt()[:, None, None]
    return waves + scale * torch.from_numpy(rng.standard_normal(waves.shape, np.float32))


def mu_law(waves: Tensor, rng: np.random.Generator) -> Tensor:
    """Rounded to 8 bits of µ-law."""
    mu = 255.0
    code = waves.sign() * torch.log1p(mu * waves.abs().clamp(max=1)) / np.log1p(mu)
    code = ((code + 1) / 2 * mu).round() / mu * 2 - 1
    return code.sign() * torch.expm1(code.abs() * np.log1p(mu)) / mu


def spectrogram(waves: Tensor) -> Tensor:
    return torch.stft(waves[:, 0], 512, 128, window=WINDOW, return_complex=True)


def sounded(spectra: Tensor) -> Tensor:
    return torch.istft(spectra, 512, 128, window=WINDOW, length=LENGTH)[:, None]


def jittered(waves: Tensor, rng: np.random.Generator, std: float = 0.15) -> Tensor:
    """Log-amplitudes and phases of the short-time spectrum disturbed."""
    spectra = spectrogram(waves)
    amplitude, phase = (torch.from_numpy(rng.normal(0, std, spectra.shape)).float() for _ in range(2))
    return sounded(spectra * torch.exp(amplitude) * torch.polar(torch.ones_like(phase), phase))


def griffin_lim(waves: Tensor, rng: np.random.Generator) -> Tensor:
    """From the magnitudes alone, in 30 rounds."""
    magnitude = spectrogram(waves).abs()
    angle = torch.from_numpy(rng.uniform(-np.pi, np.pi, magnitude.shape)).float()
    for _ in range(30):
        angle = spectrogram(sounded(torch.polar(magnitude, angle))).angle()
    return sounded(torch.polar(magnitude, angle))


def vibrato(waves: Tensor, rng: np.random.Generator) -> Tensor:
    """Pitch moved by up to 15 cents, four times a second."""
    seconds = np.arange(LENGTH) / SAMPLE_RATE
    depth = (2 ** (15 / 1200) - 1) / (2 * np.pi * 4)
    where = (seconds + depth * np.sin(2 * np.pi * 4 * seconds)) * SAMPLE_RATE
    return torch.from_numpy(np.stack([np.interp(where, np.arange(LENGTH), wave) for wave in waves[:, 0]]))[
        :, None
    ].float()


def reverberant(waves: Tensor, rng: np.random.Generator) -> Tensor:
    """A tail of 0.2 s to -60 dB, 12 dB below the direct sound."""
    tail = rng.standard_normal(1600) * 10 ** (-3 * np.arange(1600) / 1600)
    tail *= 10 ** (-12 / 20) / np.sqrt((tail**2).sum())
    wet = signal.fftconvolve(waves.numpy(), tail[None, None], axes=2)[..., :LENGTH]
    return waves + torch.from_numpy(wet).float()


def generated(waves: Tensor, rng: np.random.Generator) -> Tensor:
    """Like a small generator's sound: jittered, reverberant, noisy, of another level."""
    return gained(noisy(reverberant(jittered(waves, rng), rng), rng), rng)


# ----------------------------------------------------------------------------------------------------------- clips


def single_events(metadata: Metadata) -> list[dict[str, object]]:
    return [{**clause, "count": 1} for clause in metadata["events"] for _ in range(clause["count"])]


def near_misses(metadata: Metadata, rng: np.random.Generator) -> Iterator[tuple[str, Metadata]]:
    """Metadata with every single mistake that makes them false, by the mistake's name."""
    events = single_events(metadata)
    plain = {"tag": "edited", "events": events}
    k = int(rng.integers(len(events)))
    one, before, after = events[k], events[:k], events[k + 1 :]
    others = [timbre for timbre in (PITCHED if "pitch" in one else TIMBRES) if timbre != one["class"]]
    yield "kind", plain | {"events": [*before, {**one, "class": others[rng.integers(len(others))]}, *after]}
    yield "add", plain | {"events": [*before, one, one, *after]}
    if before or after:
        yield "drop", plain | {"events": [*before, *after]}
    if "pitch" in one:
        notes = [note for note in NOTES if note != one["pitch"]]
        yield "note", plain | {"events": [*before, {**one, "pitch": notes[rng.integers(len(notes))]}, *after]}
    if len({event["class"] for event in events}) == 2:
        yield "order", plain | {"events": events[::-1]}
    flipped = {"higher": "lower", "lower": "higher", "louder": "quieter", "quieter": "louder"}
    for name in ("relation", "loudness"):
        if name in metadata:
            yield name, {**metadata, name: flipped[metadata[name]]}


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return true_cases(tones, sample_clip, per_task=40, seed=72_001)


@pytest.fixture(scope="module")
def verified(cases: list[Case]) -> Verified:
    return Verified(cases)


@pytest.fixture(scope="module")
def misses(cases: list[Case]) -> list[tuple[int, str, Case]]:
    """(index of the true case, kind of mistake, case) of near misses."""
    rng = np.random.default_rng(72_002)
    return [
        (index, kind, Case(sample_clip(wrong, rng), case.metadata))
        for index, case in enumerate(cases)
        for kind, wrong in near_misses(case.metadata, rng)
    ]


# ------------------------------------------------------------------------------------------------------ acceptance


@pytest.mark.parametrize(
    ("corruption", "least"),
    [
        (untouched, 0.99),
        (gained, 0.99),
        (noisy, 0.99),
        (mu_law, 0.99),
        (jittered, 0.99),
        (vibrato, 0.99),
        pytest.param(griffin_lim, 0.97, marks=pytest.mark.slow),
        (generated, 0.95),
    ],
)
def test_truth_is_accepted(verified: Verified, corruption: Corruption, least: float) -> None:
    assert strict_share(verified[corruption]) >= least


@pytest.mark.parametrize("corruption", [untouched, generated])
def test_near_misses_are_refused_and_score_less(
    verified: Verified, misses: list[tuple[int, str, Case]], corruption: Corruption
) -> None:
    assert {kind for _, kind, _ in misses} == {"kind", "add", "drop", "note", "order", "relation", "loudness"}
    truth = verified[corruption]
    near = verifications([case for _, _, case in misses], corruption)
    assert np.mean([verification.strict for verification in near]) <= 0.005
    right = [truth[index].strict for index, _, _ in misses]
    ranked = [
        truth[index].partial > verification.partial for (index, _, _), verification in zip(misses, near, strict=True)
    ]
    assert np.mean(np.array(ranked)[right]) >= 0.995


@pytest.mark.parametrize(
    "metadata",
    [prompt.metadata for prompt in (single_tone("sine"), counting("square", "three"), pitch("organ", "C5"))],
)
def test_junk_earns_nothing(metadata: Metadata) -> None:
    rng = np.random.default_rng(72_003)
    silence = torch.zeros(2, 1, LENGTH)
    silence[1] = 1e-4 * torch.from_numpy(rng.standard_normal((1, LENGTH))).float()
    white = 0.1 * torch.from_numpy(rng.standard_normal((8, 1, LENGTH))).float()
    hum = 0.2 * torch.sin(2 * torch.pi * 100 / SAMPLE_RATE * torch.arange(LENGTH)).expand(1, 1, -1)
    for verification in verify(torch.cat([silence, white, hum]), [metadata] * 11):
        assert not verification.strict and verification.partial == 0


def test_white_noise_is_a_noise_burst() -> None:
    white = 0.1 * torch.from_numpy(np.random.default_rng(72_004).standard_normal((4, 1, LENGTH))).float()
    assert all(verification.strict for verification in verify(white, [single_tone("noise").metadata] * 4))


@pytest.mark.parametrize("timbre", UNKNOWN_TIMBRES)
def test_timbres_outside_the_vocabulary_are_unknown(timbre: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenes, "PITCHED", UNKNOWN_TIMBRES)
    clips = [Clip((tone(timbre, note),)) for note in ("C4", "E4", "A4", "D5")]
    assert [[event.sound.timbre for event in clip] for clip in detect(render(clips))] == [["unknown"]] * len(clips)


def test_two_tones_at_once_are_unknown() -> None:
    chords = [Clip((tone("sine", low), tone("sine", high))) for low, high in (("C4", "E4"), ("A4", "D5"))]
    assert [[event.sound.timbre for event in clip] for clip in detect(render(chords))] == [["unknown"]] * 2


def test_the_batch_does_not_matter(cases: list[Case]) -> None:
    waves = generated(render([case.drawing for case in cases[::12]]), np.random.default_rng(0))
    together = detect(waves)
    assert [detect(wave[None])[0] for wave in waves] == together
    assert detect(waves.flip(0))[::-1] == together


def test_fast_enough(cases: list[Case]) -> None:
    waves = generated(render([case.drawing for case in cases[:64]]), np.random.default_rng(0))
    detect(waves[:2])
    start = time.process_time()
    detect(waves)
    assert (time.process_time() - start) / len(waves) <= 0.010


def tone(timbre: str, note: str | None, onset: float = 0.3) -> Event:
    return Event(timbre, note, onset, duration=0.4, level=-14.0, detune=4.0, seed=5)


@pytest.mark.parametrize("timbre", TIMBRES)
def test_a_detection_has_timbre_note_times_and_level(timbre: str) -> None:
    note = None if timbre == NOISE else "G4"
    ((event,),) = detect(render([Clip((tone(timbre, note),))]))
    assert (event.sound.timbre, event.sound.note) == (timbre, note)
    assert (event.onset, event.offset) == pytest.approx((0.3, 0.7), abs=0.015)
    assert event.level == pytest.approx(-14, abs=0.5)
    if note:
        assert event.sound.frequency == pytest.approx(NOTES["G4"] * 2 ** (4 / 1200), rel=1e-3)
        assert event.sound.distance <= 1.0


@pytest.mark.parametrize("note", NOTES)
def test_a_long_sine_is_no_overtone_of_a_lower_note(note: str) -> None:
    """Every 2 cents of detuning, since a grid of candidates may sit beside the peak of a long tone."""
    clips = [Clip((replace(tone("sine", note), duration=0.5, detune=cents),)) for cents in range(-8, 9, 2)]
    assert [[event.sound.note for event in clip] for clip in detect(render(clips))] == [[note]] * len(clips)


# ---------------------------------------------------------------------------------------------------------- input


def test_input_is_checked() -> None:
    waves = torch.zeros(2, 1, LENGTH)
    with pytest.raises(ValueError, match="NaN"):
        detect(waves.fill_(torch.nan))
    with pytest.raises(ValueError, match=r"\(B, 1, 12000\) at 8000 Hz"):
        detect(torch.zeros(2, 1, 16000))
    with pytest.raises(TypeError, match="int16"):
        detect(torch.zeros(2, 1, LENGTH, dtype=torch.int16))
    with pytest.raises(ValueError, match="2 waveforms but 1 metadata"):
        verify(torch.zeros(2, 1, LENGTH), [single_tone("sine").metadata])
    with pytest.raises(ValueError, match="'circle' is not one of this world's timbres: sine, square"):
        verify_detections([], {"events": [{"class": "circle", "count": 1}]})
    with pytest.raises(ValueError, match="'B4' is not one of this world's notes: C4, D4"):
        verify_detections([], {"events": [{"class": "sine", "count": 1, "pitch": "B4"}]})
    assert detect(torch.zeros(0, 1, LENGTH)) == []


# -------------------------------------------------------------------------------------------------------- verification


def detected(timbre: str, note: str | None = "A4", level: float = -15.0) -> ToneDetection:
    return ToneDetection(0.0, 0.2, level, Sound(timbre, note, NOTES[note or "A4"], 0.0, 1.0, 0.0))


SINE = single_tone("sine").metadata
PAIR = two_tone("sine", "noise").metadata
THREE = counting("square", "three").metadata
C5 = pitch("organ", "C5").metadata
LOWER = relation("sine", "lower", "square").metadata
NAMED = attribution("sine", "C4", "square", "G4").metadata
LOUDER = loudness("organ", "louder", "sine").metadata


@pytest.mark.parametrize(
    ("metadata", "detections", "strict", "relaxed", "criteria"),
    [
        (SINE, [detected("sine")], True, True, [1, 1]),
        (SINE, [], False, False, [0, 0]),
        (SINE, [detected("organ")], False, False, [0, 0]),
        (SINE, [detected("organ"), detected("sine")], False, True, [0, 1 / 2]),
        (PAIR, [detected("sine"), detected("noise", None)], True, True, [1, 1]),
        (PAIR, [detected("noise", None), detected("sine")], False, False, [1 / 2, 1 / 2]),
        (PAIR, [detected("sine"), detected("organ"), detected("noise", None)], False, True, [1 / 2 * 2 / 3, 2 / 3]),
        (THREE, [detected("square")] * 3, True, True, [1, 1]),
        (THREE, [detected("square")] * 2, False, False, [2 / 3, 2 / 3]),
        (THREE, [detected("square")] * 4, False, False, [2 / 3 * 3 / 4, 3 / 4]),
        (THREE, [*[detected("square")] * 3, detected("sine")], False, True, [2 / 3 * 3 / 4, 3 / 4]),
        (C5, [detected("organ", "C5")], True, True, [1, 1, 1]),
        (C5, [detected("organ", "C4")], False, False, [1, 1, 0]),
        (C5, [detected("sine", "C5")], False, False, [0, 0, 0]),
        (C5, [detected("organ", "C4"), detected("organ", "C5")], False, True, [0, 1 / 2, 0]),
        (LOWER, [detected("sine", "A4"), detected("square", "C4")], True, True, [1, 1, 1]),
        (LOWER, [detected("sine", "C4"), detected("square", "A4")], False, False, [1, 1, 0]),
        (LOWER, [detected("sine", "A4"), detected("square", "A4")], False, False, [1, 1, 0]),
        (LOWER, [detected("square", "A4"), detected("sine", "C4")], False, False, [1 / 2, 1 / 2, 0]),
        (NAMED, [detected("sine", "C4"), detected("square", "G4")], True, True, [1, 1, 1]),
        (NAMED, [detected("sine", "C4"), detected("square", "C4")], False, False, [1, 1, 1 / 2]),
        (NAMED, [detected("sine", "G4"), detected("square", "C4")], False, False, [1, 1, 0]),
        (LOUDER, [detected("organ", level=-25), detected("sine", level=-15)], True, True, [1, 1, 1]),
        (LOUDER, [detected("organ", level=-20), detected("sine", level=-15)], False, False, [1, 1, 0]),
        (LOUDER, [detected("organ", level=-15), detected("sine", level=-25)], False, False, [1, 1, 0]),
    ],
)
def test_strict_relaxed_and_partial(
    metadata: Metadata, detections: list[ToneDetection], strict: bool, relaxed: bool, criteria: list[float]
) -> None:
    verification = verify_detections(detections, metadata)
    assert (verification.strict, verification.relaxed) == (strict, relaxed)
    assert [value for _, value in verification.criteria] == pytest.approx(criteria)
    assert verification.partial == pytest.approx(np.mean(criteria))


def test_known_sounds_alone_are_recognized_whatever_the_prompt_asks_for() -> None:
    wrong = [detected("square"), detected("noise", None)]
    assert verify_detections(wrong, SINE).recognized and not verify_detections(wrong, SINE).strict
    assert not verify_detections([*wrong, detected("unknown")], SINE).recognized
    assert not verify_detections([detected("sine", None)], SINE).recognized  # between two notes
    assert not verify_detections([], SINE).recognized


def test_hiss_that_fills_a_clip_is_not_recognized(verified: Verified) -> None:
    white = 0.1 * torch.from_numpy(np.random.default_rng(72_004).standard_normal((4, 1, LENGTH))).float()
    assert not any(verification.recognized for verification in verify(white, [single_tone("noise").metadata] * 4))
    assert np.mean([verification.recognized for verification in verified[untouched]]) == 1.0
