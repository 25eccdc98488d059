"""The tones world: grammar, splits, clips, rendering."""

from itertools import pairwise, permutations, product

import numpy as np
import pytest
import torch

from genalign.types import Prompt
from genalign.worlds.tones import scenes
from genalign.worlds.tones.instruments import BAND_LIMIT, LENGTH, NOTES, PITCHED, SAMPLE_RATE, TIMBRES, tone
from genalign.worlds.tones.prompts import (
    attribution,
    counting,
    is_held_out_note,
    is_held_out_order,
    loudness,
    pitch,
    prompts,
    relation,
    single_tone,
    two_tone,
)
from genalign.worlds.tones.scenes import Clip, Event, render, sample_clip, waveform


def clips_of(suite: str, per_task: int, seed: int) -> list[tuple[Prompt, Clip]]:
    rng = np.random.default_rng(seed)
    chosen = [
        group[index] for group in prompts(suite).by_task().values() for index in rng.integers(len(group), size=per_task)
    ]
    return [(prompt, sample_clip(prompt.metadata, rng)) for prompt in chosen]


def clause(timbre: str, count: int = 1, **criteria: str) -> dict[str, object]:
    return {"class": timbre, "count": count, **criteria}


NAMED = [clause("sine", pitch="C4"), clause("square", pitch="G4")]
LOWER, LOUDER = "a sine tone then a lower square tone", "a quiet organ tone then a louder noise burst"


@pytest.mark.parametrize(
    ("prompt", "text", "tag", "events"),
    [
        (single_tone("noise"), "a noise burst", "single_tone", [clause("noise")]),
        (two_tone("organ", "sine"), "an organ tone then a sine tone", "two_tone", [clause("organ"), clause("sine")]),
        (counting("square", "three"), "three square tones", "counting", [clause("square", 3)]),
        (pitch("organ", "A4"), "an A4 organ tone", "pitch", [clause("organ", pitch="A4")]),
        (relation("sine", "lower", "square"), LOWER, "relation", [clause("sine"), clause("square")]),
        (attribution("sine", "C4", "square", "G4"), "a C4 sine tone then a G4 square tone", "attribution", NAMED),
        (loudness("organ", "louder", "noise"), LOUDER, "loudness", [clause("organ"), clause("noise")]),
    ],
)
def test_texts_and_metadata(prompt: Prompt, text: str, tag: str, events: list[dict[str, object]]) -> None:
    comparison = {"relation": {"relation": "lower"}, "loudness": {"loudness": "louder"}}.get(tag, {})
    assert (prompt, prompt.metadata) == (text, {"tag": tag, "events": events, **comparison, "prompt": text})


def test_held_out_notes_leave_every_timbre_and_note_heard() -> None:
    held = {(timbre, note) for timbre, note in product(PITCHED, NOTES) if is_held_out_note(timbre, note)}
    assert len(held) == 8
    assert all(sum(timbre == name for timbre, _ in held) == 2 for name in PITCHED)
    assert all(sum(note == name for _, note in held) < len(PITCHED) for name in NOTES)


def test_held_out_orders_leave_every_place_heard() -> None:
    held = {pair for pair in permutations(TIMBRES, 2) if is_held_out_order(*pair)}
    assert len(held) == 4
    for place in (0, 1):
        assert all(sum(pair[place] == timbre for pair in held) <= 1 for timbre in TIMBRES)


def test_held_out_notes_are_played_in_training_but_never_named() -> None:
    """A model that never heard them would not play them, whatever the prompt says."""
    played = {(event.timbre, event.note) for _, clip in clips_of("train", 100, seed=1) for event in clip.events}
    assert all((timbre, note) in played for timbre, note in product(PITCHED, NOTES))
    events = [event for prompt in prompts("train").prompts for event in prompt.metadata["events"]]
    named = {(event["class"], event["pitch"]) for event in events if "pitch" in event}
    assert named == {(timbre, note) for timbre, note in product(PITCHED, NOTES) if not is_held_out_note(timbre, note)}


def test_held_out_orders_are_never_played_in_training() -> None:
    for prompt, clip in clips_of("train", 100, seed=1):
        if prompt.task != "counting" and len(clip.events) == 2:
            assert not is_held_out_order(*(event.timbre for event in clip.events))


@pytest.mark.parametrize("suite", ["iid", "comp", "len"])
def test_clips_are_what_their_metadata_say(suite: str) -> None:
    for prompt, clip in clips_of(suite, 60, seed=2):
        metadata = prompt.metadata
        asked = [clause for clause in metadata["events"] for _ in range(clause["count"])]
        assert [event.timbre for event in clip.events] == [clause["class"] for clause in asked]
        assert all(
            clause.get("pitch", event.note) == event.note for clause, event in zip(asked, clip.events, strict=True)
        )
        if "relation" in metadata:
            first, second = (NOTES[event.note] for event in clip.events)
            assert second > first if metadata["relation"] == "higher" else second < first
        if "loudness" in metadata:
            first, second = (event.level for event in clip.events)
            assert 8 <= (second - first if metadata["loudness"] == "louder" else first - second) <= 12


def test_events_fit_with_gaps_between_them() -> None:
    for _, clip in clips_of("iid", 100, seed=3) + clips_of("len", 100, seed=4):
        edges = [(event.onset, event.onset + event.duration) for event in clip.events]
        assert edges[0][0] >= scenes.MARGIN - 1e-9
        assert edges[-1][1] <= LENGTH / SAMPLE_RATE - scenes.MARGIN + 1e-9
        assert all(later[0] - earlier[1] >= scenes.GAP - 1e-9 for earlier, later in pairwise(edges))
        assert all(0.119 <= event.duration <= 0.5 for event in clip.events)


def event(timbre: str = "sine", note: str | None = "A4", onset: float = 0.3) -> Event:
    return Event(timbre, note, onset, duration=0.4, level=-14.0, detune=0.0, seed=5)


def test_rendering_puts_the_samples_where_the_event_is() -> None:
    wave = render([Clip((event(),))])
    assert wave.shape == (1, 1, LENGTH) and wave.dtype == torch.float32
    sounding = wave[0, 0].abs() > 1e-4
    first, last = (int(index) for index in sounding.nonzero()[[0, -1], 0])
    assert abs(first / SAMPLE_RATE - 0.3) < 0.005 and abs(last / SAMPLE_RATE - 0.7) < 0.005


@pytest.mark.parametrize("timbre", TIMBRES)
def test_the_level_is_that_of_the_steady_part(timbre: str) -> None:
    samples = waveform(event(timbre, None if timbre == "noise" else "E4"))
    assert 20 * np.log10(np.sqrt(np.mean(samples[200:-200] ** 2))) == pytest.approx(-14, abs=0.3)


@pytest.mark.parametrize("timbre", PITCHED)
@pytest.mark.parametrize("note", NOTES)
def test_tones_are_band_limited(timbre: str, note: str) -> None:
    wave = tone(PITCHED[timbre], NOTES[note], 0.0, SAMPLE_RATE)
    power = np.abs(np.fft.rfft(wave * np.hanning(len(wave)))) ** 2
    assert power[int(BAND_LIMIT) + 5 :].sum() <= 1e-6 * power.sum()
    assert power.argmax() == pytest.approx(NOTES[note], abs=1)


def test_the_same_seed_is_the_same_clip() -> None:
    first, second = (sample_clip(counting("noise", "five").metadata, np.random.default_rng(9)) for _ in range(2))
    assert torch.equal(render([first]), render([second]))
